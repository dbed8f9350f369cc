"""Rounding that compensates errors: against algorithm 1 of the paper, written out in NumPy column by column."""

import numpy as np
import pytest
import torch
from quantization_strategies import levels_of

from peft_vit.quantization import QuantizationFormat, quantize, quantize_with_compensation, unpack_codes

pytestmark = pytest.mark.part("quantization")
FORMATS = [
    QuantizationFormat("int2", 16, True, torch.float16),
    QuantizationFormat("int2", None, False),
    QuantizationFormat("int4", 16, True),
    QuantizationFormat("int4", 48, False, torch.float16),
    QuantizationFormat("int8", 16, True),
    QuantizationFormat("int3", 16, True, torch.float16),
    QuantizationFormat("nf3", 16, True, torch.float16),
    QuantizationFormat("int4", 16, False, torch.float16, double_quant=True),
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


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.type}-{format.group_size}-{format.offset}")
def test_it_is_the_papers_algorithm_and_better_than_nearest_rounding(format) -> None:
    weight, x = layer()
    found = quantize_with_compensation(weight, format, 2 * x.T @ x)
    expected = by_elimination(weight.numpy(), x.numpy(), format)
    np.testing.assert_allclose(found.dequantize().double().numpy(), expected, atol=1e-5)
    nearest = quantize(weight, format)
    assert torch.equal(found.scales, nearest.scales)  # and so what is stored is as large
    assert found.format == nearest.format

    def output_error(quantized) -> float:
        return float((x @ (quantized.dequantize().double() - weight.double()).T).norm())

    assert output_error(found) < 0.8 * output_error(nearest)
    if not format.has_codebook and not format.offset:
        assert int(unpack_codes(found.codes, format.bits, weight.shape[1]).min()) > 0


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.type}-{format.group_size}-{format.offset}")
def test_inputs_that_do_not_hang_together_leave_nothing_to_compensate(format) -> None:
    weight, _ = layer()
    found = quantize_with_compensation(weight, format, torch.eye(144) * 3)
    assert torch.equal(found.dequantize(), quantize(weight, format).dequantize())


def test_a_factor_on_the_hessian_changes_nothing_and_an_input_that_is_never_there_is_no_trouble() -> None:
    weight, x = layer()
    x[:, 5] = 0
    format = QuantizationFormat("int4", 16, True)
    found = quantize_with_compensation(weight, format, 2 * x.T @ x)
    assert torch.equal(found.codes, quantize_with_compensation(weight, format, x.T @ x).codes)
    assert bool(found.dequantize().isfinite().all())
    np.testing.assert_allclose(found.dequantize()[:, 5], quantize(weight, format).dequantize()[:, 5])


def test_constant_groups_stay_exact() -> None:
    weight, x = layer()
    weight[:, :16] = 0.25
    found = quantize_with_compensation(weight, QuantizationFormat("int4", 16, True), 2 * x.T @ x)
    assert torch.equal(found.dequantize()[:, :16], weight[:, :16])
