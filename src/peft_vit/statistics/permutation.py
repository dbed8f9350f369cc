"""The sign-flip test: the mean of paired differences against all, or many random, changes of their signs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from peft_vit.statistics.checked import ROUNDING, finite, without_rounding
from peft_vit.statistics.significance import Significance, minimum_n_wilcoxon

EXACT_UP_TO = 16
"""Pairs with a difference up to which all 2^n sign patterns are enumerated."""


def random_signs(n: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return random signs, -1 or 1, of shape (resamples, n), for `sign_flip`."""
    return 2 * generator.integers(0, 2, (resamples, n)) - 1


def sign_flip(
    differences: ArrayLike, alpha: float = 0.05, comparisons: int = 1, signs: ArrayLike | None = None
) -> Significance:
    """Test whether paired differences have mean zero: paired permutation test of the mean, two-sided.

    Up to 16 pairs with a difference it is exact: all 2^n changes of signs are counted. Beyond, the given random signs
    are, with the pattern observed counted among them, which keeps the level: Phipson & Smyth, Statistical
    Applications in Genetics and Molecular Biology 9 (2010). Two-sided is twice the smaller tail, as in
    `scipy.stats.permutation_test`. Pairs without a difference change nothing and are dropped.

    Describes what another draw of seeds would change. Assumption: under the null hypothesis each difference is as
    likely as its negative, independently. Source: Fisher, The Design of Experiments (1935), 21.

    Args:
        differences: (n,) one difference a pair.
        alpha: level of the family, for `minimum_n`.
        comparisons: size of the family of tests, for `minimum_n`.
        signs: (resamples, n) of -1 and 1, for the differences in ascending order; needed beyond 16 pairs only.

    Raises:
        ValueError: for values that are not finite, more than 16 pairs without signs, or signs of another shape.
    """
    data = np.sort(without_rounding(finite(differences, "differences")))
    nonzero = data[data != 0]
    dropped = int(data.size - nonzero.size)
    minimum = minimum_n_wilcoxon(alpha, comparisons)  # the extreme pattern is one of 2^n here as well
    if nonzero.size == 0:
        return Significance("exact sign-flip of the mean", 0, 1.0, minimum, dropped)
    if nonzero.size <= EXACT_UP_TO:
        p_value = _two_sided(nonzero, _all_signs(nonzero.size), counted=0)
        return Significance("exact sign-flip of the mean", int(nonzero.size), p_value, minimum, dropped)
    patterns = _checked_signs(signs, data.size, alpha / comparisons)
    p_value = _two_sided(data, patterns, counted=1)
    name = f"sign-flip of the mean, {len(patterns):,} random patterns"
    return Significance(name, int(nonzero.size), p_value, minimum, dropped)


def _all_signs(n: int) -> np.ndarray:
    patterns = np.arange(2**n)[:, None] >> np.arange(n)  # (2^n, n)
    return 2 * (patterns & 1) - 1


def _two_sided(data: np.ndarray, signs: np.ndarray, counted: int) -> float:
    sums = (signs * data).sum(axis=1)
    rounding = ROUNDING * np.abs(data).sum()
    observed = data.sum()
    above = np.count_nonzero(sums >= observed - rounding) + counted
    below = np.count_nonzero(sums <= observed + rounding) + counted
    return min(1.0, 2 * int(min(above, below)) / (len(signs) + counted))


def _checked_signs(signs: ArrayLike | None, n: int, level: float) -> np.ndarray:
    if signs is None:
        raise ValueError(f"{n} pairs are too many to enumerate: give signs, e.g. random_signs({n}, 9999, generator)")
    patterns = np.asarray(signs)
    if patterns.ndim != 2 or patterns.shape[1] != n or not np.isin(patterns, (-1, 1)).all():
        raise ValueError(f"expected signs of shape (resamples, {n}), each -1 or 1, got the shape {patterns.shape}")
    if 2 / (len(patterns) + 1) > level:
        raise ValueError(f"{len(patterns)} random patterns cannot reach p = {level:.3g}, give more")
    return patterns
