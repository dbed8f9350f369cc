"""NF4 and FP4 against bitsandbytes on the CPU: the same codes, scales and values, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_vit.core.quantization import QuantizationFormat, code_values, quantize, unpack_codes

functional = pytest.importorskip("bitsandbytes.functional")

TYPES = ("nf4", "fp4")


def assert_equal_to_bitsandbytes(weight: Tensor, type: str, group: int | None) -> None:
    rows, columns = weight.shape
    packed, state = functional.quantize_4bit(weight, blocksize=group or columns, quant_type=type)
    quantized = quantize(weight, QuantizationFormat(type, group, offset=False))  # type: ignore[arg-type]
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).view(rows, columns)
    assert torch.equal(unpack_codes(quantized.codes, 4, columns), theirs)
    assert torch.equal(quantized.scales.flatten(), state.absmax)
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(quantized.dequantize().to(expected.dtype), expected)


@pytest.mark.parametrize("type", TYPES)
def test_code_values(type: str) -> None:
    assert torch.equal(code_values(type), functional.get_4bit_type(type, device="cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("type", TYPES)
def test_weights_on_and_beside_every_decision_threshold(type: str) -> None:
    values = code_values(type).sort().values  # type: ignore[arg-type]
    thresholds = (values[:-1] + values[1:]) / 2
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    points = torch.cat([thresholds, thresholds.nextafter(up), thresholds.nextafter(down), values, -values])
    row = torch.nn.functional.pad(points, (0, -len(points) % 32)).view(-1, 32).contiguous()
    row[:, -1] = 1.0  # so that the group's scale is 1 and the points stay where they are
    assert_equal_to_bitsandbytes(row, type, 32)
    assert_equal_to_bitsandbytes(row * 0.3, type, 32)


@pytest.mark.parametrize("type", TYPES)
def test_zero_constant_tiny_and_outlying_groups(type: str) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    weight[1] = -0.0
    weight[2] = 0.37
    weight[3] = -5.0
    weight[4] *= 1e-30
    weight[5] *= 1e-40  # denormal
    weight[6, 7] = 1e30
    weight[7] = torch.linspace(-1, 1, 32)
    assert_equal_to_bitsandbytes(weight, type, 32)


@settings(max_examples=60)
@given(
    type=st.sampled_from(TYPES),
    group=st.sampled_from([32, 64, 128, 256, None]),
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    scale=st.sampled_from([1e-38, 1e-10, 0.02, 1.0, 1e20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    heavy_tails=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_weights(type, group, rows, groups, scale, dtype, heavy_tails, seed) -> None:
    weight = torch.randn(rows, groups * (group or 64), generator=torch.Generator().manual_seed(seed))
    if group is None:
        weight = weight[:, :64]
    if heavy_tails:
        weight = weight**3
    if dtype is not torch.float32:  # whose denormals they flush
        scale = min(max(scale, 0.02), 1.0)
    assert_equal_to_bitsandbytes((weight * scale).to(dtype).contiguous(), type, group)
