"""Intervals, tests and effect sizes against scipy, statsmodels and pingouin, or a second route; to 1e-12."""

from itertools import combinations

import numpy as np
import pingouin
import pytest
from scipy import stats
from statsmodels.stats.weightstats import ttost_paired

from peft_vit.base.statistics import (
    beyond_margin,
    equivalence,
    holm,
    inferiority,
    mean_interval,
    noninferiority,
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


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30])
@pytest.mark.parametrize("margin", [0.2, 1.0, 3.0])
def test_equivalence_equals_pingouin_and_statsmodels(n: int, margin: float) -> None:
    rng = np.random.default_rng(n)
    left, right = rng.normal(0.1, 1, n), rng.normal(0, 1, n)
    own = equivalence(left - right, margin).p_value
    assert own == pytest.approx(float(pingouin.tost(left, right, margin, paired=True)["pval"].iloc[0]), **CLOSE)
    assert own == pytest.approx(ttost_paired(left, right, -margin, margin)[0], **CLOSE)
    if 1e-6 < own < 0.5:  # the (1 - 2 p) interval touches a margin
        interval = mean_interval(left - right, 1 - 2 * own)
        assert max(abs(interval.low), abs(interval.high)) == pytest.approx(margin, rel=1e-9)


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("shift", [-3.0, -0.5, 0.0, 2.0])
def test_tests_against_a_margin_equal_scipy(shift: float, n: int) -> None:
    differences = np.random.default_rng(1).normal(shift, 1, n)
    worse = stats.ttest_1samp(differences, -0.5, alternative="less").pvalue
    better = stats.ttest_1samp(differences, 0.5, alternative="greater").pvalue
    above = stats.ttest_1samp(differences, -0.5, alternative="greater").pvalue
    assert inferiority(differences, 0.5).p_value == pytest.approx(worse, **CLOSE)
    assert beyond_margin(differences, 0.5).p_value == pytest.approx(min(1, 2 * min(worse, better)), **CLOSE)
    assert noninferiority(differences, 0.5).p_value == pytest.approx(above, **CLOSE)
    if above < 0.5:  # the one-sided test at alpha and the (1 - 2 alpha) interval say the same
        assert mean_interval(differences, 1 - 2 * above).low == pytest.approx(-0.5, rel=1e-9)
