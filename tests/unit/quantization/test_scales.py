"""Scales in 8 bits against the formulas written out in float64 NumPy."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from peft_vit.errors import UserError
from peft_vit.quantization import (
    QuantizationFormat,
    QuantizedTensor,
    code_values,
    quantize,
    relative_error,
    unpack_codes,
)
from peft_vit.quantization.formats import QuantizedScales, quantize_scales


def dynamic_type() -> np.ndarray:
    """Return the 256 values of the dynamic 8-bit type: 0, 1, and 2^i parts of the decade 10^(i - 7) to 10^(i - 6)."""
    middles = [10.0 ** (i - 6) * (0.1 + 0.9 * (part + 0.5) / 2**i) for i in range(7) for part in range(2**i)]
    return np.sort(np.concatenate([np.negative(middles), [0, 1], middles]))


def weights(rows: int = 90, columns: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(rows, 1, generator=generator) + 0.2  # so that scales differ by more than chance
    return 0.02 * spread * torch.randn(rows, columns, generator=generator)


def scales_of(quantized: QuantizedTensor) -> QuantizedScales:
    assert isinstance(quantized.stored_scales, QuantizedScales)
    return quantized.stored_scales


@pytest.mark.part("quantization")
@pytest.mark.parametrize("shape", [(90, 4), (1, 1), (3, 100), (16, 16)])
def test_scales_follow_the_formula(shape) -> None:
    exact = 0.2 + torch.rand(shape, generator=torch.Generator().manual_seed(1)) ** 2
    found = quantize_scales(exact)
    flat = exact.double().numpy().ravel()
    rest = flat - flat.mean()
    largest = [np.abs(rest[start : start + 256]).max() for start in range(0, len(rest), 256)]
    np.testing.assert_allclose(found.mean.numpy(), [flat.mean()], rtol=1e-6)
    np.testing.assert_allclose(found.blocks.numpy(), largest, rtol=1e-5, atol=1e-7)
    largest = np.repeat(largest, 256)[: len(rest)]
    values = dynamic_type()
    nearest = np.abs(values[:, None] * largest - rest).min(0)
    stored = found.dequantize().double().numpy().ravel()
    np.testing.assert_allclose(np.abs(stored - flat), nearest, atol=1e-6)
    np.testing.assert_allclose(stored, flat.mean() + largest * values[found.codes.numpy().ravel()], atol=1e-6)
    assert nearest.max() <= 0.0071 * largest.max()


def test_no_scale_is_negative_or_infinite_and_equal_ones_are_exact() -> None:
    one_large = torch.zeros(4, 64)
    one_large[0, 0] = 65504.0
    found = quantize_scales(one_large.half()).dequantize()
    assert found.dtype is torch.float16
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert torch.equal(quantize_scales(torch.full((4, 64), 0.37)).dequantize(), torch.full((4, 64), 0.37))


@pytest.mark.part("quantization")
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("type", ["int3", "int4", "nf3", "nf4"])
def test_codes_are_the_nearest_under_the_stored_scales(type, offset) -> None:
    format = QuantizationFormat(type, 32, offset, torch.float16, double_quant=True)
    weight = weights()
    quantized = quantize(weight, format)
    groups = weight.double().numpy().reshape(90, 4, 32)
    scales = scales_of(quantized).dequantize().double().numpy()[..., None]
    offsets = 0 if quantized.offsets is None else quantized.offsets.double().numpy()[..., None]
    if format.has_codebook:
        values = code_values(type).double().numpy()
    else:
        values = np.arange(2**format.bits) if offset else np.arange(1, 2**format.bits) - 2 ** (format.bits - 1)
    levels = scales[..., None] * values + np.expand_dims(offsets, -1)  # (out, groups, 1, values)
    nearest = np.abs(groups[..., None] - levels).min(-1)
    found = quantized.dequantize().double().numpy().reshape(groups.shape)
    np.testing.assert_allclose(np.abs(found - groups), nearest, atol=1e-8)
    codes = unpack_codes(quantized.codes, format.bits, 128).numpy().reshape(groups.shape)
    first = 0 if offset or format.has_codebook else 1
    np.testing.assert_allclose(found, np.take(values, codes - first) * scales + offsets, atol=1e-8)
    plain = QuantizationFormat(type, 32, offset, torch.float16)
    assert relative_error(weight, quantized) < 1.01 * relative_error(weight, quantize(weight, plain))


@pytest.mark.parametrize(("type", "most"), [("nf4", 4.3), ("int4", 4.3), ("nf3", 3.3), ("int3", 3.3)])
def test_groups_of_32_take_a_quarter_of_a_bit(type, most) -> None:
    quantized = quantize(weights(384, 384), QuantizationFormat(type, 32, False, torch.float16, double_quant=True))
    groups = 384 * 12
    codes = 384 * 384 * quantized.format.bits // 8
    assert quantized.nbytes == codes + groups + 4 * groups // 256 + 4
    assert quantized.bits_per_weight < most


def test_stored_tensors_give_the_same_weights_and_parts_of_them() -> None:
    format = QuantizationFormat("nf3", 16, True, torch.float16, double_quant=True)
    quantized = quantize(weights(), format)
    again = QuantizedTensor.from_tensors(load(save(quantized.tensors())), (90, 128), format)
    assert torch.equal(again.dequantize(), quantized.dequantize())
    assert torch.equal(quantized.rows(slice(70, 80)).dequantize(), quantized.dequantize()[70:80])
    assert torch.equal(quantized.columns(slice(32, 96)).dequantize(), quantized.dequantize()[:, 32:96])
    moved = quantized.to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: {"scales": t["scales"].half()}, r"^scales: expected torch\.uint8"),
        (lambda t: {"scale_blocks": t["scale_blocks"][:-1]}, r"^scale_blocks: expected torch\.float32 of shape \(2,\)"),
        (lambda t: {"scale_blocks": -t["scale_blocks"]}, "^scale_blocks: expected no negative scale"),
        (lambda t: {"scale_mean": t["scale_mean"] * torch.nan}, "^scale_mean: expected finite numbers"),
        (lambda t: {"offsets": t["scales"]}, "^expected the tensors codes, scales, scale_blocks, scale_mean, got"),
    ],
)
def test_damaged_scales_are_refused(damage, message) -> None:
    format = QuantizationFormat("int4", 32, False, torch.float16, double_quant=True)
    tensors = quantize(weights(), format).tensors()
    with pytest.raises(UserError, match=message):
        QuantizedTensor.from_tensors(tensors | damage(tensors), (90, 128), format)
