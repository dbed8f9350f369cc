"""Group-sequential bounds: equal to published tables, to integration of the multivariate normal, and to simulation."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from peft_vit.statistics.spending import Spending, boundaries, crossing_probabilities, repeated_p_values, spent

FIVE = [0.2, 0.4, 0.6, 0.8, 1.0]
FORMS: tuple[Spending, ...] = ("obrien-fleming", "pocock")


def covariance(fractions: list[float]) -> np.ndarray:
    """Of the looks' normal statistics, from its definition."""
    return np.array([[math.sqrt(min(s, t) / max(s, t)) for s in fractions] for t in fractions])


def unequal(draws: list[float]) -> list[float]:
    steps = np.cumsum(draws)
    return [*(steps[:-1] / steps[-1]), 1.0]


@pytest.mark.parametrize(
    ("form", "published"),
    [("obrien-fleming", [4.877, 3.357, 2.680, 2.290, 2.031]), ("pocock", [2.438, 2.427, 2.410, 2.397, 2.386])],
)
def test_bounds_that_spend_equal_published_ones(form: Spending, published: list[float]) -> None:
    """Two-sided 5 %, five equal looks: Jennison & Turnbull (2000), 7.2; tables are two-sided, ours 2.5 % one-sided."""
    assert boundaries(FIVE, 0.025, form) == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize(
    ("looks", "obrien_fleming", "pocock"),
    [(1, 1.960, 1.960), (2, 1.977, 2.178), (3, 2.004, 2.289), (4, 2.024, 2.361), (5, 2.040, 2.413), (10, 2.087, 2.555)],
)
def test_classical_bounds_are_crossed_as_often_as_published(looks: int, obrien_fleming: float, pocock: float) -> None:
    """Two-sided 5 %: Jennison & Turnbull (2000), tables 2.1 and 2.3, to the digits that are printed there."""
    fractions = [k / looks for k in range(1, looks + 1)]
    for bounds in ([obrien_fleming / math.sqrt(t) for t in fractions], [pocock] * looks):
        up, down = crossing_probabilities(fractions, bounds, [-bound for bound in bounds])
        assert up == pytest.approx(down)
        assert up.sum() + down.sum() == pytest.approx(0.05, abs=1.5e-4)  # a constant is rounded to three digits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fractions", [FIVE, [0.1, 0.15, 0.9, 1.0]])
@pytest.mark.parametrize("level", [0.05, 0.05 / 11])
def test_bounds_hold_their_level_by_integration_of_the_multivariate_normal(
    form: Spending, fractions: list[float], level: float
) -> None:
    bounds = boundaries(fractions, level, form)
    for k in range(2, len(fractions) + 1):
        inside = stats.multivariate_normal(cov=covariance(fractions)[:k, :k], seed=0, maxpts=400_000, abseps=1e-7).cdf(
            bounds[:k]
        )
        assert 1 - inside == pytest.approx(spent(fractions, level, form)[k - 1], abs=3e-6 + 1e-3 * level)


def test_power_equals_that_of_simulated_paths() -> None:
    rng = np.random.default_rng(1)
    fractions, drift, paths = [0.3, 0.5, 1.0], 2.2, 200_000
    upper, lower = boundaries(fractions, 0.05, "pocock"), np.array([-0.5, 0.3, 1.0])
    steps = np.diff(fractions, prepend=0.0)
    motion = np.cumsum(rng.normal(drift * steps, np.sqrt(steps), (paths, 3)), axis=1) / np.sqrt(fractions)
    up, down, inside = np.zeros(3), np.zeros(3), np.ones(paths, dtype=bool)
    for k in range(3):
        up[k], down[k] = np.mean(inside & (motion[:, k] > upper[k])), np.mean(inside & (motion[:, k] < lower[k]))
        inside &= (motion[:, k] <= upper[k]) & (motion[:, k] >= lower[k])
    found = crossing_probabilities(fractions, upper, lower, drift)
    assert found[0] == pytest.approx(up, abs=4 * math.sqrt(0.25 / paths))
    assert found[1] == pytest.approx(down, abs=4 * math.sqrt(0.25 / paths))


@given(
    draws=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6),
    level=st.floats(1e-4, 0.3),
    form=st.sampled_from(FORMS),
)
def test_paths_without_drift_cross_with_the_level(draws: list[float], level: float, form: Spending) -> None:
    fractions = unequal(draws)
    up, _ = crossing_probabilities(fractions, boundaries(fractions, level, form))
    assert np.cumsum(up) == pytest.approx(spent(fractions, level, form), rel=1e-6)


@given(draws=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6), form=st.sampled_from(FORMS))
@settings(max_examples=25)
def test_a_larger_level_has_lower_bounds_at_every_look(draws: list[float], form: Spending) -> None:
    """What Holm's procedure on the looks' bounds asks (Maurer & Bretz (2013), condition 4)."""
    bounds = [boundaries(unequal(draws), level, form) for level in (1e-6, 1e-3, 0.005, 0.05, 0.2, 0.4)]
    assert all(np.all(low <= high) for high, low in pairwise(bounds))


@pytest.mark.parametrize("form", FORMS)
def test_a_repeated_p_value_is_the_level_whose_bound_was_met(form: Spending) -> None:
    for level in (1e-7, 0.0123, 0.05 / 11, 0.05, 0.3):
        for k, bound in enumerate(boundaries(FIVE, level, form)):
            statistics = np.full((2, 5), -3.0)
            statistics[1, k] = bound
            p_values = repeated_p_values(statistics, FIVE, form)
            assert p_values[0] == pytest.approx(1.0)
            assert p_values[1, k:] == pytest.approx(level, rel=2e-4)  # and it never rises again
            assert p_values[1, :k] == pytest.approx(1.0)


def test_no_number_is_no_evidence() -> None:
    assert repeated_p_values(np.array([np.nan, np.inf, 0.0]), FIVE, "pocock").tolist() == [
        1.0,
        *[pytest.approx(0, abs=1e-14)] * 2,
    ]


@pytest.mark.parametrize("fractions", [[], [0.0, 1.0], [0.5, 0.5, 1.0], [0.5, 0.9]])
def test_fractions_that_do_not_rise_to_one_are_refused(fractions: list[float]) -> None:
    with pytest.raises(ValueError, match="fractions of information that rise from above 0 to 1"):
        boundaries(fractions, 0.05)
