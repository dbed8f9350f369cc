"""Spearman's rho of many lists at once: each list is ranked once, not once a pair."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


def rho_with_last(rows: ArrayLike) -> tuple[float | None, ...]:
    """Return Spearman's rho of every row with the last one; None where one of both is constant.

    As `statistics.spearman` for each row, midranks under ties.

    Args:
        rows: (m, n) finite values, m >= 1.
    """
    rho = _matrix(rows)[:, -1]
    return tuple(None if np.isnan(value) else float(value) for value in rho)


def mean_rho_of_pairs(rows: ArrayLike) -> tuple[float | None, int]:
    """Return the mean of Spearman's rho over pairs of rows, and the number of pairs that have one.

    Args:
        rows: (m, n) finite values, m >= 1.
    """
    matrix = _matrix(rows)
    pairs = matrix[np.triu_indices(len(matrix), k=1)]
    known = pairs[~np.isnan(pairs)]
    return (float(np.mean(known)) if known.size else None), int(known.size)


def _matrix(rows: ArrayLike) -> np.ndarray:
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
