"""Means with intervals. Every docstring says which uncertainty the interval describes.

Sums are exact (`math.fsum`), so that the same values in another order give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from numpy.typing import ArrayLike
from scipy import stats

from peft_vit.statistics.checked import finite


@dataclass(frozen=True)
class Interval:
    """A mean, or another estimate, and where the population's may lie.

    Attributes:
        estimate: the estimate, in the unit of the values.
        low: lower end; None if there is no interval, e.g. for too few values (n < 2).
        high: upper end; None likewise.
        n: number of values.
        confidence: nominal coverage, e.g. 0.95.
        reason: why there is no interval, where more than a single value is behind it.
    """

    estimate: float
    low: float | None
    high: float | None
    n: int
    confidence: float
    reason: str | None = None


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the mean with Student's t interval, ``m ± t_{n-1} s / sqrt(n)``.

    Over the seeds of one experiment, the interval describes what another draw of seeds (initial head and
    adapter, order of the images, augmentation) would change. It says nothing about other test images or other
    data sets. Where each seed draws its own split of one data set, other splits of it count in; these overlap, so for
    new images the interval is too narrow (Nadeau & Bengio, Machine Learning 52 (2003)).

    Assumption: values are independent and roughly normal. Source: Student, Biometrika 6 (1908).

    Args:
        values: (n,) one value a seed.
        confidence: nominal coverage, between 0 and 1.

    Raises:
        ValueError: for no values, or values that are not finite.
    """
    data = finite(values)
    n = data.size
    mean = math.fsum(data) / n
    if n < 2:
        return Interval(mean, None, None, n, confidence)
    variance = math.fsum((data - mean) ** 2) / (n - 1)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half, n, confidence)


def paired_difference(values: ArrayLike, reference: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the mean of ``values - reference`` with its t interval, paired by position.

    Over pairs of runs that share a seed, the interval describes what another draw of seeds would change in
    the difference; what the two runs have in common (same head, same order of images) drops out.

    Assumption: the differences are independent and roughly normal; the two sides need not be.
    Source: Student, Biometrika 6 (1908).

    Args:
        values: (n,) one value a pair.
        reference: (n,) the other side, in the same order.
        confidence: nominal coverage, between 0 and 1.

    Raises:
        ValueError: for no pairs, unequal lengths, or values that are not finite.
    """
    left, right = finite(values), finite(reference, "reference")
    if left.size != right.size:
        raise ValueError(f"pairs need equal lengths, got {left.size} and {right.size}")
    return mean_interval(left - right, confidence)


def proportion_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return a share with Wilson's score interval.

    For one run's accuracy, the interval describes what another draw of as many test images from the same
    population would change. It says nothing about other seeds.

    Assumption: images are independent. Source: Wilson, JASA 22 (1927), as in `scipy.stats.binomtest`.

    Raises:
        ValueError: unless 0 <= successes <= n and n > 0.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n > 0, got {successes} of {n}")
    ends = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(successes / n, float(ends.low), float(ends.high), n, confidence)
