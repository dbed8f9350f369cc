"""Aggregates against scipy, on identical indices, and statsmodels, to 1e-12."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from peft_vit.statistics import (
    Interval,
    interquartile_mean,
    interquartile_mean_interval,
    paired_improvement,
    stratified_indices,
)

CLOSE = {"rel": 1e-12, "abs": 1e-12}


def ends(interval: Interval) -> tuple[float, float]:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low, interval.high


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (4, 1), (5, 1), (10, 1), (5, 3), (7, 4)])
def test_interquartile_mean_equals_scipys_trimmed_mean(shape: tuple[int, int]) -> None:
    scores = np.random.default_rng(2).normal(size=shape)
    assert interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores, 0.25, axis=None), **CLOSE)


@pytest.mark.parametrize(("runs", "tasks"), [(5, 1), (4, 3)])
def test_interquartile_mean_interval_equals_scipy_on_the_same_resamples(runs: int, tasks: int) -> None:
    rng = np.random.default_rng(runs)
    scores = rng.normal(size=(runs, tasks))
    indices = stratified_indices(runs, tasks, 300, rng)
    columns = sorted(sorted(scores[:, task]) for task in range(tasks))  # runs and tasks in ascending order
    means = [
        stats.trim_mean([columns[t][i] for t in range(tasks) for i in resample[:, t]], 0.25) for resample in indices
    ]
    own = interquartile_mean_interval(scores, indices, 0.9)
    assert ends(own) == pytest.approx(tuple(np.percentile(means, [5, 95])), **CLOSE)
    assert own.n == runs


@pytest.mark.parametrize("differences", [[1, 2, 3, 4, 5], [1, -1, 2, 0, 0], [-1.0], [0, 0, 0]])
def test_paired_improvement_equals_statsmodels_wilson_interval(differences: list[float]) -> None:
    from statsmodels.stats.proportion import proportion_confint

    wins = pd.Series(differences).gt(0).sum() + 0.5 * pd.Series(differences).eq(0).sum()
    own = paired_improvement(differences, 0.9)
    assert own.estimate == pytest.approx(wins / len(differences), **CLOSE)
    assert ends(own) == pytest.approx(proportion_confint(wins, len(differences), 0.1, "wilson"), **CLOSE)
