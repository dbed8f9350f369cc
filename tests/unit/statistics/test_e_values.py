"""The e-process of the t test against numerical integration of what it mixes, and its level by simulation."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from peft_vit.statistics.e_values import anytime_bound, anytime_p_values, log_e_value


def t_statistic(values: np.ndarray) -> float:
    return float(stats.ttest_1samp(values, 0.0).statistic)


def by_integration(values: np.ndarray, scale: float) -> float:
    """Likelihoods of N(sigma delta, sigma^2) over half-normal delta and d sigma / sigma, over those of delta = 0."""
    n, unit = values.size, math.sqrt(np.mean(values**2))

    def likelihood(sigma: float, delta: float) -> float:
        return math.exp(-n * math.log(sigma) - np.sum((values / unit / sigma - delta) ** 2) / 2 + n / 2)

    def mixed(delta: float, log_sigma: float) -> float:
        return likelihood(math.exp(log_sigma), delta) * 2 * stats.norm.pdf(delta, scale=scale)

    above, _ = integrate.dblquad(mixed, -6, 6, 0, 8 * scale, epsabs=1e-10, epsrel=1e-8)
    zero, _ = integrate.quad(lambda log_sigma: likelihood(math.exp(log_sigma), 0.0), -6, 6, epsabs=0)
    return above / zero


@pytest.mark.parametrize(("n", "mean", "scale"), [(5, 0.9, 1.0), (7, -0.6, 1.0), (6, 0.4, 0.5)])
def test_e_values_equal_numerical_integration(n: int, mean: float, scale: float) -> None:
    values = np.random.default_rng(n).normal(mean, 1.0, n)
    assert float(log_e_value(t_statistic(values), n, scale)) == pytest.approx(
        math.log(by_integration(values, scale)), abs=1e-5
    )


def test_its_expectation_without_an_effect_is_one() -> None:
    """Exactly, at every n: by quadrature over Student's distribution."""
    for n in (2, 5, 30):
        expected, _ = integrate.quad(
            lambda t, n=n: math.exp(float(log_e_value(t, n))) * stats.t.pdf(t, n - 1), -np.inf, np.inf, limit=200
        )
        assert expected == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("mean", [0.0, -0.3])
def test_it_exceeds_one_over_the_level_at_any_time_with_at_most_the_level(mean: float) -> None:
    studies, largest = 4000, 60
    data = np.random.default_rng(3).normal(mean, 1.0, (studies, largest))
    pairs = np.arange(1, largest + 1)
    total, squares = data.cumsum(axis=1), (data**2).cumsum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = (total / pairs) / np.sqrt((squares - total**2 / pairs) / (pairs - 1) / pairs)
    t[:, 0] = np.nan
    p_values = anytime_p_values(t, pairs)
    assert np.all(np.diff(p_values, axis=1) <= 0)
    for level in (0.05, 0.2):
        assert np.mean(p_values[:, -1] <= level) <= level + 3 * math.sqrt(level * (1 - level) / studies)


def test_a_larger_t_is_more_evidence_and_the_bound_is_where_it_suffices() -> None:
    assert np.all(np.diff(log_e_value(np.linspace(-50, 50, 201), 9)) > 0)
    for n, level in ((5, 0.05), (12, 0.05 / 11), (100, 0.05)):
        assert math.exp(float(log_e_value(anytime_bound(n, level), n))) == pytest.approx(1 / level)
    assert anytime_bound(2, 0.05) == math.inf  # whatever the two pairs are, their e-value is below 20
    assert anytime_bound(1, 0.05) == math.inf


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 pairs"):
        log_e_value(1.0, 1)
    with pytest.raises(ValueError, match="a scale above 0"):
        log_e_value(1.0, 5, 0.0)
    with pytest.raises(ValueError, match="0 < level < 1"):
        anytime_bound(5, 1.0)
