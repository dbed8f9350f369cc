"""Integer formats against torch's own affine quantization, which takes our scales and offsets."""

import pytest
import torch
from torch import Tensor

from peft_vit.quantization import QuantizationFormat, quantize, unpack_codes

GROUP = 32


def weight_in_groups() -> tuple[Tensor, Tensor]:
    """Return (out, in) weights, and the same with a group a row."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    return weight, weight.view(-1, GROUP)


@pytest.mark.parametrize(("type", "bits"), [("int2", 2), ("int4", 4), ("int8", 8)])
def test_symmetric_integers_equal_fake_quantization(type: str, bits: int) -> None:
    weight, rows = weight_in_groups()
    quantized = quantize(weight, QuantizationFormat(type, GROUP, offset=False))  # type: ignore[arg-type]
    largest = 2 ** (bits - 1) - 1
    scales = quantized.scales.flatten()
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(rows, scales, zeros, 0, -largest, largest)
    torch.testing.assert_close(quantized.dequantize().view(-1, GROUP), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("type", "bits"), [("int2", 2), ("int4", 4), ("int8", 8)])
def test_integers_with_offset_equal_fake_quantization(type: str, bits: int) -> None:
    # torch computes (code - zero) * scale with a float zero; ours is scale * code + offset: zero = -offset / scale.
    weight, rows = weight_in_groups()
    quantized = quantize(weight, QuantizationFormat(type, GROUP, offset=True))  # type: ignore[arg-type]
    assert quantized.offsets is not None
    scales = quantized.scales.flatten()
    zeros = -quantized.offsets.flatten() / scales
    expected = torch.fake_quantize_per_channel_affine(rows, scales, zeros, 0, 0, 2**bits - 1)
    torch.testing.assert_close(quantized.dequantize().view(-1, GROUP), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_int8_codes_equal_quantize_per_channel() -> None:
    weight, rows = weight_in_groups()
    quantized = quantize(weight, QuantizationFormat("int8", GROUP, offset=False))
    scales = quantized.scales.flatten().double()
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    theirs = torch.quantize_per_channel(rows, scales, zeros, 0, torch.qint8).int_repr()
    ours = unpack_codes(quantized.codes, 8, 128).view(-1, GROUP).int() - 128
    assert torch.equal(ours, theirs.int())
