"""Standardized effects of paired differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy
from numpy.typing import ArrayLike

from peft_vit.statistics.checked import check_level, finite, has_spread
from peft_vit.statistics.intervals import mean_and_error


@dataclass(frozen=True)
class EffectSize:
    """The mean of paired differences in units of their standard deviation."""

    d: float | None  # Cohen's d_z, mean over standard deviation; None if there is no spread to divide by
    # low, high: ends of its interval; None with d
    low: float | None
    high: float | None
    g: float | None  # Hedges' g, d without its bias; None also for two pairs, where the correction is zero


def effect_size(differences: ArrayLike, confidence: float = 0.95) -> EffectSize:
    """Return Cohen's d_z of (n,) paired differences and Hedges' g, with intervals by the noncentral t distribution.

    ``d = mean / s``; ``sqrt(n) d`` follows a noncentral t with n - 1 degrees of freedom and noncentrality ``sqrt(n)
    delta``. The interval holds the deltas under which the d observed is in neither tail. Hedges' factor ``J =
    Gamma(f/2) / (sqrt(f/2) Gamma((f-1)/2))`` with f = n - 1 takes away the bias of d.

    The unit is the scatter between pairs of runs that share a seed, so a d of 1 says nothing about accuracy points.
    Describes what another draw of seeds would change. Assumption: differences are independent and normal; under skew
    or heavy tails the interval covers less. Sources: Cohen, Statistical Power Analysis (1988), 2.3.5; Hedges, Journal
    of Educational Statistics 6 (1981); Steiger & Fouladi (1997) on the interval.

    Raises:
        ValueError: for no values, or values that are not finite.
    """
    check_level(confidence, "confidence")
    data = finite(differences, "differences")
    n = int(data.size)
    if not has_spread(data):
        return EffectSize(None, None, None, None)
    mean, error = mean_and_error(data)
    t, root = mean / error, math.sqrt(n)
    d = t / root
    low = _noncentrality(t, n - 1, 0.5 + confidence / 2) / root
    high = _noncentrality(t, n - 1, 0.5 - confidence / 2) / root
    return EffectSize(d, low, high, hedges_factor(n - 1) * d if n > 2 else None)


def hedges_factor(degrees: int) -> float:
    """Return what takes the bias out of Cohen's d, at 2 degrees or more: exact, not 1 - 3 / (4 f - 1)."""
    return math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees - 1) / 2)) / math.sqrt(degrees / 2)


def _noncentrality(t: float, degrees: int, probability: float) -> float:
    """Return the noncentrality under which a noncentral t lies below t with this probability."""
    if t < 0:
        return -_noncentrality(-t, degrees, 1 - probability)

    def excess(noncentrality: float) -> float:
        # scipy returns NaN for noncentralities far below zero, where nothing that a float can hold is missing to 1
        below = float(scipy.special.nctdtr(degrees, noncentrality, t))
        return (1.0 if math.isnan(below) else below) - probability

    # With noncentrality c the statistic is (z + c) / w: the answer lies around t, farther out the fewer the degrees.
    width = 4 + t
    low, high = t - width, t + width
    while excess(low) < 0:  # falls as the noncentrality rises
        low -= width
    while excess(high) > 0:
        high += width
    return float(scipy.optimize.brentq(excess, low, high, xtol=1e-14, rtol=1e-14))
