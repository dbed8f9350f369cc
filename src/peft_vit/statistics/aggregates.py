"""Runs on one or many tasks: interquartile mean, and who wins a pair.

Arrays are (runs, tasks), or (runs,) for one task. The interquartile mean's interval is the stratified bootstrap's: each
task's runs are resampled by themselves, and tasks are never resampled, so the interval describes what another draw of
seeds would change on these tasks. It says nothing about other tasks. Assumption: runs are independent draws within a
task. With a handful of seeds it is too short, as no resample goes beyond the values observed (docs/statistics.md).
Source: Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice (NeurIPS 2021).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from peft_vit.statistics.checked import ROUNDING, between_zero_and_one, finite, runs_by_task, without_rounding
from peft_vit.statistics.intervals import Interval


def stratified_indices(runs: int, tasks: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return positions of runs drawn with replacement, independently in each task: (resamples, runs, tasks).

    Source: the stratified bootstrap of Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical
    Precipice (NeurIPS 2021), as in rliable.
    """
    return generator.integers(0, runs, (resamples, runs, tasks))


def interquartile_mean(scores: ArrayLike) -> float:
    """Return the mean of the middle half of all runs on all tasks: a quarter of the values is left out at each end.

    What is left out is rounded down, so with fewer than four values this is the mean. A description of the scores
    given. Source: Agarwal et al. (2021); `scipy.stats.trim_mean` with a quarter.

    Args:
        scores: (runs, tasks) or (runs,).

    Raises:
        ValueError: for no values, another shape, or values that are not finite.
    """
    data = np.sort(runs_by_task(scores, "scores").ravel())
    return float(_middle(data[None])[0])


def interquartile_mean_interval(scores: ArrayLike, indices: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the interquartile mean with its percentile interval by the stratified bootstrap, as rliable does.

    Args:
        scores: (runs, tasks) or (runs,).
        indices: (B, runs, tasks) from `stratified_indices`: positions among each task's runs in ascending order; tasks
            in ascending order of their sorted runs.
        confidence: nominal coverage, between 0 and 1.

    Returns:
        The interval; n counts the runs of each task.

    Raises:
        ValueError: for values that are not finite, indices of another shape or out of range.
    """
    between_zero_and_one(confidence, "confidence")
    data = _in_order(np.sort(runs_by_task(scores, "scores"), axis=0))
    rows = _checked_indices(indices, data.shape)
    resampled = np.take_along_axis(data[None], rows, axis=1)  # (B, runs, tasks)
    means = _middle(np.sort(resampled.reshape(len(rows), -1), axis=1))
    return _percentile_interval(interquartile_mean(data), means, len(data), confidence)


def paired_improvement(differences: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the share of pairs with a positive difference, ties counted as half, with Wilson's score interval.

    Describes what another draw of seeds would change in who wins a pair. Wilson's interval, not the bootstrap: where
    all pairs go one way, which is common with few seeds, resampling shows no spread. With ties the variance is
    smaller than a share's, so the interval is too wide rather than too short.

    Assumption: pairs are independent. Sources: Dixon & Mood, JASA 41 (1946), on signs of pairs; Wilson, JASA 22 (1927).

    Args:
        differences: (n,) one difference a pair.
        confidence: nominal coverage, between 0 and 1.

    Raises:
        ValueError: for no values, or values that are not finite.
    """
    between_zero_and_one(confidence, "confidence")
    data = without_rounding(finite(differences, "differences"))
    n = int(data.size)
    share = float(np.count_nonzero(data > 0) + 0.5 * np.count_nonzero(data == 0)) / n
    z = float(special.ndtri(0.5 + confidence / 2))
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(share, max(0.0, center - half), min(1.0, center + half), n, confidence)


def _percentile_interval(estimate: float, resampled: np.ndarray, n: int, confidence: float) -> Interval:
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


def _middle(ascending: np.ndarray) -> np.ndarray:
    """Return the mean of the middle half of each row: (B, n) to (B,)."""
    cut = ascending.shape[1] // 4
    return ascending[:, cut : ascending.shape[1] - cut].mean(axis=1)


def _in_order(columns: np.ndarray) -> np.ndarray:
    """Return tasks in an order that depends on their values only: (runs, tasks) to the same."""
    return np.ascontiguousarray(columns[:, np.lexsort(columns[::-1])])


def _checked_indices(indices: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    rows = np.asarray(indices)
    if rows.ndim != 3 or rows.shape[1:] != shape or len(rows) == 0 or rows.dtype.kind not in "iu":
        raise ValueError(f"expected whole indices of shape (resamples, {shape[0]}, {shape[1]}), got {rows.shape}")
    if rows.min() < 0 or rows.max() >= shape[0]:
        raise ValueError(f"expected indices from 0 to {shape[0] - 1}, got {rows.min()} to {rows.max()}")
    return rows
