"""Scales in 8 bits against the formulas written out in float64 NumPy."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from peft_vit.quantization import QuantizationFormat, QuantizedTensor, quantize, relative_error
from peft_vit.quantization.formats import quantize_scales


def dynamic_type() -> np.ndarray:
    """Return the 256 values of the dynamic 8-bit type: 0, 1, and 2^i parts of the decade 10^(i - 7) to 10^(i - 6)."""
    middles = [10.0 ** (i - 6) * (0.1 + 0.9 * (part + 0.5) / 2**i) for i in range(7) for part in range(2**i)]
    return np.sort(np.concatenate([np.negative(middles), [0, 1], middles]))


def weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(90, 1, generator=generator) + 0.2  # so that scales differ by more than chance
    return 0.02 * spread * torch.randn(90, 128, generator=generator)


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


def test_stored_tensors_give_the_same_weights_and_parts_of_them() -> None:
    format = QuantizationFormat("nf3", 16, True, torch.float16, double_quant=True)
    quantized = quantize(weights(), format)
    again = QuantizedTensor.from_tensors(load(save(quantized.tensors())), (90, 128), format)
    assert torch.equal(again.dequantize(), quantized.dequantize())
    assert torch.equal(quantized.rows(slice(70, 80)).dequantize(), quantized.dequantize()[70:80])
    assert torch.equal(quantized.columns(slice(32, 96)).dequantize(), quantized.dequantize()[:, 32:96])
    moved = quantized.to("meta").tensors()
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}
    assert all(moved[name].shape == tensor.shape for name, tensor in quantized.tensors().items())


@pytest.mark.parametrize("type", ["int3", "int4", "nf3", "nf4"])
def test_scales_in_8_bits_lose_hardly_more(type) -> None:
    errors = [
        relative_error(weights(), quantize(weights(), QuantizationFormat(type, 32, False, torch.float16, double)))
        for double in (True, False)
    ]
    assert errors[0] < 1.01 * errors[1]
