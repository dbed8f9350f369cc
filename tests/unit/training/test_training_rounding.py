"""`rounding: gptq`: layer by layer on images, the same after a restart, and never without an effect."""

import pytest
import torch
from qa_lora_settings import SILENT, config, scheduled

from peft_vit import QALoRATrainer
from peft_vit.core.adapters import adapted_modules, merge_by_requantizing
from peft_vit.core.backbones import Backbone, ReplayedPass
from peft_vit.core.quantization import QuantizationFormat, quantize, quantize_with_compensation
from peft_vit.core.training.quantized_layers import quantized_layers

pytestmark = [pytest.mark.part("trainer"), SILENT]
FORMAT = QuantizationFormat("nf4", 16, True, torch.float16)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(4))  # more than pass at once


def inputs_of(model, name, images):
    """Return what a layer gets in a plain forward pass, (N, in)."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    return torch.cat(seen).flatten(0, -2).double()


@pytest.mark.part("quantization")
@pytest.mark.parametrize("settings", [{}, {"quantization_schedule": "linear"}], ids=["constant", "linear"])
def test_each_layer_is_rounded_on_what_the_quantized_ones_before_it_make_of_the_images(
    tiny_vit, images, settings
) -> None:
    plain, model = tiny_vit(), tiny_vit()
    trainer = QALoRATrainer(model, config(rounding="gptq", rank=2, **settings), 8, images=images)
    for name, (module, _) in quantized_layers(model).items():
        layer = plain.get_submodule(name)
        x = inputs_of(plain, name, images)
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


def test_a_replayed_pass_gives_what_a_plain_one_does(tiny_vit, images) -> None:
    model = tiny_vit().eval()
    replayed = ReplayedPass(Backbone(model), lambda: model(images))
    with torch.no_grad():
        for name in ("blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.attn.proj", "blocks.1.attn.proj", "head"):
            inputs = replayed.inputs(model.get_submodule(name))[0]
            expected = inputs_of(model, name, images)
            torch.testing.assert_close(inputs.flatten(0, -2).double(), expected)
        with pytest.raises(LookupError):
            replayed.inputs(torch.nn.Linear(2, 2))


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


def test_a_probe_on_rows_with_one_scale_keeps_its_codes_when_merged(tiny_vit, images) -> None:
    model = tiny_vit()
    settings = config(rounding="gptq", use_group_quantization=False, group_size=32)
    no_ranks = dict.fromkeys((site.name for site in Backbone(model).sites), 0)
    QALoRATrainer(model, settings, 8, images=images, ranks=no_ranks)
    before = {name: module.quantized.codes for name, module in adapted_modules(model)}
    assert set(merge_by_requantizing(model).values()) == {0.0}
    assert all(torch.equal(module.quantized.codes, before[name]) for name, module in adapted_modules(model))
