"""Codes, scales and offsets against the formulas written out in float64 NumPy, and against GPTQ's algorithm 1."""

import numpy as np
import pytest
import torch
from covering_pairs import covering_pairs
from hypothesis import given, settings
from quantization_strategies import codes_of, formats_and_weights, in_groups, levels_of
from torch import Tensor

from peft_vit.base.errors import UnderflowWarning, UserError
from peft_vit.core.quantization import (
    QuantizationFormat,
    quantize,
    quantize_with_compensation,
    relative_error,
    tensor,
    unpack_codes,
)

pytestmark = [
    pytest.mark.part("quantization"),
    pytest.mark.filterwarnings("ignore::peft_vit.base.errors.UnderflowWarning"),  # tiny weights are drawn
]

FormatAndWeights = tuple[QuantizationFormat, Tensor]


def assert_rounded_outwards(actual: Tensor, exact: np.ndarray, sign: int) -> None:
    """Assert that each number is the nearest in its dtype that is not inside the exact one."""
    stored = sign * actual.numpy()
    with np.errstate(over="ignore"):
        inwards = np.nextafter(stored, np.array(-np.inf, stored.dtype)).astype(np.float64)
    assert (stored.astype(np.float64) >= sign * exact).all()
    assert (inwards < sign * exact).all()


@settings(max_examples=200)
@given(formats_and_weights())
def test_scales_and_offsets_are_the_least_that_hold_a_group(case: FormatAndWeights) -> None:
    format, weight = case
    quantized = quantize(weight, format)
    groups = in_groups(weight, quantized)
    if format.has_codebook or not format.offset:
        steps = 1 if format.has_codebook else 2 ** (format.bits - 1) - 1
        assert_rounded_outwards(quantized.scales, np.abs(groups).max(-1) / steps, 1)
        assert quantized.offsets is None or not quantized.offsets.any()
    else:
        assert_rounded_outwards(quantized.offsets, groups.min(-1), -1)
        offsets = quantized.offsets.double().numpy()
        assert_rounded_outwards(quantized.scales, (groups.max(-1) - offsets) / (2**format.bits - 1), 1)


@settings(max_examples=200)
@given(formats_and_weights())
def test_codes_are_the_nearest_and_dequantize_to_the_formula(case: FormatAndWeights) -> None:
    format, weight = case
    quantized = quantize(weight, format)
    levels, groups = levels_of(quantized), in_groups(weight, quantized)
    rounding = 2.0**-21 * np.abs(np.where(np.isinf(levels), 0, levels)).max(-1, keepdims=True) + 1.2e-38
    if quantized.offsets is not None:
        rounding = rounding + 2.0**-21 * quantized.offsets.double().abs().numpy()[..., None]
    codes = codes_of(quantized)
    chosen = np.take_along_axis(levels, codes, -1)
    nearest = np.abs(levels[:, :, None] - groups[..., None]).min(-1)
    assert (np.abs(chosen - groups) <= nearest + rounding).all()
    assert (np.abs(in_groups(quantized.dequantize(), quantized) - chosen) <= rounding).all()
    if not format.has_codebook:  # in float64, halves to even
        lowest, bias = (levels[..., :1], 0) if format.offset else (0, 2 ** (format.bits - 1))
        scales = quantized.scales.double().numpy()[..., None]
        with np.errstate(invalid="ignore"):
            expected = np.where(scales > 0, np.rint((groups - lowest) / scales), 0)
        np.testing.assert_array_equal(codes - bias, expected)


@settings(max_examples=150)
@given(formats_and_weights(("nf4", "fp4")))
def test_quantizing_codebook_values_again_changes_nothing(case: FormatAndWeights) -> None:
    format, weight = case
    once = quantize(weight, format)
    again = quantize(once.dequantize(), format)
    normal = once.scales >= torch.finfo(once.scales.dtype).tiny  # a denormal one is too coarse to come out twice
    assert torch.equal(again.scales[normal], once.scales[normal])
    rows = (*once.scales.shape, -1)
    assert torch.equal(again.dequantize().view(rows)[normal], once.dequantize().view(rows)[normal])


def test_parameters_and_transposed_and_bfloat16_weights_are_taken() -> None:
    format = QuantizationFormat("int4", 4, offset=True)
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = quantize(weight.t().contiguous().float(), format)
    quantized = quantize(torch.nn.Parameter(weight.t()), format)
    assert torch.equal(quantized.codes, expected.codes)
    assert not quantized.dequantize().requires_grad


@pytest.mark.parametrize(
    ("type", "offset", "at_once"), covering_pairs(["nf4", "int3", "int8"], [False, True], [1, 100, 128 * 7])
)
def test_rows_pass_some_at_a_time(type, offset, at_once, monkeypatch) -> None:
    weight = torch.randn(37, 128, generator=torch.Generator().manual_seed(0))
    format = QuantizationFormat(type=type, group_size=16, offset=offset, scale_dtype=torch.float16)
    monkeypatch.setattr(tensor, "_AT_ONCE", weight.numel())
    whole = quantize(weight, format)
    error = relative_error(weight, whole)
    monkeypatch.setattr(tensor, "_AT_ONCE", at_once)
    in_parts = quantize(weight, format).tensors()
    assert all(torch.equal(part, in_parts[name]) for name, part in whole.tensors().items())
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


FORMATS = [
    QuantizationFormat("int2", 16, True, torch.float16),
    QuantizationFormat("int2", None, False),
    QuantizationFormat("int4", 16, True),
    QuantizationFormat("int4", 48, False, torch.float16),
    QuantizationFormat("int8", 16, True),
    QuantizationFormat("int3", 16, True, torch.float16),
    QuantizationFormat("nf4", 16, False, torch.float16),
    QuantizationFormat("nf4", 16, True),
    QuantizationFormat("fp4", None, False),
]


def layer(inputs: int = 144, outputs: int = 20, rows: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight (out, in), and inputs (N, in) that hang together as a layer's do; 144 is more than a block."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, inputs)) @ rng.normal(size=(inputs, inputs)) * rng.gamma(1, size=inputs)
    return torch.tensor(rng.normal(size=(outputs, inputs)), dtype=torch.float32), torch.tensor(mixed)


def by_elimination(weight: np.ndarray, x: np.ndarray, format: QuantizationFormat) -> np.ndarray:
    """Return the rounded weights: H^-1 of the columns that are left is updated after each one, eq. 2 and 3."""
    levels = levels_of(quantize(torch.tensor(weight), format))  # (out, groups, codes)
    size = weight.shape[1] // levels.shape[1]
    hessian = 2 * x.T @ x
    inverse = np.linalg.inv(hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian)))
    rest, result = weight.astype(float), np.empty(weight.shape)
    for q in range(weight.shape[1]):
        for row in range(len(weight)):
            choices = levels[row, q // size]
            result[row, q] = choices[np.argmin(np.abs(choices - rest[row, q]))]
            error = rest[row, q] - result[row, q]
            rest[row] -= error / inverse[q, q] * inverse[q]
        inverse = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        inverse[q] = inverse[:, q] = 0
        inverse[q, q] = 1  # this column is not touched again
    return result


OTHER_COLUMNS = [(QuantizationFormat("nf4", None, False), inputs) for inputs in (1, 7, 16, 150, 267)]  # fill no blocks


@pytest.mark.parametrize(("format", "inputs"), [*((format, 144) for format in FORMATS), *OTHER_COLUMNS])
def test_it_is_the_papers_algorithm_and_better_than_nearest_rounding(format, inputs) -> None:
    weight, x = layer(inputs)
    compensated = quantize_with_compensation(weight, format, 2 * x.T @ x)
    expected = by_elimination(weight.numpy(), x.numpy(), format)
    np.testing.assert_allclose(compensated.dequantize().double().numpy(), expected, atol=1e-5)
    nearest = quantize(weight, format)
    assert torch.equal(compensated.scales, nearest.scales)  # and so what is stored is as large
    assert compensated.format == nearest.format

    def output_error(quantized) -> float:
        return float((x @ (quantized.dequantize().double() - weight.double()).T).norm())

    assert output_error(compensated) <= (0.8 if inputs > 16 else 1.01) * output_error(nearest)
    if not format.has_codebook and not format.offset:
        assert int(unpack_codes(compensated.codes, format.bits, weight.shape[1]).min()) > 0


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.type}-{format.group_size}-{format.offset}")
@pytest.mark.parametrize("size", [0.0, 3.0])
def test_inputs_that_do_not_hang_together_or_are_zero_leave_nothing_to_compensate(format, size) -> None:
    weight, _ = layer()
    compensated = quantize_with_compensation(weight, format, torch.eye(144) * size)
    assert torch.equal(compensated.dequantize(), quantize(weight, format).dequantize())


def test_a_factor_on_the_hessian_changes_nothing_and_an_input_that_is_never_there_is_no_trouble() -> None:
    weight, x = layer()
    x[:, 5] = 0
    format = QuantizationFormat("int4", 16, True)
    compensated = quantize_with_compensation(weight, format, 2 * x.T @ x)
    assert torch.equal(compensated.codes, quantize_with_compensation(weight, format, x.T @ x).codes)
    assert bool(compensated.dequantize().isfinite().all())
    np.testing.assert_allclose(compensated.dequantize()[:, 5], quantize(weight, format).dequantize()[:, 5])
