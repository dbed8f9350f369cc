"""Effect size and equivalence against pingouin, statsmodels and second routes."""

from itertools import pairwise

import numpy as np
import pingouin
import pytest
from scipy import integrate, special, stats
from statsmodels.stats.weightstats import ttost_paired

from peft_vit.statistics import (
    beyond_margin,
    effect_size,
    equivalence,
    hedges_factor,
    inferiority,
    mean_interval,
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
    own = effect_size(left - right)
    d = pingouin.compute_effsize(left, right, paired=True, eftype="cohen_dz")
    assert own.d == pytest.approx(d, **CLOSE)
    t = d * np.sqrt(n)
    theirs = special.nctdtrinc(n - 1, [0.975, 0.025], t) / np.sqrt(n)
    assert (own.low, own.high) == pytest.approx(theirs, rel=1e-5, abs=1e-6)  # scipy stops its search there
    assert noncentral_t(t, n - 1, own.low * np.sqrt(n)) == pytest.approx(0.975, **CLOSE)
    assert noncentral_t(t, n - 1, own.high * np.sqrt(n)) == pytest.approx(0.025, **CLOSE)
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
