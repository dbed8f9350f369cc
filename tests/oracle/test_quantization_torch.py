"""Integer formats against torch's own affine quantization, which takes our scales and offsets."""

import pytest
import torch

from peft_vit.core.quantization import QuantizationFormat, quantize


@pytest.mark.parametrize(("type", "bits"), [("int2", 2), ("int4", 4), ("int8", 8)])
@pytest.mark.parametrize("offset", [False, True])
def test_integers_equal_fake_quantization(type: str, bits: int, offset: bool) -> None:
    rows = torch.randn(256, 32, generator=torch.Generator().manual_seed(0)) * 0.02  # a group a row
    quantized = quantize(rows, QuantizationFormat(type, 32, offset))  # type: ignore[arg-type]
    scales, largest = quantized.scales.flatten(), 2 ** (bits - 1) - 1
    # torch computes (code - zero) * scale with a float zero; ours is scale * code + offset: zero = -offset / scale.
    zeros = -quantized.offsets.flatten() / scales if offset else torch.zeros(256, dtype=torch.int32)
    codes = (0, 2**bits - 1) if offset else (-largest, largest)
    expected = torch.fake_quantize_per_channel_affine(rows, scales, zeros, 0, *codes)
    close = {"rtol": 1e-4, "atol": 1e-7} if offset else {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(quantized.dequantize(), expected, **close)
