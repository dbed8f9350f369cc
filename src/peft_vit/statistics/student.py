"""Student's t for paired differences, shared by the tests that rest on it."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from peft_vit.statistics.checked import finite, has_spread
from peft_vit.statistics.significance import Significance

Tail = Literal["two-sided", "greater", "less"]

MINIMUM_PAIRS = 2
"""A t statistic of two pairs can be as large as one likes, so no correction for many tests raises this number."""


def mean_and_error(data: np.ndarray) -> tuple[float, float]:
    """Return the mean of n >= 2 values and its standard error, from exact sums: order doesn't change a bit.

    Args:
        data: (n,) finite values with spread.
    """
    mean = math.fsum(data) / data.size
    deviation = data - mean
    largest = float(np.abs(deviation).max())  # squares are taken in its unit: those of tiny values would vanish
    variance = math.fsum((deviation / largest) ** 2) / (data.size - 1)
    return mean, largest * math.sqrt(variance / data.size)


def t_probability(data: np.ndarray, center: float, tail: Tail) -> float | None:
    """Return the p-value of "the mean is `center`" against a tail; None if the values have no spread.

    Args:
        data: (n,) finite values.
        center: the mean under the null hypothesis.
        tail: where the alternative lies.
    """
    if not has_spread(data):
        return None
    mean, error = mean_and_error(data)
    t = (mean - center) / error
    if tail == "two-sided":
        return 2 * float(special.stdtr(data.size - 1, -abs(t)))
    return float(special.stdtr(data.size - 1, -t if tail == "greater" else t))


def paired_t(differences: ArrayLike) -> Significance:
    """Test whether paired differences have mean zero: Student's paired t test, two-sided.

    Describes what another draw of seeds would change. Assumption: differences are independent and normal, which a
    handful of seeds can't check. Source: Student, Biometrika 6 (1908).

    Args:
        differences: (n,) one difference a pair.

    Raises:
        ValueError: for no values, or values that are not finite.
    """
    data = finite(differences, "differences")
    return Significance("paired t", int(data.size), t_probability(data, 0.0, "two-sided"), MINIMUM_PAIRS)
