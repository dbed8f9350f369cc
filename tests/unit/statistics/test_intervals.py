import numpy as np
import pytest

from peft_vit.statistics import mean_interval, proportion_interval


def test_one_seed_has_no_interval() -> None:
    interval = mean_interval([0.8])
    assert (interval.estimate, interval.low, interval.high, interval.n) == (0.8, None, None, 1)


@pytest.mark.parametrize("values", [[], [np.nan, 1.0], [np.inf], [[1.0, 2.0]]])
def test_bad_values_are_refused(values: list) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_interval(values)


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
