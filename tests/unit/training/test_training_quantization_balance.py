"""Rounding layer by layer, and the balance of adapters and error: against float64 NumPy; a target is held."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qa_lora_settings import SILENT, config, scheduled
from torch.nn import functional as F

from peft_vit import QALoRATrainer
from peft_vit.core.adapters import adapted_modules, merge_by_requantizing
from peft_vit.core.backbones import Backbone, ReplayedPass
from peft_vit.core.quantization import QuantizationFormat, quantize, quantize_with_compensation
from peft_vit.core.training.qa_lora import next_part
from peft_vit.core.training.quantized_layers import MEASURE_EVERY_STEPS, managed_pace, managed_scale, quantized_layers

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


def inputs_of(model, names, images) -> dict[str, np.ndarray]:
    """Return what layers get in a forward pass, (N, in) each."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen.update({name: double(given[0].flatten(0, -2))})
        )
        for name in names
    ]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.part("quantization")
@pytest.mark.parametrize("grouped", [True, False])
def test_measures_equal_numpy(tiny_vit, batch, fill_adapters, grouped) -> None:
    plain, model = tiny_vit(), tiny_vit()
    settings = {} if grouped else {"use_group_quantization": False, "group_size": 32}
    trainer = QALoRATrainer(model, config(quantization_type="int4", rank=2, **settings), 8)
    fill_adapters(model, std=0.02)
    measures = trainer.validate_quantization_adaptation_balance(model, reference=plain.state_dict(), images=batch[0])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    inputs, expected = inputs_of(model, dict(adapted_modules(model)), batch[0]), []
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
    alone = trainer.validate_quantization_adaptation_balance(model, reference=plain.state_dict())
    assert alone == {name: value for name, value in measures.items() if name != REMOVED[1]}  # it takes images


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


FORMAT = QuantizationFormat("nf4", 16, True, torch.float16)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(4))  # more than pass at once


@pytest.mark.part("quantization")
@pytest.mark.parametrize("settings", [{}, {"quantization_schedule": "linear"}], ids=["constant", "linear"])
@SILENT
def test_each_layer_is_rounded_on_what_the_quantized_ones_before_it_make_of_the_images(
    tiny_vit, images, settings
) -> None:
    plain, model = tiny_vit(), tiny_vit()
    trainer = QALoRATrainer(model, config(rounding="gptq", rank=2, **settings), 8, images=images)
    for name, (module, _) in quantized_layers(model).items():
        layer = plain.get_submodule(name)
        x = torch.from_numpy(inputs_of(plain, [name], images)[name])
        weight = layer.weight.detach().clone()
        expected = quantize_with_compensation(weight, FORMAT, 2 * x.T @ x)
        difference = (module.quantized.codes != expected.codes).float().mean()
        assert difference < 0.01, name  # products here are float32, and a weight may lie halfway
        layer.weight.data = module.quantized.dequantize()  # for the next one

        def output_error(quantized, x=x, weight=weight) -> float:
            return float((x @ (quantized.dequantize() - weight).double().T).norm())

        assert output_error(module.quantized) < output_error(quantize(weight, FORMAT)), name
    assert trainer.share == (0.0 if settings else 1.0)
    if settings:
        assert {module.quantized_share for _, module in adapted_modules(model)} == {0.0}


@SILENT
def test_a_replayed_pass_gives_what_a_plain_one_does(tiny_vit, images) -> None:
    model = tiny_vit().eval()
    replayed = ReplayedPass(Backbone(model), lambda: model(images))
    with torch.no_grad():
        for name in ("blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.attn.proj", "blocks.1.attn.proj", "head"):
            inputs = replayed.inputs(model.get_submodule(name))[0]
            expected = torch.from_numpy(inputs_of(model, [name], images)[name])
            torch.testing.assert_close(inputs.flatten(0, -2).double(), expected)
        with pytest.raises(LookupError):
            replayed.inputs(torch.nn.Linear(2, 2))


@SILENT
def test_the_same_images_give_the_same_codes_and_a_state_brings_its_own(tiny_vit, images) -> None:
    settings = scheduled(rounding="gptq", rank=2)
    first, second = tiny_vit(), tiny_vit()
    trainer, again = (QALoRATrainer(model, settings, 8, images=images) for model in (first, second))
    codes = {name: module.quantized.codes for name, module in adapted_modules(first)}
    assert all(torch.equal(module.quantized.codes, codes[name]) for name, module in adapted_modules(second))
    assert trainer.features_depend_on() == again.features_depend_on()

    third = tiny_vit()
    other = QALoRATrainer(third, settings, 8, images=images.flip(0) + 1)  # as if rounded on another machine
    assert any(not torch.equal(module.quantized.codes, codes[name]) for name, module in adapted_modules(third))
    assert trainer.features_depend_on() != other.features_depend_on()
    other.load_state_dict(trainer.state_dict(), third)
    assert all(torch.equal(module.quantized.codes, codes[name]) for name, module in adapted_modules(third))
    assert other.relative_error == trainer.relative_error
    assert other._error_norm == pytest.approx(trainer._error_norm)
    assert other.features_depend_on() == trainer.features_depend_on()


@SILENT
def test_a_probe_on_rows_with_one_scale_keeps_its_codes_when_merged(tiny_vit, images) -> None:
    model = tiny_vit()
    settings = config(rounding="gptq", use_group_quantization=False, group_size=32)
    no_ranks = dict.fromkeys((site.name for site in Backbone(model).sites), 0)
    QALoRATrainer(model, settings, 8, images=images, ranks=no_ranks)
    before = {name: module.quantized.codes for name, module in adapted_modules(model)}
    assert set(merge_by_requantizing(model).values()) == {0.0}
    assert all(torch.equal(module.quantized.codes, before[name]) for name, module in adapted_modules(model))
