"""Runs on one or many tasks: interquartile mean and probability of improvement.

Arrays are (runs, tasks), or (runs,) for one task. Intervals come from the stratified bootstrap: each task's runs are
resampled by themselves, and tasks are never resampled, so the interval describes what another draw of seeds would
change on these tasks. It says nothing about other tasks. Assumption: runs are independent draws within a task.
Source: Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice (NeurIPS 2021).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from peft_vit.statistics.bootstrap import percentile_interval
from peft_vit.statistics.checked import between_zero_and_one, finite, runs_by_task, without_rounding
from peft_vit.statistics.intervals import Interval


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
    return percentile_interval(interquartile_mean(data), means, len(data), confidence)


def probability_of_improvement(
    values: ArrayLike, reference: ArrayLike, indices: ArrayLike, reference_indices: ArrayLike, confidence: float = 0.95
) -> Interval:
    """Return the probability that a run of `values` beats one of `reference`, with its stratified bootstrap interval.

    In each task the share of all pairs of runs in which the first is larger, ties counted as half (Mann & Whitney,
    Annals of Mathematical Statistics 18, 1947); then the mean over tasks. Runs need not be paired; those that share
    a seed are better served by `paired_improvement`. Source: Agarwal et al. (2021), 4.4.

    Where every run of one side beats every run of the other, resampling shows no spread and there is no interval,
    for it would claim certainty.

    Args:
        values: (runs, tasks) or (runs,).
        reference: (other runs, tasks) or (other runs,), on the same tasks in the same order.
        indices: (B, runs, tasks) from `stratified_indices`: positions among each task's runs in ascending order.
        reference_indices: (B, other runs, tasks) likewise.
        confidence: nominal coverage, between 0 and 1.

    Returns:
        The interval; n counts the runs of the smaller side.

    Raises:
        ValueError: for values that are not finite, unequal tasks, indices of another shape or out of range.
    """
    between_zero_and_one(confidence, "confidence")
    left = np.sort(runs_by_task(values, "values"), axis=0)
    right = np.sort(runs_by_task(reference, "reference"), axis=0)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"expected the same tasks on both sides, got {left.shape[1]} and {right.shape[1]}")
    both = _in_order(np.concatenate([left, right]))
    left, right = both[: len(left)], both[len(left) :]
    wins = 0.5 * (np.sign(left.T[:, :, None] - right.T[:, None, :]) + 1)  # (tasks, runs, other runs) of 0, 0.5, 1
    counts = _counts(_checked_indices(indices, left.shape))
    reference_counts = _counts(_checked_indices(reference_indices, right.shape))
    if counts.shape[1] != reference_counts.shape[1]:
        raise ValueError("expected as many resamples of one side as of the other")
    won = counts @ wins  # (tasks, B, other runs), each what the resample wins against one run; halves are exact
    sums = (won * reference_counts).sum(axis=(0, 2))
    return percentile_interval(float(wins.mean()), sums / wins.size, min(len(left), len(right)), confidence)


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


def _middle(ascending: np.ndarray) -> np.ndarray:
    """Return the mean of the middle half of each row: (B, n) to (B,)."""
    cut = ascending.shape[1] // 4
    return ascending[:, cut : ascending.shape[1] - cut].mean(axis=1)


def _in_order(columns: np.ndarray) -> np.ndarray:
    """Return tasks in an order that depends on their values only: (runs, tasks) to the same."""
    return np.ascontiguousarray(columns[:, np.lexsort(columns[::-1])])


def _counts(indices: np.ndarray) -> np.ndarray:
    """Return how often each run was drawn: (B, runs, tasks) to (tasks, B, runs)."""
    resamples, runs, tasks = indices.shape
    cells = (np.arange(tasks) * resamples + np.arange(resamples)[:, None])[:, None, :] * runs + indices
    return np.bincount(cells.ravel(), minlength=indices.size).reshape(tasks, resamples, runs).astype(np.float64)


def _checked_indices(indices: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    rows = np.asarray(indices)
    if rows.ndim != 3 or rows.shape[1:] != shape or len(rows) == 0 or rows.dtype.kind not in "iu":
        raise ValueError(f"expected whole indices of shape (resamples, {shape[0]}, {shape[1]}), got {rows.shape}")
    if rows.min() < 0 or rows.max() >= shape[0]:
        raise ValueError(f"expected indices from 0 to {shape[0] - 1}, got {rows.min()} to {rows.max()}")
    return rows
