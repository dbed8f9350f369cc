"""A change of rank is real: smaller tensors, smaller optimiser state, and every triplet keeps its own moments.

What would lose new tensors silently is refused by one line; what only wraps them is looked through.
"""

from collections.abc import Iterator

import pytest
import torch
from covering_pairs import covering_pairs
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import attach_adapters, check_resizable, current_ranks, resize_adapters, site_adapters
from peft_vit.core.adapters.footprint import optimizer_bytes, trainable_parameters
from peft_vit.core.backbones import find_sites

pytestmark = pytest.mark.part("controller")
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
}
DIMS = {"lora_A": 0, "lora_B": 1, "lora_lambda": 0}


def trained(model, batch, kind="adamw", parametrization="product", rank=4, steps=2):
    """Return an optimiser after some steps on a model with adapters of one rank."""
    attach_adapters(model, find_sites(model), rank, scale=2.0, seed=0, parametrization=parametrization)
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
    for _ in range(steps):
        optimize(model, optimizer, batch)
    return optimizer


def optimize(model, optimizer, batch) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def moments(optimizer, parameter) -> dict[str, torch.Tensor]:
    state = optimizer.state[parameter]
    return {key: value.clone() for key, value in state.items() if torch.is_tensor(value) and value.dim() > 0}


def new_ranks(model, change: int) -> dict[str, int]:
    return {name: rank + change for name, rank in current_ranks(model).items()}


def scores_of(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.rand(rank, generator=generator) for name, rank in current_ranks(model).items()}


@pytest.mark.parametrize(
    ("change", "kind", "parametrization", "reference"),
    covering_pairs([-3, 4], [*OPTIMIZERS], ["product", "svd"], [None, 6.0]),
)
def test_the_strongest_triplets_stay_with_their_moments_and_new_ones_start_from_nothing(
    tiny_vit, batch, change, kind, parametrization, reference
) -> None:
    model = tiny_vit()
    optimizer = trained(model, batch, kind, parametrization)  # rank 4
    for adapter in site_adapters(model).values():
        adapter.reference_rank = reference
    old = {
        (site, name): (p.detach().clone(), moments(optimizer, p))
        for site, adapter in site_adapters(model).items()
        for name, p in adapter.named_parameters()
    }
    updates = {site: adapter.delta().detach() for site, adapter in site_adapters(model).items()}
    bytes_before, parameters_before = optimizer_bytes(optimizer), trainable_parameters(model)
    scores = scores_of(model)
    kept = resize_adapters(model, optimizer, new_ranks(model, change), scores)
    larger = 4 / (4 + change) if reference and parametrization == "product" else 1.0  # under a reference rank
    for site, adapter in site_adapters(model).items():
        assert adapter.rank == 4 + change
        assert kept[site].tolist() == ([0, 1, 2, 3] if change > 0 else [int(scores[site].argmax())])
        for name, factor in (("lora_A", larger), ("lora_B", 1 / larger), ("lora_lambda", 1.0)):
            if (parameter := getattr(adapter, name)) is None:
                continue
            values, states = old[site, name]
            sizes = [len(kept[site]), adapter.rank - len(kept[site])]
            stayed, _ = parameter.detach().split(sizes, DIMS[name])
            torch.testing.assert_close(stayed, values.index_select(DIMS[name], kept[site]) * factor)
            carried = moments(optimizer, parameter)
            assert carried.keys() == states.keys() != set()
            for key, state in states.items():  # the gradient of c w is 1 / c that of w
                stayed, added = carried[key].split(sizes, DIMS[name])
                expected = state.index_select(DIMS[name], kept[site]) / factor ** (2 if "sq" in key else 1)
                torch.testing.assert_close(stayed, expected)
                assert not added.any()
        if change > 0:
            torch.testing.assert_close(adapter.delta().detach(), updates[site], rtol=1e-5, atol=1e-7)
    added = trainable_parameters(model) - parameters_before
    per_triplet = 64 + 64, 64 + 64, 64 + 64, 64 + 64, 64 + 128, 128 + 64
    assert added == 2 * change * sum(n + (parametrization == "svd") for n in per_triplet)
    per_value = {"adamw": 2, "adam": 3, "sgd": 1}[kind]
    assert optimizer_bytes(optimizer) - bytes_before == 4 * per_value * added
    optimize(model, optimizer, batch)


def test_growing_from_rank_zero_and_back(tiny_vit, batch) -> None:
    model = tiny_vit()
    optimizer = trained(model, batch, rank=0)
    empty = trainable_parameters(model)
    with torch.no_grad():
        before = model(batch[0])
    resize_adapters(model, optimizer, {"blocks.1.mlp.fc1": 2}, scores_of(model))
    with torch.no_grad():
        assert torch.equal(model(batch[0]), before)
    assert trainable_parameters(model) == empty + 2 * (64 + 128)
    optimize(model, optimizer, batch)
    resize_adapters(model, optimizer, {"blocks.1.mlp.fc1": 0}, scores_of(model))
    assert trainable_parameters(model) == empty
    with torch.no_grad():
        merged = model(batch[0])
    assert torch.isfinite(merged).all()


@pytest.mark.parametrize("parametrization", ["product", "svd"])
def test_a_site_without_rank_costs_nothing(tiny_vit, batch, parametrization) -> None:
    model = tiny_vit(depth=3)
    optimizer = trained(model, batch, parametrization=parametrization)
    ranks = {name: 2 if name == "blocks.2.attn.value" else 0 for name in current_ranks(model)}
    resize_adapters(model, optimizer, ranks, scores_of(model))
    for name, adapter in site_adapters(model).items():
        if not ranks[name]:
            assert sum(p.numel() for p in adapter.parameters()) == 0
            assert sum(p.untyped_storage().nbytes() for p in adapter.parameters()) == 0
            assert not any(p in optimizer.state for p in adapter.parameters())
    head = 64 * 5 + 5
    assert trainable_parameters(model) == head + 2 * (64 + 64 + (parametrization == "svd"))
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _block, _inputs, output: outputs.append(output))
    logits = model(batch[0])
    assert [output.grad_fn is None for output in outputs] == [True, True, False]  # back-propagation stops there
    F.cross_entropy(logits, batch[1]).backward()
    optimizer.step()
    assert {name for name, adapter in site_adapters(model).items() if adapter.lora_B.grad is not None} == {
        "blocks.2.attn.value"
    }


def test_of_equal_triplets_the_later_go_and_order_is_kept(tiny_vit, batch) -> None:
    model = tiny_vit()
    optimizer = trained(model, batch)
    name = "blocks.0.attn.value"
    kept = resize_adapters(model, optimizer, {name: 3}, {name: torch.tensor([1.0, 1.0, 2.0, 1.0])})
    assert kept[name].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("ranks", "holds", "said"),
    [
        ({"blocks.0.attn.query": -1}, True, "blocks.0.attn.query"),
        ({"blocks.0.attn.query": 65}, True, "blocks.0.attn.query"),
        ({"blocks.9": 1}, True, "blocks.9"),
        ({}, False, "does not hold the adapters' parameters"),
    ],
)
def test_what_is_impossible_is_refused_before_anything_changes(tiny_vit, batch, ranks, holds, said) -> None:
    optimizer = trained(model := tiny_vit(), batch)
    if not holds:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], 1e-2)
    with pytest.raises(UserError, match=said):
        resize_adapters(model, optimizer, {"blocks.0.attn.key": 1} | ranks, scores_of(model))
    assert set(current_ranks(model).values()) == {4}


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
    assert "FullyShardedDataParallel continues" in refusal(wrapped, adamw(model))
    optimizer = adamw(model)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(model.blocks[1], mesh=mesh)
    assert refusal(model, optimizer).startswith("blocks.1: ranks can't change here: fully_shard")
    bare = nn.Module()  # what is left of it in a module of another class: its parameters
    bare.weight = model.blocks[1].norm1.weight
    assert refusal(bare, optimizer).startswith("weight: ranks can't change here: a DTensor")


def test_compiled_models_are_refused(model) -> None:
    assert refusal(torch.compile(model), adamw(model)).startswith("model: ranks can't change here: torch.compile")
    optimizer = adamw(model)
    check_resizable(model, optimizer)
    model.blocks[0].mlp.compile()  # later, and before the model changes
    ranks = dict.fromkeys(current_ranks(model), 1)
    with pytest.raises(UserError, match=r"^blocks\.0\.mlp: ranks can't change here: torch\.compile"):
        resize_adapters(model, optimizer, ranks, {name: torch.rand(2) for name in ranks})
    assert set(current_ranks(model).values()) == {2}
