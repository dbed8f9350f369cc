"""Paired tests that say when they can't decide, and what many tests at once cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Literal

import numpy as np
import scipy
from numpy.typing import ArrayLike

from peft_vit.statistics.checked import finite, without_rounding

Verdict = Literal["supported", "refuted", "not decided"]

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
    if not 0 < alpha < 1 or comparisons < 1:
        raise ValueError(f"expected 0 < alpha < 1 and comparisons >= 1, got {alpha}, {comparisons}")
    return next(n for n in count(1) if comparisons * 2.0 ** (1 - n) <= alpha)


def wilcoxon(differences: ArrayLike) -> Significance:
    """Test whether (n,) paired differences are centered on zero: Wilcoxon's signed-rank test, two-sided.

    Exact up to 50 pairs, ties included: the distribution of the positive rank sum over all 2^n sign patterns,
    given the midranks. Pairs without a difference are dropped (Wilcoxon's own rule). Beyond 50 pairs scipy's
    approximation. `minimum_n` is that of a test by itself at 5 %.

    Assumption: differences are independent and symmetric around their center. Source: Wilcoxon, Biometrics
        Bulletin 1 (1945); midranks under ties: Pratt & Gibbons, Concepts of Nonparametric Theory (1981), 3.7.
    """
    data = without_rounding(np.sort(finite(differences, "differences")))
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


def wilcoxon_against_each(rivals: Sequence[ArrayLike]) -> tuple[Significance, Significance]:
    """Test whether something leads each of k rivals, and whether some rival leads it: k arrays (n,) of differences.

    To take the largest rival of each pair instead would compare a value with the maximum of noisy ones, which lies
    above it even if all are equal in truth.

    Leads every rival: the largest of the k p-values, those that point the other way counted as 1; no correction is
    needed, as all must be small (Berger, Technometrics 24 (1982), intersection-union). Some rival leads: k times the
    smallest of those that point that way (Bonferroni). A test points a way if its mean and its ranks both do.

    Assumption: as in `wilcoxon`, for the differences to each rival; nothing on how rivals depend on each other.

    Returns:
        The test that can show "leads every rival", and the one that can show "some rival leads".

    Raises:
        ValueError: for no rival, or values that are not finite.
    """
    if not rivals:
        raise ValueError("expected at least one rival")
    tests = [wilcoxon(values) for values in rivals]
    towards = [_points(values, test) for values, test in zip(rivals, tests, strict=True)]
    least = min(tests, key=lambda test: test.n)
    ahead = [(test.p_value or 0.0) if way > 0 else 1.0 for test, way in zip(tests, towards, strict=True)]
    behind = [(test.p_value or 0.0) if way < 0 else 1.0 for test, way in zip(tests, towards, strict=True)]
    shown = Significance(
        f"{least.test}, each of {len(rivals)} rivals",
        least.n,
        max(ahead),
        least.minimum_n,
        least.dropped,
        1 if min(towards) > 0 else 0,
    )
    against = tests[behind.index(min(behind))]
    opposite = Significance(
        f"{against.test}, the worst of {len(rivals)} rivals",
        against.n,
        min(1.0, len(rivals) * min(behind)),
        minimum_n_wilcoxon(comparisons=len(rivals)),
        against.dropped,
        -1 if min(towards) < 0 else 0,
    )
    return shown, opposite


def _points(values: ArrayLike, test: Significance) -> int:
    """Return the sign that mean and ranks share; 0 if they share none."""
    sign = int(np.sign(math.fsum(np.asarray(values, dtype=np.float64))))
    return sign if sign == test.direction else 0


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
        return "not decided"
    if significance.direction is not None and significance.direction * estimate <= 0:
        return "not decided"
    return "supported" if estimate > 0 else "refuted"
