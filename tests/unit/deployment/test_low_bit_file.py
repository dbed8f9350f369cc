"""A low-bit file gives back the model that was kept in memory; what could not be one is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from exported_files import signed_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import CARD, random_model
from torch import nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import adapted_modules, attach_adapters
from peft_vit.core.backbones import find_sites
from peft_vit.core.quantization import QuantizationFormat, code_values, quantize
from peft_vit.deploy import load_low_bit, merge, save_low_bit
from peft_vit.deploy.formats.header import HEADER, Header
from peft_vit.deploy.formats.torch_files import LowBitHeader

GROUPED = [QuantizationFormat(kind, 16, True, torch.float16) for kind in ("int2", "int4", "int8", "nf4", "fp4", "int3")]
NO_OFFSETS = [QuantizationFormat("int4", 16, False, torch.float16)]
BY_ROW = [QuantizationFormat("int4", None, False, torch.float16), QuantizationFormat("nf4", None, False)]


@pytest.fixture
def quantized_vit(fill_adapters: Callable[[nn.Module], None]) -> Callable[[QuantizationFormat], nn.Module]:
    """Make timm's test_vit with every site quantized and adapted; updates are pooled over groups."""

    def make(format: QuantizationFormat) -> nn.Module:
        model = random_model("test_vit")
        attach_adapters(model, find_sites(model), 2, scale=1.5, seed=0, pool=format.group_size or 1)
        fill_adapters(model)
        for _, module in adapted_modules(model):
            assert module.weight is not None
            module.set_quantized(quantize(module.weight, format))
            module.drop_float()
        return model.eval()

    return make


@pytest.mark.parametrize("format", [*GROUPED, *NO_OFFSETS, *BY_ROW], ids=str)
def test_merging_keeps_the_logits_and_a_file_the_merged_model_to_the_bit(
    quantized_vit, batch, tmp_path, format
) -> None:
    trained, file = quantized_vit(format), tmp_path / "model.safetensors"
    merged = merge(trained, CARD)
    assert all(module.adapters() for _, module in adapted_modules(trained))  # the given model stays as it was
    if format.group_size is None:
        assert merged.how == "codes"
        assert 1e-3 < max(merged.errors.values()) < 1
    else:
        assert merged.how == "offsets"
        low, high = (0, 1e-6) if format.scale_dtype == torch.float32 else (1e-6, 5e-3)
        assert low < max(merged.errors.values()) <= high
    save_low_bit(merged.model, file, CARD)
    loaded, _ = load_low_bit(file)
    with torch.inference_mode():
        before, after, again = trained(batch[0]), merged.model(batch[0]), loaded(batch[0])
    assert torch.equal(again, after)
    assert format.group_size is None or (after - before).abs().max() <= 1e-2 * before.abs().max()
    for (_, here), (_, there) in zip(adapted_modules(merged.model), adapted_modules(loaded), strict=True):
        assert (there.weight, list(there.adapters())) == (None, [])
        assert here.quantized.format == there.quantized.format
        assert all(torch.equal(there.quantized.tensors()[part], t) for part, t in here.quantized.tensors().items())


def test_the_layout_is_the_documented_one(quantized_vit, tmp_path) -> None:
    """Read with nothing of this package but the codebook's values, the file holds the merged weights."""
    for format in (GROUPED[1], GROUPED[3], BY_ROW[0]):
        merged = merge(quantized_vit(format), CARD).model
        save_low_bit(merged, tmp_path / "model.safetensors", CARD)
        tensors = load_file(tmp_path / "model.safetensors")
        with safe_open(tmp_path / "model.safetensors", framework="np") as handle:
            header = json.loads(handle.metadata()["peft_vit_model"])
        assert header["card"]["class_names"] == ["a", "b", "c", "d", "e"]
        plain = timm.create_model(CARD.model, img_size=CARD.image_size, num_classes=5).state_dict()
        layers = header["layers"]
        assert set(plain) - set(tensors) == {f"{name}.weight" for name in layers}
        for name, module in adapted_modules(merged):
            layer = layers[name]
            out_features, in_features = layer["shape"]
            packed = tensors[f"{name}.weight.codes"].numpy()
            codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(
                out_features, -1, layer["group_size"] or in_features
            )
            if layer["type"] == "nf4":
                values = code_values("nf4").numpy().astype(np.float64)[codes]
            else:
                values = codes - (0.0 if layer["offset"] else 8.0)
            weight = values * tensors[f"{name}.weight.scales"].double().numpy()[..., None]
            if layer["offset"]:
                weight += tensors[f"{name}.weight.offsets"].double().numpy()[..., None]
            np.testing.assert_allclose(
                weight.reshape(out_features, in_features), module.merged_weight().numpy(), rtol=1e-5, atol=1e-6
            )


def test_what_could_not_be_read_again_is_not_written(quantized_vit, tmp_path) -> None:
    file = tmp_path / "model.safetensors"
    other = timm.create_model(CARD.model, img_size=48, num_classes=5)
    with pytest.raises(UserError, match="does not hold the tensors of test_vit"):
        save_low_bit(other, file, CARD)
    with pytest.raises(UserError, match="choose another place"):
        save_low_bit(merge(quantized_vit(GROUPED[0]), CARD).model, Path("/dev/null/model.safetensors"), CARD)
    assert not file.exists()


def test_other_files_are_named(tmp_path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="was not written by"):
        load_low_bit(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        load_low_bit(tmp_path / "nowhere.safetensors")


FLOATS = LowBitHeader(card=CARD, layers={})


def test_a_file_with_the_hash_of_another_is_refused(tmp_path) -> None:
    file, tensors = tmp_path / "model.safetensors", {"head.bias": torch.zeros(5, dtype=torch.bfloat16)}
    save_file(tensors, file, metadata={HEADER: FLOATS.model_dump_json()})
    with pytest.raises(UserError, match="was changed after it was written"):
        load_low_bit(file)


@pytest.mark.parametrize(
    "spoil",
    [
        torch.Tensor.double,
        torch.Tensor.half,
        torch.Tensor.bfloat16,  # which NumPy does not have
        torch.Tensor.int,
        lambda t: t * torch.nan,
        lambda t: t + torch.inf,
    ],
    ids=["double", "half", "bfloat16", "int", "nan", "inf"],
)
def test_tensors_that_a_model_could_not_compute_with_are_refused(tmp_path, spoil) -> None:
    tensors = timm.create_model(CARD.model, img_size=CARD.image_size, num_classes=5).state_dict()
    tensors["blocks.0.norm1.weight"] = spoil(tensors["blocks.0.norm1.weight"])
    signed_tensors(tmp_path / "model.safetensors", FLOATS, tensors)
    with pytest.raises(UserError) as refused:
        load_low_bit(tmp_path / "model.safetensors")
    assert refused.value.field == "blocks.0.norm1.weight"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 1 << 30),
        ("image_size", 0),
        ("std", [0.0, 1.0, 1.0]),
        ("std", [1e999, 1.0, 1.0]),
        ("mean", [float("nan")] * 3),
        ("class_names", []),
        ("channels", 2),
        ("surprise", 1),
    ],
)
def test_a_card_that_would_fill_the_memory_or_make_no_sense(tmp_path, field, value) -> None:
    data = {**CARD.model_dump(mode="json"), field: value}
    with pytest.raises(UserError) as refused:
        Header.read(json.dumps({"card": data}), tmp_path / "peft_vit.json", "safetensors")
    assert refused.value.field.split(".")[1] == field


@pytest.mark.parametrize(
    ("change", "fault"),
    [({"type": "nf3"}, r"type: input should be .* got 'nf3'"), ({"double_quant": True}, "double_quant: unknown key")],
)
def test_a_layer_in_a_format_of_an_earlier_version_is_refused(tmp_path, change, fault) -> None:
    layer = GROUPED[0].as_json() | {"shape": [4, 32]} | change
    header = {"card": CARD.model_dump(mode="json"), "layers": {"qkv": layer}}
    with pytest.raises(UserError, match=rf"model\.safetensors: layers\.qkv\.{fault}"):
        LowBitHeader.read(json.dumps(header), tmp_path / "model.safetensors", "safetensors")
