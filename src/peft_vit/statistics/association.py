"""Rank correlation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True)
class Association:
    """Spearman's rho between two lists of n values; None if one of them is constant."""

    rho: float | None
    n: int


def spearman(left: ArrayLike, right: ArrayLike) -> Association:
    """Return Spearman's rank correlation, midranks under ties.

    A description of the n values given. No p-value: the sites of one network are not independent draws, so
    the usual null distribution does not hold for them. Source: Spearman, American Journal of Psychology 15
    (1904); computed by `scipy.stats.spearmanr`.

    Args:
        left: (n,) values.
        right: (n,) values, in the same order.

    Raises:
        ValueError: for unequal lengths.
    """
    x, y = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"pairs need equal lengths, got {x.size} and {y.size}")
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Association(None, int(x.size))
    return Association(float(stats.spearmanr(x, y).statistic), int(x.size))
