"""Resampling against scipy on identical indices and signs, to 1e-12."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from peft_vit.statistics import (
    Interval,
    bca_interval,
    interquartile_mean,
    interquartile_mean_interval,
    mean_interval,
    paired_improvement,
    probability_of_improvement,
    random_signs,
    resampling_indices,
    sign_flip,
    stratified_indices,
)

CLOSE = {"rel": 1e-12, "abs": 1e-12}


def scipys_interval(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], confidence: float
) -> tuple[tuple[float, float], np.ndarray]:
    """Return scipy's BCa interval and the indices that it drew: it resamples positions, and they are written down."""
    drawn: list[np.ndarray] = []

    def of_positions(positions: np.ndarray, axis: int) -> np.ndarray:
        if positions.ndim == 2 and not drawn:
            drawn.append(positions.copy())
        # scipy compares resamples with the estimate bit by bit: equal ones must add up in the same order
        return statistic(values[np.sort(positions, axis=axis)])

    theirs = stats.bootstrap(
        (np.arange(len(values)),),
        of_positions,
        n_resamples=799,
        method="BCa",
        confidence_level=confidence,
        vectorized=True,
        axis=-1,
        rng=np.random.default_rng(5),
    )
    return tuple(theirs.confidence_interval), drawn[0]


def ends(interval: Interval) -> tuple[float, float]:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low, interval.high


@pytest.mark.parametrize("n", [3, 5, 10, 40])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("kind", ["normal", "skewed", "whole numbers"])
def test_bca_interval_of_the_mean_equals_scipy(n: int, confidence: float, kind: str) -> None:
    rng = np.random.default_rng(n)
    values = {
        "normal": rng.normal(0.8, 0.02, n),
        "skewed": rng.exponential(1.0, n),
        "whole numbers": rng.integers(480, 490, n).astype(float),
    }[kind]
    values.sort()
    theirs, indices = scipys_interval(values, lambda resamples: resamples.mean(axis=-1), confidence)
    own = bca_interval(rng.permutation(values), indices, confidence=confidence)
    assert own.estimate == pytest.approx(values.mean(), **CLOSE)
    assert ends(own) == pytest.approx(theirs, **CLOSE)


@pytest.mark.parametrize(
    "statistic",
    [lambda resamples: np.median(resamples, axis=-1), lambda resamples: resamples.std(axis=-1, ddof=1)],
    ids=["median", "standard deviation"],
)
def test_bca_interval_of_another_statistic_equals_scipy(statistic: Callable) -> None:
    values = np.sort(np.random.default_rng(0).gamma(2.0, size=21))
    theirs, indices = scipys_interval(values, statistic, 0.9)
    assert ends(bca_interval(values, indices, statistic, 0.9)) == pytest.approx(theirs, **CLOSE)


def test_bca_interval_of_pairs_equals_scipy() -> None:
    """The correlation of resampled pairs."""
    rng = np.random.default_rng(3)
    left = np.sort(rng.normal(size=15))
    pairs = np.column_stack([left, left + rng.normal(size=15)])

    def correlation(resamples: np.ndarray) -> np.ndarray:
        centered = resamples - resamples.mean(axis=-2, keepdims=True)
        x, y = centered[..., 0], centered[..., 1]
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))

    theirs, indices = scipys_interval(pairs, correlation, 0.95)
    own = bca_interval(pairs[::-1], indices, correlation)
    assert own.estimate == pytest.approx(stats.pearsonr(pairs[:, 0], pairs[:, 1]).statistic, **CLOSE)
    assert ends(own) == pytest.approx(theirs, **CLOSE)


def test_indices_are_those_that_scipy_draws_from_the_same_seed() -> None:
    values = np.sort(np.random.default_rng(0).normal(size=6))
    _, drawn = scipys_interval(values, lambda resamples: resamples.mean(axis=-1), 0.95)
    np.testing.assert_array_equal(resampling_indices(6, 799, np.random.default_rng(5)), drawn)


def test_shares_that_differ_by_rounding_only_get_the_interval_of_their_counts() -> None:
    """Equal means of k / 600 differ in the last bit; those of k do not."""
    counts = np.array([487.0, 488.0, 489.0, 491.0])
    indices = resampling_indices(4, 999, np.random.default_rng(1))
    of_counts = ends(bca_interval(counts, indices))
    assert ends(bca_interval(counts / 600, indices)) == pytest.approx(np.divide(of_counts, 600), **CLOSE)


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


@pytest.mark.parametrize("n", range(1, 13))
@pytest.mark.parametrize("whole", [False, True], ids=["without ties", "with ties"])
def test_exact_sign_flip_equals_scipy(n: int, whole: bool) -> None:
    rng = np.random.default_rng(n)
    differences = rng.integers(-3, 6, n).astype(float) if whole else rng.normal(0.5, 1, n)
    nonzero = differences[differences != 0]
    own = sign_flip(differences)
    assert own.n == nonzero.size
    if n == 1:  # scipy asks for two observations
        assert own.p_value == 1.0
        return
    theirs = stats.permutation_test(
        (differences,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    assert own.p_value == pytest.approx(theirs.pvalue, **CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_random_sign_flip_equals_scipy_on_the_same_signs(seed: int) -> None:
    differences = np.sort(np.random.default_rng(seed).normal(0.3, 1, 20))
    seen: list[np.ndarray] = []

    def total(x: np.ndarray, axis: int) -> np.ndarray:
        seen.append(np.atleast_2d(np.moveaxis(x, axis, -1)) / differences)
        return x.sum(axis=axis)

    theirs = stats.permutation_test(
        (differences,), total, permutation_type="samples", n_resamples=999, rng=np.random.default_rng(seed)
    )
    signs = np.rint(max(seen, key=len).reshape(-1, 20)).astype(int)
    assert len(signs) == 999
    assert sign_flip(differences, signs=signs).p_value == pytest.approx(theirs.pvalue, **CLOSE)


def test_random_signs_approach_the_enumeration() -> None:
    differences = np.random.default_rng(8).normal(0.4, 1, 17)
    sums = (random_signs(17, 2, np.random.default_rng(0)) * differences).sum(axis=1)
    assert sums.shape == (2,)
    all_signs = 1 - 2 * ((np.arange(2**17)[:, None] >> np.arange(17)) & 1)
    exact = np.mean(np.abs(all_signs @ differences) >= abs(differences.sum()) - 1e-12)
    sampled = sign_flip(differences, signs=random_signs(17, 20_000, np.random.default_rng(0))).p_value
    assert sampled == pytest.approx(exact, abs=2 * 3 * np.sqrt(exact / 2 / 20_000))


@pytest.mark.parametrize(("runs", "others", "tasks"), [(5, 5, 1), (3, 6, 2)])
def test_probability_of_improvement_equals_mann_whitney_on_the_same_resamples(runs, others, tasks) -> None:
    rng = np.random.default_rng(runs)
    values, reference = rng.integers(0, 9, (runs, tasks)), rng.integers(0, 8, (others, tasks))  # ties
    indices, other_indices = (stratified_indices(size, tasks, 60, rng) for size in (runs, others))

    def probability(left: np.ndarray, right: np.ndarray) -> float:
        shares = [stats.mannwhitneyu(left[:, t], right[:, t]).statistic / (runs * others) for t in range(tasks)]
        return float(np.mean(shares))

    left, right = np.sort(values, axis=0), np.sort(reference, axis=0)
    order = sorted(range(tasks), key=lambda t: (*left[:, t], *right[:, t]))
    left, right = left[:, order], right[:, order]
    resampled = [
        probability(np.take_along_axis(left, i, 0), np.take_along_axis(right, j, 0))
        for i, j in zip(indices, other_indices, strict=True)
    ]
    own = probability_of_improvement(values, reference, indices, other_indices)
    assert own.estimate == pytest.approx(probability(values, reference), **CLOSE)
    assert ends(own) == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])), **CLOSE)
    assert own.n == min(runs, others)


@pytest.mark.parametrize("differences", [[1, 2, 3, 4, 5], [1, -1, 2, 0, 0], [-1.0], [0, 0, 0]])
def test_paired_improvement_equals_statsmodels_wilson_interval(differences: list[float]) -> None:
    from statsmodels.stats.proportion import proportion_confint

    wins = pd.Series(differences).gt(0).sum() + 0.5 * pd.Series(differences).eq(0).sum()
    own = paired_improvement(differences, 0.9)
    assert own.estimate == pytest.approx(wins / len(differences), **CLOSE)
    assert ends(own) == pytest.approx(proportion_confint(wins, len(differences), 0.1, "wilson"), **CLOSE)


def test_bca_interval_approaches_the_t_interval_with_many_values() -> None:
    values = np.random.default_rng(4).normal(0.8, 0.02, 400)
    own = bca_interval(values, resampling_indices(400, 4000, np.random.default_rng(0)))
    theirs = mean_interval(values)
    assert ends(own) == pytest.approx(ends(theirs), abs=2e-4)  # half-width 2e-3
