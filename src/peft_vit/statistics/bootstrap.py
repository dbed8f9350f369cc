"""Bootstrap intervals on explicit resampling indices: nothing here draws a random number by itself.

Values are put in order before they are resampled, so the same values in another order give the same bytes.

What a bootstrap of a handful of seeds can't know: values beyond the smallest and largest observed. Its intervals are
too short there (docs/statistics.md has the coverage at n = 3, 5, 10); the t interval of `mean_interval` is the default.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from peft_vit.statistics.checked import ROUNDING, between_zero_and_one
from peft_vit.statistics.intervals import Interval

Statistic = Callable[[np.ndarray], np.ndarray]
"""Takes (B, n) resamples, or (B, n, k) of rows, and returns (B,) values, whatever the order within a resample."""


def mean(resamples: np.ndarray) -> np.ndarray:
    """Return the mean of each resample: (B, n) to (B,)."""
    return resamples.mean(axis=-1)


def resampling_indices(n: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return positions drawn with replacement, of shape (resamples, n), as `scipy.stats.bootstrap` draws them."""
    return generator.integers(0, n, (resamples, n))


def bca_interval(
    values: ArrayLike, indices: ArrayLike, statistic: Statistic = mean, confidence: float = 0.95
) -> Interval:
    """Return a statistic with its bias-corrected and accelerated bootstrap interval.

    Over seeds, the interval describes what another draw of seeds would change. Assumption: values (or rows) are
    independent draws of one distribution, and the statistic is smooth; the coverage error falls with n, and at n = 3
    it is large. Source: Efron, JASA 82 (1987); as in Efron & Tibshirani, An Introduction to the Bootstrap (1993),
    14.3, and `scipy.stats.bootstrap`.

    Args:
        values: (n,) one value a seed, or (n, k) one row a seed, which are resampled as rows (pairs as pairs).
        indices: (B, n) positions in the values, ascending (rows: by their first column, then the next).
        statistic: of many resamples at once.
        confidence: nominal coverage, between 0 and 1.

    Returns:
        The interval; with a reason instead of ends if the resamples have no spread or can't be corrected.

    Raises:
        ValueError: for values that are not finite, indices of another shape or out of range.
    """
    between_zero_and_one(confidence, "confidence")
    data = _ascending(values)
    n = len(data)
    estimate = float(statistic(data[None])[0])
    if n < 2:
        return Interval(estimate, None, None, n, confidence, "one value has no spread to resample")
    rows = np.sort(_checked_indices(indices, n), axis=1)  # equal resamples must be equal to the last bit
    left_out = np.arange(n)[None, :].repeat(n, axis=0)[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    with np.errstate(all="ignore"):  # what is undefined is named below
        resampled, jackknife = statistic(data[rows]), statistic(data[left_out])
    ends = bca_ends(estimate, resampled, jackknife, confidence)
    if isinstance(ends, str):
        return Interval(estimate, None, None, n, confidence, ends)
    return Interval(estimate, *ends, n, confidence)


def bca_ends(
    estimate: float, resampled: np.ndarray, jackknife: np.ndarray, confidence: float
) -> tuple[float, float] | str:
    """Return the ends of the BCa interval, or why there are none.

    Args:
        estimate: the statistic of the values themselves.
        resampled: (B,) the statistic of each resample.
        jackknife: (n,) the statistic without each value.
        confidence: nominal coverage.
    """
    if not (np.isfinite(resampled).all() and np.isfinite(jackknife).all()):
        bad = np.count_nonzero(~np.isfinite(resampled)) + np.count_nonzero(~np.isfinite(jackknife))
        return f"the statistic is undefined on {bad} of {resampled.size + jackknife.size} resamples"
    rounding = ROUNDING * max(float(np.abs(resampled).max()), abs(estimate))
    if np.ptp(resampled) <= rounding or np.ptp(jackknife) <= rounding:
        return "all resamples give the same value"
    below = np.count_nonzero(resampled < estimate - rounding)
    equal = np.count_nonzero(np.abs(resampled - estimate) <= rounding)
    share = (2 * below + equal) / (2 * resampled.size)
    if share in (0, 1):
        return "the estimate lies outside all resamples"
    bias = special.ndtri(share)
    deviation = jackknife.mean() - jackknife
    deviation = deviation / np.abs(deviation).max()  # the unit cancels; cubes of tiny values would vanish
    acceleration = (deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5)
    tails = bias + special.ndtri([0.5 - confidence / 2, 0.5 + confidence / 2])
    if (1 - acceleration * tails <= 0).any():
        return "the statistic is too skewed to be corrected"
    low, high = np.quantile(resampled, special.ndtr(bias + tails / (1 - acceleration * tails)))
    return float(low), float(high)


def percentile_interval(estimate: float, resampled: np.ndarray, n: int, confidence: float) -> Interval:
    """Return the percentile interval of resampled values, with a reason instead of ends if they have no spread.

    Source: Efron & Tibshirani (1993), 13.3.

    Args:
        estimate: the statistic of the values themselves.
        resampled: (B,) the statistic of each resample.
        n: number of values, or of runs of each task.
        confidence: nominal coverage.
    """
    if n < 2:
        return Interval(estimate, None, None, n, confidence, "one run has no spread to resample")
    if np.ptp(resampled) <= ROUNDING * np.abs(resampled).max():
        return Interval(estimate, None, None, n, confidence, "all resamples give the same value")
    low, high = np.quantile(resampled, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(estimate, float(low), float(high), n, confidence)


def stratified_indices(runs: int, tasks: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return positions of runs drawn with replacement, independently in each task: (resamples, runs, tasks).

    Source: the stratified bootstrap of Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical
    Precipice (NeurIPS 2021), as in rliable.
    """
    return generator.integers(0, runs, (resamples, runs, tasks))


def _ascending(values: ArrayLike) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim not in (1, 2) or data.size == 0:
        raise ValueError(f"values: expected the shape (n,) or (n, k), not empty, got {data.shape}")
    bad = np.argwhere(~np.isfinite(data))
    if len(bad):
        raise ValueError(f"values: expected finite values, got {data[tuple(bad[0])]} at position {bad[0][0]}")
    return np.sort(data) if data.ndim == 1 else data[np.lexsort(data.T[::-1])]


def _checked_indices(indices: ArrayLike, n: int) -> np.ndarray:
    rows = np.asarray(indices)
    if rows.ndim != 2 or rows.shape[1] != n or len(rows) == 0 or rows.dtype.kind not in "iu":
        raise ValueError(f"expected whole indices of shape (resamples, {n}), got {rows.dtype} of shape {rows.shape}")
    if rows.min() < 0 or rows.max() >= n:
        raise ValueError(f"expected indices from 0 to {n - 1}, got {rows.min()} to {rows.max()}")
    return rows
