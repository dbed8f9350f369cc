"""What would lose new tensors silently is refused by one line; what only wraps them is looked through."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from peft_vit.adapters import attach_adapters, check_resizable, current_ranks, resize_adapters
from peft_vit.backbones import find_sites
from peft_vit.errors import UserError

pytestmark = pytest.mark.part("controller")


@pytest.fixture
def model(tiny_vit) -> nn.Module:
    model = tiny_vit()
    attach_adapters(model, find_sites(model), 2, scale=2.0, seed=0)
    return model


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """Start torch.distributed with one member, over a file."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)


def refusal(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    with pytest.raises(UserError) as refused:
        check_resizable(model, optimizer)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("make", "is_fine"),
    [
        (torch.optim.AdamW, True),
        (torch.optim.Adam, True),
        (torch.optim.SGD, True),
        (lambda p: torch.optim.SGD(p, momentum=0.9), True),
        (lambda p: torch.optim.SGD(p, dampening=0.5), True),  # without momentum it does nothing
        (lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.5), False),
        (torch.optim.NAdam, False),
        (torch.optim.Adagrad, False),
        (type("Mine", (torch.optim.AdamW,), {}), False),  # may keep more than we know of
    ],
)
def test_the_optimizers_whose_state_is_known(model, make, is_fine) -> None:
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    if is_fine:
        check_resizable(model, optimizer)
    else:
        assert refusal(model, optimizer).startswith("optimizer: ")


def test_an_optimizer_that_accelerate_wrapped_is_resized_within(model, batch) -> None:
    accelerate = pytest.importorskip("accelerate")
    inner = adamw(model)
    outer = accelerate.Accelerator(cpu=True).prepare_optimizer(inner)
    assert outer is not inner
    check_resizable(model, outer)
    model(batch[0]).square().sum().backward()
    outer.step()
    ranks = dict.fromkeys(current_ranks(model), 1)
    resize_adapters(model, outer, ranks, {name: torch.rand(2) for name in ranks})
    held = [parameter for group in inner.param_groups for parameter in group["params"]]
    assert set(map(id, held)) == {id(p) for p in model.parameters() if p.requires_grad} == set(map(id, inner.state))
    unknown = accelerate.Accelerator(cpu=True).prepare_optimizer(torch.optim.NAdam(model.parameters()))
    assert "NAdam can't follow a change of rank" in refusal(model, unknown)


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel_is_refused(model) -> None:
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert refusal(wrapped, adamw(model)).startswith("model: ranks can't change here: DistributedDataParallel")
    assert refusal(nn.Sequential(wrapped), adamw(model)).startswith("0: ")
    check_resizable(model, adamw(model))  # one process alone is fine


@pytest.mark.usefixtures("one_process")
def test_several_processes_are_refused_though_the_model_does_not_show_it(model, monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert "2 processes train together" in refusal(model, adamw(model))


@pytest.mark.usefixtures("one_process")
def test_fully_sharded_models_are_refused(model) -> None:
    # FSDP1 starts on accelerators only; of the wrapper the class is what tells.
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.inner = model
    assert "FullyShardedDataParallel shards" in refusal(wrapped, adamw(model))
    optimizer = adamw(model)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(model.blocks[1], mesh=mesh)
    assert refusal(model, optimizer).startswith("blocks.1: ranks can't change here: fully_shard")
    bare = nn.Module()  # what is left of it in a module of another class: its parameters
    bare.weight = model.blocks[1].norm1.weight
    assert refusal(bare, optimizer).startswith("weight: ranks can't change here: it is a DTensor")


def test_compiled_models_are_refused(model) -> None:
    assert "torch.compile has fixed" in refusal(torch.compile(model), adamw(model))
    model.blocks[0].mlp.compile()
    assert refusal(model, adamw(model)).startswith("blocks.0.mlp: ranks can't change here: torch.compile")


def test_a_model_that_was_compiled_later_is_refused_before_it_changes(model) -> None:
    optimizer = adamw(model)
    check_resizable(model, optimizer)
    model.compile()
    ranks = dict.fromkeys(current_ranks(model), 1)
    with pytest.raises(UserError, match=r"torch\.compile"):
        resize_adapters(model, optimizer, ranks, {name: torch.rand(2) for name in ranks})
    assert set(current_ranks(model).values()) == {2}
