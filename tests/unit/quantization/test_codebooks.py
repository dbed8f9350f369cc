import numpy as np
import pytest
import torch
from scipy.stats import norm

from peft_vit.quantization import code_values


def test_nf4_values_are_the_quantiles_of_the_paper() -> None:
    # QLoRA: 8 quantiles for the positive half, 7 for the negative, zero shared, scaled so that the ends are 1 and -1.
    end = 0.9677083
    positive = norm.ppf(np.linspace(end, 0.5, 9)[:-1])[::-1]
    negative = -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    expected = np.concatenate([negative, [0.0], positive]) / norm.ppf(end)
    np.testing.assert_allclose(code_values("nf4").numpy(), expected, atol=2e-7)


def test_fp4_values_are_sign_exponent_and_fraction() -> None:
    def value(code: int) -> float:
        sign, exponent, fraction = code >> 3, (code >> 1) & 3, code & 1
        # Exponents 0, 1, 2, 3 stand for: subnormal, 8, 4, 2 (before all are divided by the largest, 12).
        magnitude = fraction * 0.0625 if exponent == 0 else 2.0 ** (4 - exponent) * (1 + fraction / 2)
        return (-1) ** sign * magnitude / 12

    expected = [value(code) for code in range(16)]
    np.testing.assert_allclose(code_values("fp4").numpy(), expected, rtol=1e-7)


@pytest.mark.parametrize("type", ["nf4", "fp4"])
def test_callers_cannot_alter_the_codebook(type: str) -> None:
    code_values(type).zero_()  # type: ignore[arg-type]
    assert code_values(type).abs().max() == 1  # type: ignore[arg-type]
    assert code_values(type).dtype == torch.float32  # type: ignore[arg-type]
