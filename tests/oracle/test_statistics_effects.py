"""Effect size, equivalence and mixed models against pingouin, statsmodels and second routes."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pingouin
import pytest
from scipy import integrate, special, stats
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.stats.weightstats import ttost_paired

from peft_vit.statistics import (
    beyond_margin,
    effect_size,
    equivalence,
    hedges_factor,
    inferiority,
    mean_interval,
    mixed_effect,
    noninferiority,
)

CLOSE = {"rel": 1e-12, "abs": 1e-12}


def noncentral_t(t: float, degrees: int, noncentrality: float) -> float:
    """Return the probability below t by integrating over the chi-square variable: no library's noncentral t."""

    def below(u: float) -> float:
        return special.ndtr(t * np.sqrt(u / degrees) - noncentrality) * stats.chi2.pdf(u, degrees)

    middle, scale = degrees, np.sqrt(2 * degrees)
    points = [0.0, *(middle + scale * np.array([-0.5, 0, 1, 3, 8, 40])).clip(1e-3)]
    parts = [integrate.quad(below, a, b, epsabs=1e-14, epsrel=1e-13)[0] for a, b in pairwise(points)]
    return sum(parts)


@pytest.mark.parametrize("n", [3, 5, 10, 40])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.4, 3.0])
def test_effect_size_equals_pingouin_and_its_interval_the_noncentral_t(n: int, shift: float) -> None:
    rng = np.random.default_rng(n)
    left, right = rng.normal(shift, 1, n), rng.normal(0, 0.5, n)
    own = effect_size(left - right, 0.9)
    d = pingouin.compute_effsize(left, right, paired=True, eftype="cohen_dz")
    assert own.d == pytest.approx(d, **CLOSE)
    t = d * np.sqrt(n)
    theirs = special.nctdtrinc(n - 1, [0.95, 0.05], t) / np.sqrt(n)
    assert (own.low, own.high) == pytest.approx(theirs, rel=1e-5, abs=1e-6)  # scipy stops its search there
    assert own.low is not None
    assert own.high is not None
    assert noncentral_t(t, n - 1, own.low * np.sqrt(n)) == pytest.approx(0.95, **CLOSE)
    assert noncentral_t(t, n - 1, own.high * np.sqrt(n)) == pytest.approx(0.05, **CLOSE)
    assert own.g == pytest.approx(hedges_factor(n - 1) * d, **CLOSE)


@pytest.mark.parametrize("degrees", [2, 4, 9, 50])
def test_hedges_factor_is_the_inverse_bias(degrees: int) -> None:
    """The mean of a noncentral t with noncentrality 1, from scipy, is 1 / J; Hedges' own approximation is near."""
    assert 1 / hedges_factor(degrees) == pytest.approx(stats.nct.mean(degrees, 1.0), rel=1e-12)
    assert hedges_factor(degrees) == pytest.approx(1 - 3 / (4 * degrees - 1), abs=0.01)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30])
@pytest.mark.parametrize("margin", [0.2, 1.0, 3.0])
def test_equivalence_equals_pingouin_and_statsmodels(n: int, margin: float) -> None:
    rng = np.random.default_rng(n)
    left, right = rng.normal(0.1, 1, n), rng.normal(0, 1, n)
    own = equivalence(left - right, margin).p_value
    assert own == pytest.approx(float(pingouin.tost(left, right, margin, paired=True)["pval"].iloc[0]), **CLOSE)
    assert own == pytest.approx(ttost_paired(left, right, -margin, margin)[0], **CLOSE)
    assert own is not None
    if 1e-6 < own < 0.5:  # the (1 - 2 p) interval touches a margin
        interval = mean_interval(left - right, 1 - 2 * own)
        assert max(abs(interval.low), abs(interval.high)) == pytest.approx(margin, rel=1e-9)


@pytest.mark.parametrize("shift", [-3.0, -0.5, 0.0, 2.0])
def test_what_refutes_equals_scipy_and_the_interval_beyond_the_margin(shift: float) -> None:
    differences = np.random.default_rng(1).normal(shift, 1, 8)
    worse = stats.ttest_1samp(differences, -0.5, alternative="less").pvalue
    better = stats.ttest_1samp(differences, 0.5, alternative="greater").pvalue
    assert inferiority(differences, 0.5).p_value == pytest.approx(worse, **CLOSE)
    assert beyond_margin(differences, 0.5).p_value == pytest.approx(min(1, 2 * min(worse, better)), **CLOSE)
    above = stats.ttest_1samp(differences, -0.5, alternative="greater").pvalue
    assert noninferiority(differences, 0.5).p_value == pytest.approx(above, **CLOSE)


def grouped(seed: int, groups: int, between: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pairs of runs by group: (2 groups,) response, condition, label."""
    rng = np.random.default_rng(seed)
    label, condition = np.repeat(np.arange(groups), 2), np.tile([0.0, 1.0], groups)
    response = 0.8 + 0.01 * condition + rng.normal(0, between, groups)[label] + rng.normal(0, 0.005, 2 * groups)
    return response, condition, label


@pytest.mark.parametrize("groups", [3, 5, 10])
def test_mixed_effect_of_complete_pairs_is_the_paired_difference(groups: int) -> None:
    """Restricted likelihood on complete pairs has a closed form; with n - 1 degrees the interval is the paired t's."""
    response, condition, label = grouped(groups, groups, 0.03)
    own = mixed_effect(response, condition, label)
    differences = response[1::2] - response[::2]
    assert own.estimate == pytest.approx(differences.mean(), abs=1e-12)
    paired = mean_interval(differences)
    assert (own.low, own.high) == pytest.approx((paired.low, paired.high), abs=1e-3 * (paired.high - paired.low))
    assert own.degrees == groups - 1
    assert (own.note, own.n, own.groups) == (None, 2 * groups, groups)


@pytest.mark.parametrize("seed", range(3))
def test_mixed_effect_with_missing_runs_is_weighted_least_squares_and_statsmodels_formula(seed: int) -> None:
    response, condition, label = (part[3:-2] for part in grouped(seed, 8, 0.02))  # three groups have one run
    own = mixed_effect(response, condition, label)
    assert own.between is not None
    assert own.within is not None
    X = np.column_stack([np.ones_like(condition), condition])
    V = own.within**2 * np.eye(len(response)) + own.between**2 * (label[:, None] == label[None, :])
    covariance = np.linalg.inv(X.T @ np.linalg.solve(V, X))
    assert own.estimate == pytest.approx((covariance @ X.T @ np.linalg.solve(V, response))[1], rel=1e-8)
    assert own.low is not None
    # statsmodels inverts the Hessian of all parameters, the variances among them: close to the block of the effects
    assert own.degrees == len(response) - own.groups - 1
    t = stats.t.ppf(0.975, own.degrees)
    assert own.estimate - own.low == pytest.approx(t * np.sqrt(covariance[1, 1]), rel=2e-3)
    table = pd.DataFrame({"y": 100 * response, "x": condition, "g": label}).sample(frac=1, random_state=seed)
    theirs = MixedLM.from_formula("y ~ x", table, groups="g").fit()
    assert 100 * own.estimate == pytest.approx(theirs.params["x"], rel=1e-4)
    assert 100 * (own.estimate - own.low) / t == pytest.approx(theirs.bse["x"], rel=1e-3)


def test_mixed_effect_of_a_condition_that_varies_between_groups_has_fewer_degrees() -> None:
    response, _, label = grouped(0, 6, 0.02)
    own = mixed_effect(response, label >= 3, label)
    means = response.reshape(6, 2).mean(axis=1)
    theirs = stats.ttest_ind(means[3:], means[:3]).confidence_interval()  # groups are what is drawn: their means
    assert own.degrees == 4
    assert (own.low, own.high) == pytest.approx((theirs.low, theirs.high), rel=1e-3)
