import numpy as np
import pytest
import torch
from quantization_strategies import CODEBOOKS
from scipy.stats import norm

from peft_vit.quantization import code_values


def test_nf4_values_are_the_quantiles_of_the_paper() -> None:
    # QLoRA: 8 quantiles for the positive half, 7 for the negative, zero shared, scaled so that the ends are 1 and -1.
    end = 0.9677083
    positive = norm.ppf(np.linspace(end, 0.5, 9)[:-1])[::-1]
    negative = -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    expected = np.concatenate([negative, [0.0], positive]) / norm.ppf(end)
    np.testing.assert_allclose(code_values("nf4").numpy(), expected, atol=2e-7)


def test_nf3_values_are_the_same_quantiles_of_three_bits() -> None:
    # 4 quantiles for the positive half, 3 for the negative; the outermost is half a step of probability from the end,
    # of steps of 1/2^k above zero and 1/(2^k - 1) below, on average. At 4 bits that is the end of the paper's NF4.
    def end(bits: int) -> float:
        return 1 - (0.5 / 2**bits + 0.5 / (2**bits - 1)) / 2

    assert end(4) == pytest.approx(0.9677083, abs=1e-7)
    positive = norm.ppf(np.linspace(end(3), 0.5, 5)[:-1])[::-1]
    negative = norm.ppf(np.linspace(1 - end(3), 0.5, 4)[:-1])
    expected = np.concatenate([negative, [0.0], positive]) / norm.ppf(end(3))
    np.testing.assert_allclose(code_values("nf3").numpy(), expected, atol=1e-7)
    assert code_values("nf3")[3] == 0


def test_fp4_values_are_sign_exponent_and_fraction() -> None:
    def value(code: int) -> float:
        sign, exponent, fraction = code >> 3, (code >> 1) & 3, code & 1
        # Exponents 0, 1, 2, 3 stand for: subnormal, 8, 4, 2 (before all are divided by the largest, 12).
        magnitude = fraction * 0.0625 if exponent == 0 else 2.0 ** (4 - exponent) * (1 + fraction / 2)
        return (-1) ** sign * magnitude / 12

    expected = [value(code) for code in range(16)]
    np.testing.assert_allclose(code_values("fp4").numpy(), expected, rtol=1e-7)


@pytest.mark.parametrize("type", CODEBOOKS)
def test_callers_cannot_alter_the_codebook(type: str) -> None:
    code_values(type).zero_()  # type: ignore[arg-type]
    assert code_values(type).abs().max() == 1  # type: ignore[arg-type]
    assert code_values(type).dtype == torch.float32  # type: ignore[arg-type]
