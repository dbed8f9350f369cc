"""Means, shares and standardized effects with intervals. Every docstring says which uncertainty an interval describes.

Sums are exact (`math.fsum`) or of sorted values, so that the same values in another order give the same bits.
Functions of values raise ValueError for another shape than (n,), no values, or values that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

ROUNDING = 1e-12  # differences of accuracies carry rounding errors of about 1e-14 of their size
CONFIDENCE = 0.95  # nominal coverage
_RESAMPLES, _AT_ONCE = 500, 1_000_000  # of the bootstrap: how often images are drawn, and weights held at a time
_AS_MANY = 3  # cases by which a group's share is pulled to the mean of all, see `mean_of_proportions`
_LOGITS, _HALVED = 40.0, 60  # as far as shares move, to 0 or 1 in floats; how often the search for an end is halved


# --- values, and the comparisons that rounding must not decide --------------------------------------------------------


def finite_array(values: ArrayLike, name: str = "values") -> np.ndarray:
    """Return values as a float array of shape (n,); an error names the first that is not finite by its position."""
    data = np.asarray(values, dtype=np.float64)
    expected = f"{name}: expected a non-empty one-dimensional array of finite values"
    if data.ndim != 1 or data.size == 0:
        raise ValueError(f"{expected}, got the shape {data.shape}")
    bad = np.flatnonzero(~np.isfinite(data))
    if bad.size:
        raise ValueError(f"{expected}, got {data[bad[0]]} at position {bad[0]} ({bad.size} of {data.size} are not)")
    return data


def has_spread(data: np.ndarray) -> bool:
    """Return whether values differ by more than rounding: (n,) to a bool.

    0.82 - 0.81 and 0.81 - 0.80 are one difference that floats write in two ways; a t test would call that proof.
    """
    return data.size > 1 and float(np.ptp(data)) > ROUNDING * float(np.abs(data).max())


def shifted(values: ArrayLike, center: float) -> np.ndarray:
    """Return (n,) values minus a center: zero where both are one number but for rounding, equal where the values are.

    0.82 - 0.81 misses a margin of 0.01 by 1e-17. Beside nothing but such remains, a test would take them for
    differences that all point one way.
    """
    data = finite_array(values)
    return data if center == 0 else without_rounding(data - center, max(float(np.abs(data).max()), abs(center)))


def without_rounding(data: np.ndarray, unit: float | None = None) -> np.ndarray:
    """Return (n,) values with those equal that differ by rounding only, and zero where they are zero but for rounding.

    Sizes that lie closer together than a 1e-12th of the unit, or else of the largest, take the smallest one's size;
    signs stay. The unit is the size of the numbers that these are differences of.
    """
    sizes = np.abs(data)
    order = np.argsort(sizes, kind="stable")
    ascending = sizes[order]
    room = ROUNDING * (ascending[-1] if unit is None else unit)
    new = np.diff(ascending, prepend=0.0) > room  # (n,) where a new size begins
    starts = np.concatenate([[0.0], ascending[new]])  # before the first new one everything is zero
    merged = np.empty_like(sizes)
    merged[order] = starts[np.cumsum(new)]
    return np.copysign(merged, data) + 0.0  # + 0.0 turns -0.0 into 0.0


# --- means and shares -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean, or another estimate, and where the population's may lie."""

    estimate: float  # the estimate, in the unit of the values
    low: float | None  # lower end; None if there is no interval, e.g. for too few values (n < 2)
    high: float | None  # upper end; None likewise
    n: int  # number of values
    confidence: float  # nominal coverage, e.g. 0.95
    reason: str | None = None  # why there is no interval, where more than a single value is behind it

    @property
    def may_be_zero(self) -> bool:
        """Return whether a difference may as well be none or the other way round, as far as these values can tell."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def critical_z() -> float:
    """Return the quantile of the standard normal distribution that a two-sided interval at CONFIDENCE takes, 1.96."""
    return float(scipy.special.ndtri(0.5 + CONFIDENCE / 2))


def mean_and_error(data: np.ndarray) -> tuple[float, float]:
    """Return the mean of (n,) values, n >= 2, and its standard error."""
    mean = math.fsum(data) / data.size
    deviation = data - mean
    largest = float(np.abs(deviation).max())  # squares are taken in its unit: those of tiny values would vanish
    if largest == 0:
        return mean, 0.0
    variance = math.fsum((deviation / largest) ** 2) / (data.size - 1)
    return mean, largest * math.sqrt(variance / data.size)


def mean_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of (n,) values with Student's t interval, ``m ± t_{n-1} s / sqrt(n)``.

    Over the seeds of one experiment, the interval describes what other seeds (initial head and adapter, order
    of the images, augmentation) would change; over differences of runs that share a seed, what it would change in the
    difference, as what both have in common drops out. It says nothing about other test images or other data sets. Where
    each seed draws its own split of one data set, other splits of it count in; these overlap, so for new images the
    interval is too narrow (Nadeau & Bengio, Machine Learning 52 (2003)).

    Assumption: values are independent and roughly normal. Source: Student, Biometrika 6 (1908).
    """
    data = finite_array(values)
    n = int(data.size)
    if n < 2:
        return Interval(float(data[0]), None, None, n, confidence)
    mean, error = mean_and_error(data)
    half = float(scipy.special.stdtrit(n - 1, 0.5 + confidence / 2)) * error
    return Interval(mean, mean - half, mean + half, n, confidence)


def proportion_interval(successes: float, n: int) -> Interval:
    """Return a share with Wilson's score interval.

    For one run's accuracy, the interval describes what as many other test images from the same
    population would change. It says nothing about other seeds.

    Assumption: images are independent. Source: Wilson, JASA 22 (1927).
    """
    share, z = successes / n, critical_z()
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(share, max(0.0, center - half), min(1.0, center + half), n, CONFIDENCE)


def rule_of_three(cases: int) -> float:
    """Return the largest share of cases that may be of a kind of which n have none: ``1 - 0.05^(1/n)``, about 3 / n.

    It is the upper end of the exact one-sided 95 % interval. Assumption: cases are independent. Sources: Clopper &
    Pearson, Biometrika 26 (1934); Hanley & Lippman-Hand, JAMA 249 (1983), the rule of three.
    """
    return 1 - float((1 - CONFIDENCE) ** (1 / cases))


def bootstrap_interval(
    images: int,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    unseen: float | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Interval:
    """Return a statistic of images with its percentile bootstrap interval: what other images would change.

    Where all resamples have one value, such as 1 of images that are ranked perfectly, they tell nothing of others.

    Args:
        images: how many there are, n.
        statistic: of weights (B, n), how often each image is drawn, its values (B,); NaN where it has none.
        unseen: how far the interval then reaches from that value, within the bounds, so that it has one side at an end
            of these, see `rule_of_three`; None: there is no interval then.
        bounds: of the statistic.

    Assumption: images are independent. Source: Efron, Annals of Statistics 7 (1979).
    """
    rng = np.random.default_rng(0)
    block = max(1, _AT_ONCE // images)
    sizes = [min(block, _RESAMPLES - start) for start in range(0, _RESAMPLES, block)]
    drawn = [statistic(rng.multinomial(images, np.full(images, 1 / images), size).astype(float)) for size in sizes]
    values = np.concatenate(drawn)  # (_RESAMPLES,)
    estimate, values = float(statistic(np.ones((1, images)))[0]), values[np.isfinite(values)]
    if images < 2 or not values.size:
        return Interval(estimate, None, None, images, CONFIDENCE, reason="too few images")
    if np.ptp(values) <= ROUNDING:
        if unseen is None:
            return Interval(estimate, None, None, images, CONFIDENCE, reason="all resamples agree")
        low, high = max(bounds[0], estimate - unseen), min(bounds[1], estimate + unseen)
        return Interval(estimate, low, high, images, CONFIDENCE)
    low, high = np.quantile(values, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Interval(estimate, float(low), float(high), images, CONFIDENCE)


def mean_of_proportions(successes: ArrayLike, cases: ArrayLike) -> Interval:
    """Return the mean of (K,) shares of separate groups, each counting the same, with a score interval.

    For balanced accuracy the groups are the classes, and the interval describes what as many other test
    images of each class would change. It holds the means of true shares p from which the observed one is at most
    ``z sqrt(sum p (1 - p) / n) / K`` away: of one group it is Wilson's. From their estimates shares move together, on
    the scale of logits, the faster the fewer cases a group has, which is where the mean may most easily be another
    one. The estimates have _AS_MANY cases more of the mean of all groups: of three images of a class all are right as a
    rule, which does not make its share sure.

    Assumption: cases are independent. Sources: Wilson, JASA 22 (1927), for one group; Stein, Third Berkeley Symposium 1
    (1956), p. 187, on the least favourable way to move several.
    """
    hits, n = np.asarray(successes, dtype=np.float64), np.asarray(cases, dtype=np.float64)
    mean, alike = float(np.mean(hits / n)), len(n) ** 2 / float(np.sum(1 / n))  # cases of one group known as well
    share = (hits + _AS_MANY * (mean * alike + 1) / (alike + 2)) / (n + _AS_MANY)  # (K,)
    z, logits, pace = critical_z(), scipy.special.logit(share), n.min() / n

    def end(sign: int) -> float:
        low, high = -_LOGITS / pace.min(), _LOGITS / pace.min()
        for _ in range(_HALVED):
            moved = scipy.special.expit(logits + (low + high) / 2 * pace)  # (K,)
            error = math.sqrt(np.sum(moved * (1 - moved) / n)) / len(n)
            if np.mean(moved) - sign * z * error > mean:
                high = (low + high) / 2
            else:
                low = (low + high) / 2
        return float(np.mean(moved))

    low, high = 0.0 if mean == 0 else end(-1), 1.0 if mean == 1 else end(1)
    return Interval(mean, low, high, int(n.sum()), CONFIDENCE)


def difference_interval(before: Interval, after: Interval) -> Interval:
    """Return after less before, each of cases of its own, from their intervals; of two shares it is Newcombe's.

    The interval describes what other cases of both would change. No interval where one of the two has none.

    Assumption: both are independent. Source: Zou & Donner, Statistics in Medicine 27 (2008), square-and-add (MOVER);
    with Wilson's intervals: Newcombe, Statistics in Medicine 17 (1998), method 10.
    """
    difference, n = after.estimate - before.estimate, before.n + after.n
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Interval(difference, None, None, n, CONFIDENCE, before.reason or after.reason)
    down = math.hypot(after.estimate - after.low, before.high - before.estimate)
    up = math.hypot(after.high - after.estimate, before.estimate - before.low)
    return Interval(difference, difference - down, difference + up, n, CONFIDENCE)


def paired_proportions(losses: ArrayLike, gains: ArrayLike, n: ArrayLike) -> Interval:
    """Return how much lower a share is after than before, both over the same n cases, with an adjusted Wald interval.

    For the accuracy of two models on the same images, the interval describes what as many other images from
    the same population would change. A case of each kind is added, so that there is a spread where no case changed;
    the interval need not be symmetric about the estimate.

    Of K groups it is the mean, each counting the same, as classes do in balanced accuracy; then each gets 1 / sqrt(K)
    of a case of each kind. A whole one would say of 20 groups of 5 cases that a quarter of them changed. In simulations
    of 3 to 100 groups of 5 to 300 cases the interval held the truth in 93 % at least, and is wider than that where
    hardly a case changes.

    Args:
        losses: cases that hold before alone (images that only the first model has right); of each group (K,).
        gains: cases that hold after alone, likewise.
        n: all cases, those that hold in both or in neither among them, likewise.

    Assumption: cases are independent. Source: Bonett & Price, Journal of Educational and Behavioral Statistics 37
    (2012), adjusted Wald interval, of one group.
    """
    lost, gained, cases = (np.atleast_1d(np.asarray(counts, dtype=np.float64)) for counts in (losses, gains, n))
    added = 1 / math.sqrt(len(cases))
    before, after = ((changed + added) / (cases + 2 * added) for changed in (lost, gained))  # (K,)
    mean, center = float(np.mean((lost - gained) / cases)), float(np.mean(before - after))
    variance = np.sum((before + after - (before - after) ** 2) / (cases + 2 * added)) / len(cases) ** 2
    half = critical_z() * math.sqrt(variance)
    low, high = max(-1.0, min(mean, center - half)), min(1.0, max(mean, center + half))
    return Interval(mean, low, high, int(cases.sum()), CONFIDENCE)
