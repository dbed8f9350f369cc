"""Rows in 1 to 8 bits: signs at their mean magnitude, scales that no other beats, files that hold every value."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from peft_vit.base.errors import DivergedError, UserError
from peft_vit.core.quantization.row_rounding import pack_rows, round_rows, rounded_rows, row_values, unpack_rows

pytestmark = pytest.mark.part("quantization")


def drawn(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.01


def squared_error(row, scale, bits):
    """Return the error of the nearest of the 2^bits levels at odd multiples of half a scale."""
    levels = scale * (np.arange(2**bits) - (2**bits - 1) / 2)
    return float(np.square(np.abs(row[:, None] - levels).min(1)).sum())


def test_one_bit_is_the_sign_times_the_mean_magnitude() -> None:
    rows = drawn(3, 100)
    expected = rows.sign() * rows.abs().mean(1, keepdim=True)
    torch.testing.assert_close(rounded_rows(rows, 1), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("bits", "slack"), [(1, 1.001), (2, 1.01), (4, 1.05), (8, 1.5)])
def test_hardly_another_scale_has_a_smaller_error(bits, slack) -> None:
    for seed in range(5):
        row = drawn(1, 384, seed)
        ours = float((row - rounded_rows(row, bits)).square().sum())
        values = row[0].double().numpy()
        most = 2 * np.abs(values).max() / (2**bits - 1)
        tried = [most * share for share in np.linspace(0.2, 1.5, 60)]
        best = min(tried, key=partial(squared_error, values, bits=bits))
        bounds = (0.9 * best, 1.1 * best)
        least = minimize_scalar(partial(squared_error, values, bits=bits), bounds=bounds, method="bounded").fun
        assert ours <= slack * least


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32])
def test_a_file_holds_what_was_rounded(bits) -> None:
    matrices = [drawn(2, 37), drawn(3, 5, 1), torch.zeros(1, 9), torch.empty(0, 4)]
    shapes = [tuple(matrix.shape) for matrix in matrices]
    packed = pack_rows(matrices, bits)
    for matrix, again in zip(matrices, unpack_rows(packed, shapes, bits), strict=True):
        assert torch.equal(again, matrix if bits == 32 else rounded_rows(matrix, bits))
    assert packed["codes"].nbytes == -(-(2 * 37 + 3 * 5 + 9) * bits // 8)
    assert [*unpack_rows(pack_rows([], bits), [], bits)] == []
    with pytest.raises(UserError, match="header"):
        unpack_rows(packed, shapes[1:], bits)


def test_small_scales_keep_their_precision() -> None:
    rows = drawn(4, 64) * 1e-3
    codes, scales = round_rows(rows, 8)
    error = (row_values(codes, scales.unsqueeze(1), 8) - rows).abs().amax(1) / rows.abs().amax(1)
    assert error.max() < 0.006


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_values_that_no_scale_holds_are_refused(value) -> None:
    with pytest.raises(DivergedError, match="too large for few bits; lower the learning rate"):
        pack_rows([torch.tensor([[1.0, value]])], 4)
    if value != 1e6:
        with pytest.raises(UserError, match="16 bits"):
            pack_rows([torch.tensor([[1.0, value]])], 16)


def test_the_gradient_passes_as_if_nothing_was_rounded() -> None:
    rows = drawn(2, 8).requires_grad_()
    (rounded_rows(rows, 2) * torch.arange(8.0)).sum().backward()
    assert torch.equal(rows.grad, torch.arange(8.0).expand(2, 8))
