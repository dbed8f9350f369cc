"""Descriptions of the values given, without an interval: how unevenly a budget is spread, whether two orders agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


def gini(amounts: ArrayLike) -> float:
    """Return the Gini coefficient: 0 for equal amounts, (n - 1) / n if one site has everything.

    ``sum_ij |x_i - x_j| / (2 n^2 mean)``, computed from sorted values as ``2 sum_i i x_(i) / (n sum x) - (n +
    1) / n``. Source: Gini (1912); the sorted form: Sen, On Economic Inequality (1973), 2.

    Args:
        amounts: (n,) non-negative, e.g. ranks by site.

    Raises:
        ValueError: for no, negative or non-finite amounts, or a sum of zero.
    """
    data = np.sort(_amounts(amounts))
    n = data.size
    position = np.arange(1, n + 1)
    return float(2 * np.sum(position * data) / (n * np.sum(data)) - (n + 1) / n)


def normalized_entropy(amounts: ArrayLike) -> float:
    """Return Shannon's entropy of the shares over its largest value, log n: 1 for equal amounts, 0 for one
    site.

    Source: Shannon, Bell System Technical Journal 27 (1948); the ratio is Pielou's evenness (1966).

    Args:
        amounts: (n,) non-negative, e.g. ranks by site.

    Raises:
        ValueError: as in `gini`, or for a single site, where evenness has no meaning.
    """
    data = _amounts(amounts)
    if data.size < 2:
        raise ValueError("evenness needs at least two sites")
    shares = data[data > 0] / data.sum()
    return float(-np.sum(shares * np.log(shares)) / np.log(data.size)) + 0.0  # + 0.0 turns -0.0 into 0.0


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


def rho_with_last(rows: ArrayLike) -> tuple[float | None, ...]:
    """Return Spearman's rho of every row with the last one; None where one of both is constant.

    As `spearman` for each row, midranks under ties.

    Args:
        rows: (m, n) finite values, m >= 1.
    """
    rho = _rho_matrix(rows)[:, -1]
    return tuple(None if np.isnan(value) else float(value) for value in rho)


def mean_rho_of_pairs(rows: ArrayLike) -> tuple[float | None, int]:
    """Return the mean of Spearman's rho over pairs of rows, and the number of pairs that have one.

    Args:
        rows: (m, n) finite values, m >= 1.
    """
    matrix = _rho_matrix(rows)
    pairs = matrix[np.triu_indices(len(matrix), k=1)]
    known = pairs[~np.isnan(pairs)]
    return (float(np.mean(known)) if known.size else None), int(known.size)


def _rho_matrix(rows: ArrayLike) -> np.ndarray:
    """Return (m, m) rho; NaN where a row is constant."""
    data = np.atleast_2d(np.asarray(rows, dtype=np.float64))
    ranks = stats.rankdata(data, axis=1)
    centered = ranks - (data.shape[1] + 1) / 2
    product = centered @ centered.T  # multiples of 1/4, so exact, and equal lists have a rho of exactly 1
    squares = np.diag(product)
    outer = np.sqrt(squares[:, None] * squares)
    rho = np.divide(product, outer, out=np.full(outer.shape, np.nan), where=outer > 0)
    bounded: np.ndarray = np.clip(rho, -1.0, 1.0)
    return bounded


def _amounts(values: ArrayLike) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0 or not np.isfinite(data).all() or (data < 0).any() or data.sum() == 0:
        raise ValueError("expected non-negative finite amounts with a positive sum")
    return data
