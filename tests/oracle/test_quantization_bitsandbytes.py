"""NF4 and FP4 against bitsandbytes on the CPU: the same codes, scales and values, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_vit.quantization import QuantizationFormat, code_values, quantize, unpack_codes
from peft_vit.quantization.formats import dynamic_values

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


def test_values_of_the_8_bit_type_of_scales() -> None:
    assert torch.equal(dynamic_values(), functional.create_dynamic_map())


@pytest.mark.parametrize(("rows", "scale"), [(48, 0.02), (7, 1.0), (1, 1e-6), (60, 1e20)])
@pytest.mark.parametrize("type", TYPES)
def test_double_quantization_keeps_the_same_scales(type: str, rows: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = scale * torch.randn(rows, 384, generator=generator) * torch.rand(rows, 1, generator=generator)
    _, state = functional.quantize_4bit(weight, blocksize=32, quant_type=type, compress_statistics=True)
    format = QuantizationFormat(type, 32, offset=False, double_quant=True)  # type: ignore[arg-type]
    quantized = quantize(weight, format)
    tensors = quantized.tensors()
    assert torch.equal(tensors["scale_blocks"], state.state2.absmax)
    assert torch.equal(tensors["scale_mean"][0], state.offset)
    theirs = (functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).flatten().clamp(min=0)
    ours, codes = quantized.scales.flatten(), tensors["scales"].flatten()
    # Their kernel's search takes the second nearest code about once in a thousand.
    differ = codes != state.absmax.flatten()
    assert differ.sum() <= 0.002 * len(codes)
    assert torch.equal(ours[~differ], theirs[~differ])
    exact = weight.view(-1, 32).abs().amax(1)
    assert ((ours - exact).abs() <= (theirs - exact).abs()).all()


@pytest.mark.parametrize("type", TYPES)
def test_codes_against_the_stored_scales_lose_no_more_than_theirs(type: str) -> None:
    # bitsandbytes chooses codes before it rounds the scales.
    weight = 0.02 * torch.randn(96, 384, generator=torch.Generator().manual_seed(0))
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, None, None, 32, True, type))
    ours = quantize(weight, QuantizationFormat(type, 32, offset=False, double_quant=True))  # type: ignore[arg-type]
    assert (
        (ours.dequantize() - weight).norm() <= (theirs - weight).norm() <= 1.001 * (ours.dequantize() - weight).norm()
    )
