"""Means and shares with intervals. Every docstring says which uncertainty the interval describes.

Sums are exact (`math.fsum`) or of sorted values, so that the same values in another order give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

from peft_vit.statistics.checked import check_level, finite, without_rounding


@dataclass(frozen=True)
class Interval:
    """A mean, or another estimate, and where the population's may lie."""

    estimate: float  # the estimate, in the unit of the values
    low: float | None  # lower end; None if there is no interval, e.g. for too few values (n < 2)
    high: float | None  # upper end; None likewise
    n: int  # number of values
    confidence: float  # nominal coverage, e.g. 0.95
    reason: str | None = None  # why there is no interval, where more than a single value is behind it


def mean_and_error(data: np.ndarray) -> tuple[float, float]:
    """Return the mean of (n,) values, n >= 2, and its standard error."""
    mean = math.fsum(data) / data.size
    deviation = data - mean
    largest = float(np.abs(deviation).max())  # squares are taken in its unit: those of tiny values would vanish
    if largest == 0:
        return mean, 0.0
    variance = math.fsum((deviation / largest) ** 2) / (data.size - 1)
    return mean, largest * math.sqrt(variance / data.size)


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the mean of (n,) values with Student's t interval, ``m ± t_{n-1} s / sqrt(n)``.

    Over the seeds of one experiment, the interval describes what another draw of seeds (initial head and adapter, order
    of the images, augmentation) would change; over differences of runs that share a seed, what it would change in the
    difference, as what both have in common drops out. It says nothing about other test images or other data sets. Where
    each seed draws its own split of one data set, other splits of it count in; these overlap, so for new images the
    interval is too narrow (Nadeau & Bengio, Machine Learning 52 (2003)).

    Assumption: values are independent and roughly normal. Source: Student, Biometrika 6 (1908).

    Raises:
        ValueError: for no values, or values that are not finite.
    """
    data = finite(values)
    n = int(data.size)
    if n < 2:
        return Interval(float(data[0]), None, None, n, confidence)
    mean, error = mean_and_error(data)
    half = float(scipy.special.stdtrit(n - 1, 0.5 + confidence / 2)) * error
    return Interval(mean, mean - half, mean + half, n, confidence)


def proportion_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return a share with Wilson's score interval.

    For one run's accuracy, the interval describes what another draw of as many test images from the same
    population would change. It says nothing about other seeds.

    Assumption: images are independent. Source: Wilson, JASA 22 (1927).

    Raises:
        ValueError: unless 0 <= successes <= n and n > 0.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n > 0, got {successes} of {n}")
    return _wilson(successes / n, n, confidence)


def paired_improvement(differences: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the share of (n,) paired differences that are positive, ties counted as half, with Wilson's interval.

    Describes what another draw of seeds would change in who wins a pair. Not the bootstrap: where all pairs go one way,
    which is common with few seeds, resampling shows no spread. With ties the variance is smaller than a share's, so the
    interval is too wide rather than too short.

    Assumption: pairs are independent. Sources: Dixon & Mood, JASA 41 (1946), on signs of pairs; Wilson, JASA 22 (1927).

    Raises:
        ValueError: for no values, or values that are not finite.
    """
    data = without_rounding(finite(differences, "differences"))
    share = float(np.count_nonzero(data > 0) + 0.5 * np.count_nonzero(data == 0)) / data.size
    return _wilson(share, int(data.size), confidence)


def paired_proportions(losses: int, gains: int, n: int, confidence: float = 0.95) -> Interval:
    """Return how much lower a share is after than before, both over the same n cases, with an adjusted Wald interval.

    For the accuracy of two models on the same images, the interval describes what another draw of as many images from
    the same population would change. A case of each kind is added, so that there is a spread where no case changed;
    the interval need not be symmetric about the estimate.

    Args:
        losses: cases that hold before alone (images that only the first model has right).
        gains: cases that hold after alone.
        n: all cases, those that hold in both or in neither among them.
        confidence: nominal coverage.

    Assumption: cases are independent. Source: Bonett & Price, Journal of Educational and Behavioral Statistics 37
    (2012), adjusted Wald interval.

    Raises:
        ValueError: unless losses and gains are not negative, and their sum is at most n > 0.
    """
    if n < 1 or min(losses, gains) < 0 or losses + gains > n:
        raise ValueError(f"expected losses and gains of n > 0 cases, got {losses} and {gains} of {n}")
    check_level(confidence, "confidence")
    lost, gained = (losses + 1) / (n + 2), (gains + 1) / (n + 2)
    center = lost - gained
    z = float(scipy.special.ndtri(0.5 + confidence / 2))
    half = z * math.sqrt((lost + gained - center**2) / (n + 2))
    return Interval((losses - gains) / n, max(-1.0, center - half), min(1.0, center + half), n, confidence)


def _wilson(share: float, n: int, confidence: float) -> Interval:
    check_level(confidence, "confidence")
    z = float(scipy.special.ndtri(0.5 + confidence / 2))
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(share, max(0.0, center - half), min(1.0, center + half), n, confidence)
