import numpy as np
import pytest

from peft_vit.statistics import mean_interval, paired_difference, proportion_interval


def test_two_seeds_by_hand() -> None:
    interval = mean_interval([0.80, 0.82])
    # s = 0.01414, t_1 = 12.7062, half = 12.7062 * 0.01
    assert interval.estimate == pytest.approx(0.81)
    assert interval.high == pytest.approx(0.81 + 0.127062, abs=1e-6)
    assert interval.n == 2


def test_one_seed_has_no_interval() -> None:
    interval = mean_interval([0.8])
    assert (interval.estimate, interval.low, interval.high, interval.n) == (0.8, None, None, 1)


def test_order_does_not_change_a_bit() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert mean_interval(values) == mean_interval(values[::-1])


@pytest.mark.parametrize("values", [[], [np.nan, 1.0], [np.inf], [[1.0, 2.0]]])
def test_bad_values_are_refused(values: list) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_interval(values)


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="equal lengths"):
        paired_difference([1.0, 2.0], [1.0])


def test_impossible_share_is_refused() -> None:
    with pytest.raises(ValueError, match="successes"):
        proportion_interval(11, 10)


def test_t_interval_covers_at_its_nominal_rate() -> None:
    """5,000 simulated studies of five seeds: coverage within three Monte-Carlo standard errors of 95 %."""
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(5000):
        interval = mean_interval(rng.normal(0.8, 0.02, 5))
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 0.8 <= interval.high
    assert abs(hits / 5000 - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 5000)
