"""Leaving updates out is what a copy with zeros in their place computes; a latency is the median of passes."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import qa_lora_settings
import torch
from prepared_methods import METHODS as PREPARED
from prepared_methods import quantized
from scipy.special import log_softmax
from tiny_models import TINY_EVAS, random_model
from torch import Tensor, nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import attach_adapters, site_adapters, update_ranks, without_updates
from peft_vit.core.adapters.peft_layers import ADAPTER, peft_layers
from peft_vit.core.backbones import find_sites
from peft_vit.core.training import QALoRATrainer
from peft_vit.core.training.metrics import forward_s, measure_ablation

pytestmark = pytest.mark.part("importance analysis")

OTHERS = (*TINY_EVAS, "tiny_swin", "tiny_hiera")
CPU = torch.device("cpu")
GROUPS = {"attention": ("query", "key", "value", "out", "qkv"), "mlp": ("fc1", "fc2", "gate", "up")}


def lora(model: nn.Module) -> None:
    """Put rank 2 everywhere but on one site."""
    sites = find_sites(model)
    ranks = {site.name: 0 if site.name == "blocks.1.mlp.fc2" else 2 for site in sites}
    attach_adapters(model, sites, ranks, scale=2.0, seed=0)


METHODS: dict[str, Callable[[nn.Module], object]] = {
    "lora": lora,
    "adalora": PREPARED["growing"],
    "adalora svd": PREPARED["adalora"],
    "qa_lora": quantized(),
    "qa_lora without groups": lambda model: QALoRATrainer(
        model, qa_lora_settings.config(rank=2).model_copy(update={"use_group_quantization": False}), 4
    ),
    **{name: PREPARED[name] for name in ("qa_adalora", "peft_lora", "peft_adalora")},
    **dict.fromkeys(OTHERS, lora),
}


@pytest.fixture
def adapted(tiny_vit: Callable[..., nn.Module]) -> Callable[[str], nn.Module]:
    """Make a model whose updates, of any method, are large enough to matter."""

    def make(method: str) -> nn.Module:
        if method.startswith("peft"):
            pytest.importorskip("peft")
        model = random_model(method).train() if method in OTHERS else tiny_vit()
        METHODS[method](model)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or ".sites." in name:
                    parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


def zeroed(model: nn.Module, sites: list[str]) -> nn.Module:
    """Return a copy in which B (or lambda) of some sites is zero."""
    changed = copy.deepcopy(model)
    adapters, by_peft = site_adapters(changed), peft_layers(changed)
    with torch.no_grad():
        for site in sites:
            if hasattr(adapters.get(site), "lora_B"):
                adapter = adapters[site]
                (adapter.lora_B if adapter.lora_lambda is None else adapter.lora_lambda).zero_()
            else:
                by_peft[site.replace(".out", ".proj")].lora_E[ADAPTER].zero_()
    return changed


def loss_and_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    model.eval()
    with torch.no_grad():
        logits = model(images).double().numpy()
    truth = labels.numpy()
    return -log_softmax(logits, 1)[np.arange(len(truth)), truth].mean(), (logits.argmax(1) == truth).mean()


def in_two_batches(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(part.split(4) for part in batch), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_it_is_what_a_copy_with_zeros_loses(adapted, batch, method: str) -> None:
    model = adapted(method)
    removal = measure_ablation(model, in_two_batches(batch), precision="fp32")
    sites = [name for name, rank in update_ranks(model).items() if rank]
    assert ("blocks.1.mlp.fc2" in sites) == (METHODS[method] is not lora)
    loss, accuracy = loss_and_accuracy(model, *batch)
    assert (removal.images, removal.accuracy) == (6, accuracy)
    assert removal.loss == pytest.approx(loss, abs=1e-6)
    assert list(removal.site_loss_rise) == sites
    for name in sites:
        expected, _ = loss_and_accuracy(zeroed(model, [name]), *batch)
        assert removal.site_loss_rise[name] == pytest.approx(expected - loss, abs=1e-5)
    assert max(map(abs, removal.site_loss_rise.values())) > 0.01  # there was something to lose
    assert list(removal.group_loss_rise) == list(removal.group_accuracy) == ["attention", "mlp", "all"]
    for group, rise in removal.group_loss_rise.items():
        members = [name for name in sites if name.rsplit(".", 1)[1] in GROUPS.get(group, name)]
        expected, left = loss_and_accuracy(zeroed(model, members), *batch)
        assert rise == pytest.approx(expected - loss, abs=1e-5)
        assert removal.group_accuracy[group] == left


def test_the_walk_passes_each_block_as_often_as_it_has_to(adapted, batch) -> None:
    model = adapted("lora")
    passes = [0, 0]
    for block in range(2):
        model.blocks[block].register_forward_hook(lambda *_, block=block: passes.__setitem__(block, passes[block] + 1))
    measure_ablation(model, [batch], precision="fp32")
    # Block 0: all updates, its 6 sites, 3 groups. Block 1: as often again, and its own 5 sites.
    assert passes == [10, 15]


@pytest.mark.parametrize(("rank", "groups"), [(1, ["attention", "all"]), (0, [])])
def test_groups_without_a_site_are_left_out(tiny_vit, batch, fill_adapters, rank: int, groups: list[str]) -> None:
    model = tiny_vit()
    attach_adapters(model, find_sites(model, ("query", "value")), rank, scale=2.0, seed=0)
    fill_adapters(model)
    removal = measure_ablation(model, [batch], precision="fp32")
    loss, accuracy = loss_and_accuracy(model, *batch)
    assert (removal.loss, removal.accuracy, removal.images) == (pytest.approx(loss, abs=1e-6), accuracy, 6)
    assert list(removal.group_loss_rise) == list(removal.group_accuracy) == groups
    assert len(set(removal.group_loss_rise.values())) == rank  # both groups are the same sites
    assert len(removal.site_loss_rise) == 4 * rank


@pytest.mark.parametrize("method", ["adalora svd", "qa_adalora", "peft_lora", "peft_adalora"])
def test_the_model_is_as_it_was_also_after_an_error(adapted, batch, method: str) -> None:
    model = adapted(method)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        before = model(batch[0])
    sites = list(update_ranks(model))
    inner, outer = [], []

    def leave_out_and_fail() -> None:
        with torch.no_grad(), without_updates(model, sites[1:]):
            with without_updates(model, sites[:2]):
                inner.append(model(batch[0]))
            outer.append(model(batch[0]))
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        leave_out_and_fail()
    with torch.no_grad():
        assert torch.equal(model(batch[0]), before)
    assert not torch.equal(inner[0], outer[0])  # the inner one left one site more out, and gave only that back
    assert not torch.equal(outer[0], before)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert model.training


def test_a_site_without_adapter_is_named(adapted) -> None:
    model = adapted("lora")
    with (
        pytest.raises(UserError, match=r"no adapter on blocks\.7\.mlp\.fc1") as caught,
        without_updates(model, ["blocks.0.mlp.fc1", "blocks.7.mlp.fc1"]),
    ):
        pytest.fail("nothing may be done without it")
    assert caught.value.field == "sites"


class Scripted(nn.Module):
    """Takes as long as a list says, by moving the clock on, and notes how it was called."""

    def __init__(self, seconds: list[float], clock: list[float]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.seconds = seconds
        self.clock = clock
        self.seen: set[tuple] = set()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.clock[0] += self.seconds.pop(0)
        logits = self.linear(images)
        self.seen.add((self.training, torch.is_inference_mode_enabled(), logits.dtype, len(images)))
        return logits


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.part("runner")
def test_it_is_the_median_of_twenty_passes_after_five(monkeypatch, precision, dtype) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    timed = [0.5, *[1.0] * 9, *[3.0] * 9, 1000.0]  # between the tenth and the eleventh: 2
    model = Scripted([7e5, 40.0, 0.25, 30.0, 20.0, *timed], clock).train()
    assert forward_s(model, torch.zeros(3, 4), precision=precision) == pytest.approx(2.0)
    assert model.seconds == []
    assert model.seen == {(False, True, dtype, 3)}
    assert model.training
