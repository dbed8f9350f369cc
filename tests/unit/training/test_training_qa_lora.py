"""QALoRATrainer: the schedule ends at exactly 1, float weights are freed for real, adapters' gradients are scaled."""

import gc
import weakref
from functools import partial

import numpy as np
import pytest
import qa_lora_settings
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from peft_vit import QALoRATrainer
from peft_vit.core.adapters import adapted_modules, merged_state_dict
from peft_vit.core.adapters.footprint import frozen_bytes
from peft_vit.core.training.qa_lora import end_step, quantized_share

pytestmark = [pytest.mark.part("trainer"), qa_lora_settings.SILENT]
RATE = 0.1
config, linear = partial(qa_lora_settings.config, rank=2), partial(qa_lora_settings.scheduled, rank=2)


def sgd(model) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)


def do_step(model, trainer, optimizer, batch, step):
    return trainer.training_step(model, optimizer, F.cross_entropy(model(batch[0]), batch[1]), step)


@pytest.mark.part("quantization")
def test_schedules() -> None:
    steps = range(9)
    assert [quantized_share(config(), 8, step) for step in steps] == [1.0] * 9
    assert [quantized_share(linear(), 8, step) for step in steps] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    cosine = [quantized_share(linear(quantization_schedule="cosine"), 8, step) for step in steps]
    t = np.clip((np.arange(9) - 2) / 4, 0, 1)
    np.testing.assert_allclose(cosine, (1 - np.cos(np.pi * t)) / 2, atol=1e-12)
    assert cosine[6:] == [1.0, 1.0, 1.0]
    assert end_step(linear(quantization_warmup_steps=0, quantization_end_step=None), 48) == 32  # two thirds


@given(
    kind=st.sampled_from(["linear", "cosine"]),
    warmup=st.integers(0, 50),
    length=st.integers(1, 80),
    rest=st.integers(0, 50),
)
def test_every_schedule_rises_from_0_to_exactly_1(kind, warmup, length, rest) -> None:
    end = warmup + length
    settings = linear(quantization_schedule=kind, quantization_warmup_steps=warmup, quantization_end_step=end)
    shares = [quantized_share(settings, end + rest, step) for step in range(end + rest + 1)]
    assert shares == sorted(shares)
    assert set(shares[: warmup + 1]) == {0.0}
    assert set(shares[end:]) == {1.0}
    assert all(0 < share < 1 for share in shares[warmup + 1 : end])


@pytest.mark.part("quantization")
@pytest.mark.parametrize("grouped", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_float_weights_are_freed_at_share_one(tiny_vit, batch, grouped) -> None:
    model = tiny_vit()
    settings = linear(use_group_quantization=grouped, **({} if grouped else {"group_size": 32}))
    trainer = QALoRATrainer(model, settings, 8)
    optimizer = sgd(model)
    watched = [weakref.ref(module.weight) for _, module in adapted_modules(model)]
    weights = sum(module.weight.nbytes for _, module in adapted_modules(model))
    shares, sizes = [], []
    for step in range(1, 9):
        shares.append(do_step(model, trainer, optimizer, batch, step)["quantized_share"])
        gc.collect()
        assert all((reference() is None) == (step >= 6) for reference in watched)
        sizes.append(frozen_bytes(model))
    assert shares == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert sizes[4] - sizes[5] == weights
    packed = {name: module.quantized.bits_per_weight for name, module in adapted_modules(model)}
    overhead = {"qkv": 32 / 16, "fc2": 32 / 16} if grouped else {"qkv": 16 / 64, "fc2": 16 / 128}
    for name, bits in packed.items():
        if name.rpartition(".")[2] in overhead:
            assert bits == 8 + overhead[name.rpartition(".")[2]]
    assert trainer.bits_history == [
        {"step": 0, "bits_per_weight": {name: 32 + bits for name, bits in packed.items()}},
        {"step": 6, "bits_per_weight": packed},
    ]
    assert [trainer.deployable(step) for step in (5, 6, 8)] == [False, True, True]


@pytest.mark.part("quantization")
def test_a_constant_schedule_starts_quantized(tiny_vit, batch) -> None:
    plain, model = tiny_vit(), tiny_vit()
    trainer = QALoRATrainer(model, config(), 8)
    assert trainer.share == 1.0
    assert trainer.deployable(0)
    assert [row["step"] for row in trainer.bits_history] == [0]
    assert set(trainer.bits_history[0]["bits_per_weight"].values()) == {4 + 32 / 16}
    assert all(module.weight is None for _, module in adapted_modules(model))
    state = plain.state_dict()
    for name, module in adapted_modules(model):
        state[f"{name}.weight"] = module.quantized.dequantize()
    plain.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model(batch[0]), plain(batch[0]))  # untrained adapters add nothing


@pytest.mark.part("quantization")
def test_in_between_the_weights_are_mixed_and_merged_as_mixed(tiny_vit, batch, fill_adapters) -> None:
    plain, model = tiny_vit(), tiny_vit()
    trainer = QALoRATrainer(model, linear(quantization_bits=4, quantization_type="int4"), 8)
    optimizer = sgd(model)
    for step in range(1, 5):
        do_step(model, trainer, optimizer, batch, step)
    assert trainer.share == 0.5
    fill_adapters(model)
    name, module = next(adapted_modules(model))
    mixed = 0.5 * plain.get_submodule(name).weight + 0.5 * module.quantized.dequantize()
    torch.testing.assert_close(module.frozen_weight(), mixed.detach())
    plain.load_state_dict(merged_state_dict(model))
    with torch.no_grad():
        torch.testing.assert_close(model(batch[0]), plain(batch[0]), rtol=0, atol=1e-5)


def test_clipping_comes_after_scaling(tiny_vit, batch, fill_adapters) -> None:
    def step(clip_norm: float | None) -> tuple[float, dict[str, torch.Tensor]]:
        trainer = QALoRATrainer(model := tiny_vit(), config(gradient_scaling_factor=3.0), 8, clip_norm=clip_norm)
        fill_adapters(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        row = do_step(model, trainer, sgd(model), batch, 1)
        assert all(p.grad is None for p in model.parameters())
        return row["gradient_norm"], {name: model.get_parameter(name).detach() - p for name, p in before.items()}

    norm, moved = step(None)
    same_norm, clipped = step(norm / 7)
    assert same_norm == norm
    for name, change in clipped.items():
        torch.testing.assert_close(change, moved[name] / 7, rtol=1e-3, atol=1e-6)


def test_a_change_of_type_leaves_packed_weights_as_they_are(tiny_vit, batch) -> None:
    model = tiny_vit()
    QALoRATrainer(model, config(), 10)
    before = model(batch[0])
    assert torch.equal(model.float()(batch[0]), before)
    assert {m.quantized.scales.dtype for _, m in adapted_modules(model.bfloat16())} == {torch.float16}
