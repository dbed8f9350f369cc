"""The balance measures against float64 NumPy; references that are not this model's are refused; a target is held."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qa_lora_settings import config, scheduled
from torch.nn import functional as F

from peft_vit import QALoRATrainer
from peft_vit.core.adapters import adapted_modules
from peft_vit.core.training.qa_lora import next_part
from peft_vit.core.training.quantized_layers import MEASURE_EVERY_STEPS, managed_pace, managed_scale

pytestmark = pytest.mark.part("trainer")
REMOVED = ("error_removed_in_weights", "error_removed_in_outputs")


def double(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def update_of(module, pool: int) -> np.ndarray:
    delta = np.zeros((module.out_features, module.in_features))
    for site, adapter in module.adapters():
        grouped = adapter.scale * double(adapter.lora_B) @ double(adapter.lora_A)
        delta[site.span] = np.repeat(grouped, pool, axis=1)
    return delta


def inputs_of(model, images) -> dict[str, np.ndarray]:
    seen = {}
    handles = [
        module.register_forward_hook(
            lambda module, x, y, name=name: seen.update({name: double(x[0]).reshape(-1, x[0].shape[-1])})
        )
        for name, module in adapted_modules(model)
    ]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    model.train()
    return seen


@pytest.mark.part("quantization")
@pytest.mark.parametrize("grouped", [True, False])
def test_measures_equal_numpy(tiny_vit, batch, fill_adapters, grouped) -> None:
    plain, model = tiny_vit(), tiny_vit()
    settings = {} if grouped else {"use_group_quantization": False, "group_size": 32}
    trainer = QALoRATrainer(model, config(quantization_type="int4", rank=2, **settings), 8)
    fill_adapters(model, std=0.02)
    measures = trainer.validate_quantization_adaptation_balance(model, reference=plain.state_dict(), images=batch[0])
    inputs, expected = inputs_of(model, batch[0]), []
    for name, module in adapted_modules(model):
        weight = double(plain.get_submodule(name).weight)
        error, delta = weight - double(module.quantized.dequantize()), update_of(module, 16 if grouped else 1)
        x = inputs[name]
        energy = np.sum(error**2)
        expected.append(
            (
                np.sqrt(energy / np.sum(weight**2)),
                10 * np.log10(np.sum(weight**2) / energy),
                np.sqrt(np.sum(delta**2) / energy),
                1.0,
                1 - np.sum((error - delta) ** 2) / energy,
                1 - np.sum((x @ (error - delta).T) ** 2) / np.sum((x @ error.T) ** 2),
            )
        )
    assert len(expected) == 8
    names = ("relative_quantization_error", "signal_to_noise_db", "adapter_to_error_ratio", "quantized_share", *REMOVED)
    assert measures == pytest.approx(dict(zip(names, np.mean(expected, axis=0), strict=True)), rel=2e-4)
    exported = trainer.export_quantization_data()
    assert json.loads(json.dumps(exported)) == exported
    assert exported["balance"] == [{"step": 0, **measures}]
    errors = dict(zip((name for name, _ in adapted_modules(model)), (row[0] for row in expected), strict=True))
    assert exported["relative_error"] == pytest.approx(errors, rel=1e-4)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_during_the_schedule_the_float_weights_are_at_hand(tiny_vit, batch, fill_adapters) -> None:
    plain, model = tiny_vit(), tiny_vit()
    trainer = QALoRATrainer(model, scheduled(rank=2, quantization_warmup_steps=0), 8)
    fill_adapters(model, std=0.01)
    trainer.after_step(model, torch.optim.SGD(model.head.parameters(), 0.1), 1)
    own = trainer.validate_quantization_adaptation_balance(model, images=batch[0])
    given = trainer.validate_quantization_adaptation_balance(model, reference=plain.state_dict(), images=batch[0])
    assert own == given
    assert own["error_removed_in_outputs"] < 0  # random updates far above the error of int8


# --- a target -------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1e6), st.floats(1e-3, 1e3), st.floats(0, 1), st.integers(1, 60), st.lists(st.floats(0, 1e6)))
def test_scale_and_pace_are_bounded_and_a_managed_schedule_ends_at_exactly_one(
    ratio, target, share, steps, ratios
) -> None:
    assert 1 / 16 <= managed_scale(ratio, target) <= 4
    assert 0.5 <= managed_pace(ratio, target, share) <= 1.5
    part, parts = 0.0, []
    for step in range(1, steps + 1):
        pace = managed_pace(ratios[step % len(ratios)], target, part) if ratios else 1.0
        part = next_part(part, steps - step + 1, pace)
        parts.append(part)
    assert parts == sorted(parts)
    assert parts[-1] == 1.0
    assert all(0 < part < 1 for part in parts[:-1])


def test_scale_and_pace_follow_the_ratio() -> None:
    assert [managed_scale(ratio, 0.5) for ratio in (0, 0.25, 0.375, 0.5, 100)] == [4, 2, 1, 1 / 16, 1 / 16]
    assert [managed_pace(ratio, 0.5, 0.5) for ratio in (0, 0.125, 0.25, 0.375, 1)] == [0.5, 0.75, 1, 1.25, 1.5]
    even = [next_part(step / 7, 7 - step, 1.0) for step in range(7)]
    np.testing.assert_allclose(even, np.arange(1, 8) / 7, atol=1e-12)


def run(make, batch, settings, *, steps: int = 48, optimizer_class=torch.optim.SGD, rate: float = 0.02):
    model = make()
    trainer = QALoRATrainer(model, settings, steps, clip_norm=None)
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], rate)
    for step in range(1, steps + 1):
        trainer.training_step(model, optimizer, F.cross_entropy(model(batch[0]), batch[1]), step)
    return model, trainer


@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0])
def test_the_ratio_ends_nearer_to_the_target_than_without(tiny_vit, batch, factor) -> None:
    model, trainer = run(tiny_vit, batch, config(rank=2))
    free = trainer.validate_quantization_adaptation_balance(model)["adapter_to_error_ratio"]
    target = factor * free
    model, trainer = run(tiny_vit, batch, config(rank=2, balance_target=target))
    held = trainer.validate_quantization_adaptation_balance(model)["adapter_to_error_ratio"]
    assert abs(held - target) < 0.7 * abs(free - target)
    rows = trainer.export_quantization_data()["balance"][:-1]
    assert [row["step"] for row in rows] == list(range(MEASURE_EVERY_STEPS, 49, MEASURE_EVERY_STEPS))
    for row in rows:
        assert row["gradient_scale"] == managed_scale(row["adapter_to_error_ratio"], target)


def test_the_pace_waits_for_small_adapters_and_does_not_for_large_ones(tiny_vit, batch) -> None:
    settings = {"rank": 2, "quantization_warmup_steps": 4, "quantization_end_step": 40}
    shares = {}
    for target in (None, 1e-4, 1e4):
        pace = {} if target is None else {"balance_target": target, "balance_by": "schedule_pace"}
        model, trainer = run(tiny_vit, batch, scheduled(**settings, **pace))
        shares[target] = [row["share"] for row in trainer.share_history]
        assert shares[target][:5] == [0.0] * 5
        assert all(share < 1 for share in shares[target][:40])
        assert set(shares[target][40:]) == {1.0}
        assert shares[target] == sorted(shares[target])
        assert all(module.weight is None for _, module in adapted_modules(model))
    slow, even, fast = (np.array(shares[target]) for target in (1e4, None, 1e-4))
    assert (slow <= even + 1e-4).all()
    assert (even <= fast + 1e-4).all()
    assert slow[30] < even[30] - 0.1 < fast[30] - 0.2
    paces = [row["schedule_pace"] for row in trainer.balance_history]
    assert 0.5 <= paces[-1] < 1.0
    assert trainer.balance_history[-1]["step"] == 36  # none once the schedule has ended
