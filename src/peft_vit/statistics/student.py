"""Student's t for paired differences, shared by the tests that rest on it."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from scipy import special

from peft_vit.statistics.checked import has_spread

Tail = Literal["greater", "less"]

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
    return float(special.stdtr(data.size - 1, -t if tail == "greater" else t))
