"""The mean over strata: Welch's and Student's intervals are its cases of two strata and of one."""

import numpy as np
import pytest
from scipy import stats

from peft_vit.base.statistics import stratified_mean

A, B = [0.010, 0.014, 0.006], [0.030, 0.022, 0.026, 0.034]


def test_two_strata_are_welchs_interval_halved() -> None:
    interval, test = stratified_mean([A, B])
    welch = stats.ttest_ind(A, np.negative(B), equal_var=False)
    ends = welch.confidence_interval(0.95)
    assert interval.estimate == pytest.approx((np.mean(A) + np.mean(B)) / 2, rel=1e-12)
    assert interval.low == pytest.approx(ends.low / 2, rel=1e-9)
    assert interval.high == pytest.approx(ends.high / 2, rel=1e-9)
    assert test.p_value == pytest.approx(welch.pvalue, rel=1e-9)
    assert interval.n == 7


def test_one_stratum_is_students_interval_and_no_order_matters() -> None:
    (interval, test), ends = stratified_mean([B]), stats.ttest_1samp(B, 0)
    assert interval.low == pytest.approx(ends.confidence_interval().low, rel=1e-9)
    assert test.p_value == pytest.approx(ends.pvalue, rel=1e-9)
    values = np.random.default_rng(1).normal(size=(3, 7))
    assert stratified_mean(list(values)) == stratified_mean([row[::-1] for row in values[::-1]])


@pytest.mark.parametrize(("strata", "reason"), [([A, [0.1]], "single pair"), ([[0.1, 0.1], [0.3 - 0.1] * 3], "spread")])
def test_no_interval_without_spread(strata, reason) -> None:
    interval, test = stratified_mean(strata)
    assert (interval.low, test.p_value) == (None, None)
    assert reason in (interval.reason or "")


def test_the_pooled_interval_covers_and_the_test_keeps_its_level() -> None:
    """Planted: unequal variances, unequal numbers of seeds, a mean over studies of 0."""
    rng = np.random.default_rng(2)
    trials = 1000
    covered = 0
    for _ in range(trials):
        strata = [mean + spread * rng.normal(size=n) for mean, spread, n in ((-1, 0.3, 3), (0, 2.0, 6), (1, 1.0, 5))]
        interval = stratified_mean(strata)[0]
        covered += interval.low <= 0 <= interval.high
    assert covered / trials == pytest.approx(0.95, abs=3 * np.sqrt(0.95 * 0.05 / trials))
