"""Group-sequential bounds: equal to published tables, and to integration of the multivariate normal."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from experiments.stopping.spending import Spending, boundaries, repeated_p_values, spent

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
def test_bounds_that_spend_equal_published_ones(form, published) -> None:
    """Two-sided 5 %, five equal looks: Jennison & Turnbull (2000), 7.2; tables are two-sided, ours 2.5 % one-sided."""
    assert boundaries(FIVE, 0.025, form) == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fractions", [FIVE, [0.1, 0.15, 0.9, 1.0]])
@pytest.mark.parametrize("level", [0.05, 0.05 / 11])
def test_bounds_hold_their_level_by_integration_of_the_multivariate_normal(form, fractions, level) -> None:
    bounds = boundaries(fractions, level, form)
    for k in range(2, len(fractions) + 1):
        inside = stats.multivariate_normal(cov=covariance(fractions)[:k, :k], seed=0, maxpts=400_000, abseps=1e-7).cdf(
            bounds[:k]
        )
        assert 1 - inside == pytest.approx(spent(fractions, level, form)[k - 1], abs=3e-6 + 1e-3 * level)


@given(draws=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6), form=st.sampled_from(FORMS))
@settings(max_examples=25)
def test_a_larger_level_has_lower_bounds_at_every_look(draws, form) -> None:
    """What Holm's procedure on the looks' bounds asks (Maurer & Bretz (2013), condition 4)."""
    bounds = [boundaries(unequal(draws), level, form) for level in (1e-6, 1e-3, 0.005, 0.05, 0.2, 0.4)]
    assert all(np.all(low <= high) for high, low in pairwise(bounds))


@pytest.mark.parametrize("form", FORMS)
def test_a_repeated_p_value_is_the_level_whose_bound_was_met(form) -> None:
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
