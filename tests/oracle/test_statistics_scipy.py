"""Closed forms against scipy and statsmodels, to 1e-12."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from peft_vit.statistics import (
    holm,
    mean_interval,
    noninferiority,
    normalized_entropy,
    paired_improvement,
    proportion_interval,
    spearman,
    wilcoxon,
)

CLOSE = {"rel": 1e-12, "abs": 1e-12}


@pytest.mark.parametrize("n", [2, 3, 5, 10, 200])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_mean_interval_equals_scipy(n: int, confidence: float) -> None:
    values = np.random.default_rng(n).normal(0.8, 0.02, n)
    own = mean_interval(values, confidence)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert own.estimate == pytest.approx(values.mean(), **CLOSE)
    assert (own.low, own.high) == pytest.approx((theirs.low, theirs.high), **CLOSE)


@pytest.mark.parametrize("n", [2, 5, 12])
@pytest.mark.parametrize("margin", [0.1, 1.0])
def test_noninferiority_equals_the_interval_that_stays_above_the_margin(n: int, margin: float) -> None:
    rng = np.random.default_rng(n)
    left, right = rng.normal(size=n), rng.normal(size=n)
    p_value = noninferiority(left - right, margin).p_value
    # Written out: t = (mean + margin) / (s / sqrt(n)), upper tail.
    difference = left - right
    t = (difference.mean() + margin) / (difference.std(ddof=1) / np.sqrt(n))
    assert p_value == pytest.approx(stats.t.sf(t, n - 1), **CLOSE)
    # The one-sided test at alpha and the (1 - 2 alpha) interval say the same.
    low = mean_interval(difference, 1 - 2 * p_value).low if p_value < 0.5 else None
    assert low is None or low == pytest.approx(-margin, rel=1e-9)


def test_noninferiority_needs_spread_and_a_margin() -> None:
    assert noninferiority([0.5, 0.5, 0.5], 1.0).p_value is None
    assert noninferiority([0.5], 1.0).p_value is None
    with pytest.raises(ValueError, match="positive margin"):
        noninferiority([0.1, 0.2], 0.0)


@pytest.mark.parametrize("n", range(1, 26))
def test_wilcoxon_without_ties_equals_scipy_exact(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.4, 1, n)
    theirs = stats.wilcoxon(differences, method="exact").pvalue
    assert wilcoxon(differences).p_value == pytest.approx(theirs, **CLOSE)


@pytest.mark.parametrize("seed", range(8))
def test_wilcoxon_with_ties_and_zeros_equals_scipy_over_all_sign_patterns(seed: int) -> None:
    differences = np.random.default_rng(seed).integers(-3, 5, 11).astype(float)
    nonzero = differences[differences != 0]
    theirs = stats.wilcoxon(nonzero, method=stats.PermutationMethod(n_resamples=np.inf)).pvalue
    own = wilcoxon(differences)
    assert own.n == nonzero.size
    assert own.p_value == pytest.approx(theirs, **CLOSE)


def test_wilcoxon_beyond_fifty_pairs_is_scipys_approximation() -> None:
    differences = np.random.default_rng(0).normal(0.2, 1, 60)
    own = wilcoxon(differences)
    assert own.p_value == pytest.approx(stats.wilcoxon(differences, method="approx").pvalue, **CLOSE)
    assert "approximation" in own.test


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (7, 10), (491, 600), (600, 600)])
def test_proportion_interval_equals_scipys_wilson_interval(successes: int, n: int) -> None:
    theirs = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    own = proportion_interval(successes, n)
    assert (own.low, own.high) == pytest.approx((theirs.low, theirs.high), **CLOSE)


@pytest.mark.parametrize("differences", [[1, 2, 3, 4, 5], [1, -1, 2, 0, 0], [-1.0], [0, 0, 0]])
def test_paired_improvement_equals_statsmodels_wilson_interval(differences: list[float]) -> None:
    wins = np.count_nonzero(np.array(differences) > 0) + 0.5 * differences.count(0)
    own = paired_improvement(differences)
    assert own.estimate == pytest.approx(wins / len(differences), **CLOSE)
    assert (own.low, own.high) == pytest.approx(proportion_confint(wins, len(differences), 0.05, "wilson"), **CLOSE)


@pytest.mark.parametrize("seed", range(5))
def test_entropy_equals_scipy(seed: int) -> None:
    ranks = np.random.default_rng(seed).integers(0, 6, 72)
    assert normalized_entropy(ranks) == pytest.approx(stats.entropy(ranks) / np.log(72), **CLOSE)


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_pearson_of_midranks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, 5, 30), rng.normal(size=30)
    theirs = np.corrcoef(stats.rankdata(left), stats.rankdata(right))[0, 1]
    assert spearman(left, right) == pytest.approx(theirs, **CLOSE)


@pytest.mark.parametrize("seed", range(5))
def test_holm_equals_closed_testing_with_bonferroni(seed: int) -> None:
    """Holm's procedure is the closure of Bonferroni's: enumerate every intersection hypothesis."""
    p_values = np.random.default_rng(seed).uniform(0, 0.2, 6).round(2)  # rounding makes ties
    indices = range(p_values.size)
    closed = [
        max(
            min(1.0, size * min(p_values[list(subset)]))
            for size in range(1, p_values.size + 1)
            for subset in combinations(indices, size)
            if i in subset
        )
        for i in indices
    ]
    assert holm(list(p_values)) == pytest.approx(closed, **CLOSE)
