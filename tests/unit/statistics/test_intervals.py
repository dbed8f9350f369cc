import numpy as np
import pytest
from scipy import stats

from peft_vit.statistics import mean_interval, paired_proportions


def test_one_seed_has_no_interval() -> None:
    interval = mean_interval([0.8])
    assert (interval.estimate, interval.low, interval.high, interval.n) == (0.8, None, None, 1)


@pytest.mark.parametrize("values", [[], [np.nan, 1.0], [np.inf], [[1.0]]])
def test_what_has_no_interval_is_refused(values) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_interval(values)


def test_paired_proportions_are_the_published_formula() -> None:
    """By hand: 10 cases lost and 3 gained of 50 are (11 - 4) / 52, with a variance of (15 / 52 - (7 / 52)^2) / 52."""
    interval = paired_proportions(10, 3, 50)
    half = 1.959964 * ((15 / 52 - (7 / 52) ** 2) / 52) ** 0.5
    assert (interval.estimate, interval.n, interval.confidence) == (0.14, 50, 0.95)
    assert (interval.low, interval.high) == pytest.approx((7 / 52 - half, 7 / 52 + half))


def test_paired_proportions_cover_at_their_nominal_rate_where_hardly_a_case_changes() -> None:
    """Exact coverage over the trinomial distribution; where no case changes there is an interval all the same."""
    n, lost, gained = 60, 0.05, 0.03
    covered = 0.0
    for losses in range(n + 1):
        for gains in range(n + 1 - losses):
            interval = paired_proportions(losses, gains, n)
            assert interval.low is not None
            assert interval.high is not None
            if interval.low <= lost - gained <= interval.high:
                rest = n - losses - gains
                covered += float(stats.multinomial.pmf([losses, gains, rest], n, [lost, gained, 1 - lost - gained]))
    assert 0.95 <= covered <= 0.99
    unchanged = paired_proportions(0, 0, 400)
    assert unchanged.low is not None
    assert unchanged.low < 0 == unchanged.estimate
