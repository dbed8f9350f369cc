"""Codes, scales and offsets against the formulas written out in float64 NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from quantization_strategies import CODEBOOKS, INTEGERS, formats_and_weights
from torch import Tensor

from peft_vit.errors import UnderflowWarning, UserError
from peft_vit.quantization import (
    QuantizationFormat,
    QuantizedTensor,
    code_values,
    quantize,
    relative_error,
    tensor,
    unpack_codes,
)

pytestmark = pytest.mark.filterwarnings("ignore::peft_vit.errors.UnderflowWarning")  # tiny weights are drawn

FormatAndWeights = tuple[QuantizationFormat, Tensor]


def codes_of(quantized: QuantizedTensor) -> np.ndarray:
    """Return the codes as (out, groups, group size) integers."""
    rows, columns = quantized.shape
    codes = unpack_codes(quantized.codes, quantized.format.bits, columns)
    return codes.numpy().astype(np.int64).reshape(rows, quantized.scales.shape[1], -1)


def in_groups(weight: Tensor, quantized: QuantizedTensor) -> np.ndarray:
    return weight.numpy().astype(np.float64).reshape(*quantized.scales.shape, -1)


def assert_rounded_outwards(actual: Tensor, exact: np.ndarray, direction: float) -> None:
    """Assert that each number is the nearest in its dtype that is not inside the exact one."""
    stored = actual.numpy()
    with np.errstate(over="ignore"):
        inwards = np.nextafter(stored, np.array(-direction, stored.dtype)).astype(np.float64)
    outside = stored.astype(np.float64)
    if direction > 0:
        assert (outside >= exact).all()
        assert (inwards < exact).all()
    else:
        assert (outside <= exact).all()
        assert (inwards > exact).all()


@settings(max_examples=150)
@given(formats_and_weights(INTEGERS, offset=True))
def test_integers_with_offset_follow_the_formula(case: FormatAndWeights) -> None:
    format, weight = case
    quantized = quantize(weight, format)
    assert quantized.offsets is not None
    groups = in_groups(weight, quantized)
    largest_code = 2**format.bits - 1
    assert_rounded_outwards(quantized.offsets, groups.min(-1), -np.inf)
    offsets = quantized.offsets.numpy().astype(np.float64)
    assert_rounded_outwards(quantized.scales, (groups.max(-1) - offsets) / largest_code, np.inf)
    scales = quantized.scales.numpy().astype(np.float64)[..., None]
    with np.errstate(invalid="ignore"):
        expected = np.where(scales > 0, np.rint((groups - offsets[..., None]) / scales), 0)
    np.testing.assert_array_equal(codes_of(quantized), expected)
    assert expected.min() >= 0
    assert expected.max() <= largest_code, "no weight is clipped"


@settings(max_examples=150)
@given(formats_and_weights(INTEGERS, offset=False))
def test_symmetric_integers_follow_the_formula(case: FormatAndWeights) -> None:
    format, weight = case
    quantized = quantize(weight, format)
    groups = in_groups(weight, quantized)
    largest_code, bias = 2 ** (format.bits - 1) - 1, 2 ** (format.bits - 1)
    assert quantized.offsets is None
    assert_rounded_outwards(quantized.scales, np.abs(groups).max(-1) / largest_code, np.inf)
    scales = quantized.scales.numpy().astype(np.float64)[..., None]
    with np.errstate(invalid="ignore"):
        expected = np.where(scales > 0, np.rint(groups / scales), 0)
    np.testing.assert_array_equal(codes_of(quantized) - bias, expected)
    assert np.abs(expected).max() <= largest_code, "no weight is clipped"


@pytest.mark.parametrize("type", CODEBOOKS)
def test_an_offset_starts_at_zero_and_leaves_codebook_codes_alone(type: str) -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    plain = quantize(weight, QuantizationFormat(type, 16, offset=False))  # type: ignore[arg-type]
    with_offset = quantize(weight, QuantizationFormat(type, 16, offset=True))  # type: ignore[arg-type]
    assert with_offset.offsets is not None
    assert not with_offset.offsets.any()
    assert torch.equal(with_offset.codes, plain.codes)
    assert torch.equal(with_offset.scales, plain.scales)
    assert torch.equal(with_offset.dequantize(), plain.dequantize())


@settings(max_examples=300)
@given(formats_and_weights())
def test_error_is_at_most_half_the_gap_around_the_weight(case: FormatAndWeights) -> None:
    format, weight = case
    quantized = quantize(weight, format)
    scales = quantized.scales.numpy().astype(np.float64)[..., None]
    offsets = np.zeros_like(scales)
    if quantized.offsets is not None:
        offsets = quantized.offsets.numpy().astype(np.float64)[..., None]
    groups = in_groups(weight, quantized)
    if format.has_codebook:
        assert_rounded_outwards(quantized.scales, np.abs(groups).max(-1), np.inf)
        values = np.unique(code_values(format.type).numpy().astype(np.float64))  # type: ignore[arg-type]
    elif format.offset:
        values = np.arange(2.0**format.bits)
    else:
        values = np.arange(1.0 - 2 ** (format.bits - 1), 2.0 ** (format.bits - 1))
    levels = offsets[..., None] + scales[..., None] * values  # (out, groups, 1, levels)
    above = np.clip((levels <= groups[..., None]).sum(-1), 1, len(values) - 1)
    half_gap = np.diff(values)[above - 1] / 2 * scales
    rounding = 2.0**-21 * (np.abs(values).max() * scales + np.abs(offsets)) + 1.2e-38
    error = np.abs(in_groups(quantized.dequantize(), quantized) - groups)
    assert np.isfinite(error).all()
    assert (error <= half_gap + rounding).all()


def strong_groups(quantized: QuantizedTensor) -> Tensor:
    """Return which groups have a normal scale: a denormal one is too coarse to come out twice."""
    return quantized.scales >= torch.finfo(quantized.scales.dtype).tiny


@settings(max_examples=150)
@given(formats_and_weights(("nf4", "fp4")))
def test_quantizing_codebook_values_again_changes_nothing(case: FormatAndWeights) -> None:
    format, weight = case
    once = quantize(weight, format)
    again = quantize(once.dequantize(), format)
    strong = strong_groups(once)
    assert torch.equal(again.scales[strong], once.scales[strong])
    rows = (*once.scales.shape, -1)
    assert torch.equal(again.dequantize().view(rows)[strong], once.dequantize().view(rows)[strong])


@settings(max_examples=150)
@given(formats_and_weights(INTEGERS))
def test_quantizing_integers_again_changes_nothing_but_rounding(case: FormatAndWeights) -> None:
    format, weight = case
    # A float16 offset or scale may come out as its neighbour, if the first rounding has moved the group's ends.
    assume(format.scale_dtype is torch.float32 or not format.offset)
    once = quantize(weight / 2, format)  # the outward rounding must not carry it past the limit
    again = quantize(once.dequantize(), format)
    strong = strong_groups(once)
    rows = (*once.scales.shape, -1)
    values = once.dequantize().view(rows)[strong]
    moved = (again.dequantize().view(rows)[strong] - values).abs()
    rounding = 0.0 if format.scale_dtype is torch.float16 else 2.0**-20
    assert (moved <= rounding * values.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("type", INTEGERS)
def test_constant_rows_with_offset_are_exact(type: str) -> None:
    weight = torch.tensor([[0.1] * 8, [0.0] * 8, [-3e7] * 8])
    quantized = quantize(weight, QuantizationFormat(type, 4, offset=True))  # type: ignore[arg-type]
    assert not quantized.scales.any()
    assert not quantized.codes.any()
    assert torch.equal(quantized.dequantize(), weight)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 2.0**126])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.zeros(2, 4)
    weight[1, 2] = bad
    with pytest.raises(UserError, match=r"infinities, NaN"):
        quantize(weight, QuantizationFormat("int4", 2, offset=True))


@pytest.mark.parametrize(
    ("type", "offset", "weight"), [("nf4", False, 65505.0), ("int8", True, -7e4), ("int4", True, 7e4)]
)
def test_what_float16_cannot_hold_is_refused(type: str, offset: bool, weight: float) -> None:
    format = QuantizationFormat(type, None, offset, torch.float16)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^scale_dtype: .* exceeds the largest torch\.float16, 65504"):
        quantize(torch.full((1, 4), weight), format)


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(0, 4), torch.zeros(2, 2, dtype=torch.int32)])
def test_what_is_no_matrix_of_floats_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a matrix of floats"):
        quantize(weight, QuantizationFormat("int4", None, offset=False))


def test_parameters_and_transposed_and_bfloat16_weights_are_taken() -> None:
    format = QuantizationFormat("int4", 4, offset=True)
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = quantize(weight.t().contiguous().float(), format)
    quantized = quantize(torch.nn.Parameter(weight.t()), format)
    assert torch.equal(quantized.codes, expected.codes)
    assert not quantized.dequantize().requires_grad


@pytest.mark.parametrize("type", ["nf4", "int3", "int8"])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("at_once", [1, 100, 128 * 7])
def test_rows_pass_some_at_a_time(type, offset, at_once, monkeypatch) -> None:
    weight = torch.randn(37, 128, generator=torch.Generator().manual_seed(0))
    format = QuantizationFormat(type=type, group_size=16, offset=offset, scale_dtype=torch.float16)
    monkeypatch.setattr(tensor, "_AT_ONCE", weight.numel())
    whole = quantize(weight, format)
    error = relative_error(weight, whole)
    monkeypatch.setattr(tensor, "_AT_ONCE", at_once)
    in_parts = quantize(weight, format)
    for name, one in whole.tensors().items():
        assert torch.equal(one, in_parts.tensors()[name])
    exact = (weight.double() - whole.dequantize().double()).norm() / weight.double().norm()
    assert relative_error(weight, whole) == pytest.approx(error, rel=1e-14) == pytest.approx(float(exact), rel=1e-14)
    assert torch.equal(whole.rows(slice(3, 9)).dequantize(), whole.dequantize()[3:9])


def test_one_bad_row_is_found_and_all_groups_are_counted(monkeypatch) -> None:
    monkeypatch.setattr(tensor, "_AT_ONCE", 1)
    format = QuantizationFormat(type="nf4", group_size=16, offset=False, scale_dtype=torch.float16)
    weight = torch.full((6, 32), 1e-8)
    with pytest.warns(UnderflowWarning, match="12 of 12 groups"):
        quantize(weight, format)
    weight[4, 5] = float("nan")
    with pytest.raises(UserError, match="infinities, NaN"):
        quantize(weight, format)
