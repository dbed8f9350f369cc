"""Paired tests that say when they can't decide, and what many tests at once cost.

Each claim has a test that can show it and a test that can show its opposite. If neither does, nothing is decided: a
large p-value never says "no difference". Differences are of shape (n,), candidate minus reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import count

import numpy as np
import scipy
from numpy.typing import ArrayLike

from peft_vit.base.statistics.intervals import (
    CONFIDENCE,
    Interval,
    finite_array,
    has_spread,
    mean_and_error,
    without_rounding,
)


class Verdict(StrEnum):
    """What is known of a claim."""

    SUPPORTED = "supported"
    REFUTED = "refuted"
    NOT_DECIDED = "not decided"  # these values can't tell; never that there is no difference
    NO_DATA = "no data"


_EXACT_UP_TO = 50  # pairs; beyond, the normal approximation is accurate to four digits


@dataclass(frozen=True)
class Significance:
    """What a test says."""

    test: str  # name of the test
    n: int  # pairs that the test could use (Wilcoxon drops pairs without a difference)
    p_value: float | None  # two-sided unless the name says otherwise; None if the test is undefined for these values
    minimum_n: int  # smallest n at which any outcome could be significant
    dropped: int = 0  # pairs without a difference, which the test could not use
    # 1 if the test's own statistic speaks for a positive difference, -1 for a negative one, 0 for neither; None if it
    # follows the mean
    direction: int | None = None
    comparisons: int = 1  # tests of which this is the one that spoke

    @property
    def decidable(self) -> bool:
        """Whether any outcome with this n could have been significant."""
        return self.p_value is not None and self.n >= self.minimum_n

    def sentence(self) -> str:
        """Return the p-value, or why there can be no decision."""
        if self.n < self.minimum_n:
            equal = f" ({self.dropped} more without a difference)" if self.dropped else ""
            return f"not decidable with n = {self.n}{equal}, needs at least {self.minimum_n}"
        if self.p_value is None:
            return "not decidable: the differences have no spread"
        return f"p = {self.p_value:.3g}"


def minimum_n_wilcoxon(alpha: float = 0.05, comparisons: int = 1) -> int:
    """Return the smallest n at which the two-sided exact Wilcoxon test can be significant.

    The most extreme of the 2^n sign patterns and its mirror image have probability ``2 / 2^n``; under Holm's
    procedure the smallest of m p-values must not exceed ``alpha / m``. At 5 %: 6 for one comparison, 7 for
    three.

    Assumption: no pair without a difference. Source: Wilcoxon, Biometrics Bulletin 1 (1945); Holm (1979).
    """
    return next(n for n in count(1) if comparisons * 2.0 ** (1 - n) <= alpha)


def wilcoxon(differences: ArrayLike) -> Significance:
    """Test whether (n,) paired differences are centered on zero: Wilcoxon's signed-rank test, two-sided.

    Exact up to 50 pairs, ties included: the distribution of the positive rank sum over all 2^n sign patterns,
    given the midranks. Pairs without a difference are dropped (Wilcoxon's own rule). Beyond 50 pairs scipy's
    approximation. `minimum_n` is that of a test by itself at 5 %.

    Assumption: differences are independent and symmetric around their center. Source: Wilcoxon, Biometrics
        Bulletin 1 (1945); midranks under ties: Pratt & Gibbons, Concepts of Nonparametric Theory (1981), 3.7.
    """
    data = without_rounding(np.sort(finite_array(differences, "differences")))
    nonzero = data[data != 0]
    dropped = int(data.size - nonzero.size)
    minimum = minimum_n_wilcoxon()
    name = "exact Wilcoxon signed-rank"
    if nonzero.size == 0:
        return Significance(name, 0, 1.0, minimum, dropped, 0)
    direction = int(np.sign(np.sum(np.sign(nonzero) * scipy.stats.rankdata(np.abs(nonzero)))))
    if nonzero.size > _EXACT_UP_TO:
        name = "Wilcoxon signed-rank, normal approximation"
        p_value = float(scipy.stats.wilcoxon(nonzero, method="approx").pvalue)
    else:
        doubled = np.rint(2 * scipy.stats.rankdata(np.abs(nonzero))).astype(int)  # midranks are multiples of a half
        p_value = _exact_p(tuple(sorted(doubled.tolist())), int(doubled[nonzero > 0].sum()))
    return Significance(name, int(nonzero.size), p_value, minimum, dropped, direction)


@lru_cache(maxsize=4096)  # a table of all pairs asks for few patterns of ranks many times
def _exact_p(doubled: tuple[int, ...], observed: int) -> float:
    """Return the two-sided p-value of a positive rank sum among those of all sign patterns; ranks and sum doubled."""
    probability = np.zeros(sum(doubled) + 1)  # of each doubled positive rank sum
    probability[0] = 1.0
    for rank in doubled:
        shifted = np.zeros_like(probability)
        shifted[rank:] = probability[: probability.size - rank]
        probability = (probability + shifted) / 2  # this pair's sign is negative or positive
    tails = (math.fsum(probability[: observed + 1]), math.fsum(probability[observed:]))
    return min(1.0, 2 * min(tails))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return Holm's adjusted p-values of (m,) tests, in the order given: the family-wise error rate stays at alpha.

    Assumption: none on how the tests depend on each other. Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(p.size, 0, -1) * p[order]))
    return tuple(adjusted.tolist())


def verdict(estimate: float, significance: Significance, adjusted_p: float | None, alpha: float = 0.05) -> Verdict:
    """Return whether "the difference is positive" is supported, refuted or not decided.

    Ranks may speak for the other side than the mean does, if one seed lies far out: then nothing is decided.
    `adjusted_p` is the test's p-value after correction for the family; None if there is none.
    """
    if not significance.decidable or adjusted_p is None or adjusted_p > alpha or estimate == 0:
        return Verdict.NOT_DECIDED
    if significance.direction is not None and significance.direction * estimate <= 0:
        return Verdict.NOT_DECIDED
    return Verdict.SUPPORTED if estimate > 0 else Verdict.REFUTED


# --- against a margin that was stated before the data -----------------------------------------------------------------
#
# All rest on Student's t. Assumption: differences are independent and normal; the margin is positive, in their unit.
# What they say holds for other seeds, not for other test images or data sets. Sources: Schuirmann, Journal of
# Pharmacokinetics and Biopharmaceutics 15 (1987); Wellek, Testing Statistical Hypotheses of Equivalence and
# Noninferiority (2010).

MINIMUM_PAIRS = 2  # a t of two pairs can be as large as one likes, so no correction for many tests raises this number


def equivalence(differences: ArrayLike, margin: float) -> Significance:
    """Test whether the mean lies within ``±margin``: two one-sided t tests.

    The p-value is the larger of the two; it is at most alpha exactly when the (1 - 2 alpha) t interval lies within
    the margins. Its level holds at the margins and is far below alpha if the differences scatter widely.
    Source: Schuirmann (1987).
    """
    p_values = _t_tests(differences, margin, greater=-margin, less=margin)
    return _significance("two one-sided paired t (equivalence)", differences, p_values and max(p_values))


def beyond_margin(differences: ArrayLike, margin: float) -> Significance:
    """Test whether the mean lies outside ``±margin``, on either side: what refutes equivalence.

    Twice the smaller of the two one-sided p-values, so it is at most alpha exactly when the (1 - alpha) t interval
    lies beyond a margin. The test that is to hold for all |mean| <= margin: Wellek (2010), 11.
    """
    p_values = _t_tests(differences, margin, greater=margin, less=-margin)
    return _significance("paired t beyond the margin, two-sided", differences, p_values and min(1.0, 2 * min(p_values)))


def noninferiority(differences: ArrayLike, margin: float) -> Significance:
    """Test whether the mean lies above ``-margin``: one-sided t test of mean <= -margin.

    "At least as good" is claimed when its p-value is small: then the lower end of the (1 - 2 alpha) t interval lies
    above -margin. A large p-value does not say "worse". Source: one of the two tests of Schuirmann (1987).
    """
    p_values = _t_tests(differences, margin, greater=-margin, less=-margin)
    return _significance("paired non-inferiority t, one-sided", differences, p_values and p_values[0])


def inferiority(differences: ArrayLike, margin: float) -> Significance:
    """Test whether the mean lies below ``-margin``: what refutes non-inferiority, one-sided t."""
    p_values = _t_tests(differences, margin, greater=-margin, less=-margin)
    return _significance("paired inferiority t, one-sided", differences, p_values and p_values[1])


def equivalence_verdict(
    shown: Significance,
    opposite: Significance,
    adjusted_shown: float | None,
    adjusted_opposite: float | None,
    alpha: float = 0.05,
) -> Verdict:
    """Return whether a claim within a margin is supported, refuted or not decided.

    `shown` and `opposite` are `equivalence` and `beyond_margin`, or `noninferiority` and `inferiority`, of the same
    differences and margin. In a family of claims, adjust the p-values of all `shown` by `holm`, and those of all
    `opposite` by another call of it: then the probability of any false "supported" is at most alpha, and so is that
    of any false "refuted". A p-value that does not exist is None.
    """
    if shown.decidable and adjusted_shown is not None and adjusted_shown <= alpha:
        return Verdict.SUPPORTED
    if opposite.decidable and adjusted_opposite is not None and adjusted_opposite <= alpha:
        return Verdict.REFUTED
    return Verdict.NOT_DECIDED


def _t_tests(differences: ArrayLike, margin: float, *, greater: float, less: float) -> tuple[float, float] | None:
    """Return p-values of "the mean is greater than" and "it is less than"; None if the values have no spread."""
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"expected a positive margin, got {margin}")
    data = finite_array(differences, "differences")
    if not has_spread(data):
        return None
    mean, error = mean_and_error(data)
    above, below = scipy.special.stdtr(data.size - 1, [(greater - mean) / error, (mean - less) / error])
    return float(above), float(below)


def _significance(test: str, differences: ArrayLike, p_value: float | None) -> Significance:
    return Significance(test, len(finite_array(differences)), p_value, MINIMUM_PAIRS)


# --- over strata ------------------------------------------------------------------------------------------------------


def stratified_mean(strata: Sequence[ArrayLike]) -> tuple[Interval, Significance]:
    """Return the mean over S strata of each one's (n_s,) mean, with a t interval, and the test of "the mean is 0".

    ``m = sum_s m_s / S``, ``v = sum_s s_s^2 / n_s / S^2``, and Satterthwaite's degrees of freedom ``v^2 / sum_s (s_s^2
    / n_s / S^2)^2 / (n_s - 1)``. Studies are strata, not draws: the interval describes what other seeds would change on
    these very studies. It says nothing about another data set or backbone. n counts all values.

    Assumption: values are independent between and within strata and roughly normal; variances may differ. Source:
    Cochran, Sampling Techniques (1977), 5.4; Satterthwaite, Biometrics Bulletin 2 (1946).
    """
    values = [np.asarray(stratum, dtype=np.float64) for stratum in strata]
    number = len(values)
    means = [math.fsum(sample) / sample.size for sample in values]
    estimate, n = math.fsum(means) / number, sum(sample.size for sample in values)
    reason = ""
    if any(sample.size < 2 for sample in values):
        reason = "a study has a single pair, which has no spread"
    elif not any(has_spread(sample) for sample in values):
        reason = "the pairs of no study differ, so there is no spread"
    if reason:
        return Interval(estimate, None, None, n, CONFIDENCE, reason), Significance(
            "stratified t", n, None, MINIMUM_PAIRS
        )
    parts = [
        math.fsum((sample - mean) ** 2) / (sample.size - 1) / sample.size / number**2
        for sample, mean in zip(values, means, strict=True)
    ]
    variance = math.fsum(parts)
    degrees = variance**2 / math.fsum(part**2 / (sample.size - 1) for part, sample in zip(parts, values, strict=True))
    error = math.sqrt(variance)
    half = float(scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, degrees)) * error
    p_value = 2 * float(scipy.stats.t.sf(abs(estimate) / error, degrees))
    interval = Interval(estimate, estimate - half, estimate + half, n, CONFIDENCE)
    return interval, Significance("stratified t", n, p_value, MINIMUM_PAIRS)
