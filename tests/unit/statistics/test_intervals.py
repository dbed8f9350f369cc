import numpy as np
import pytest
from scipy import stats

from peft_vit.base.statistics import (
    difference_interval,
    mean_interval,
    mean_of_proportions,
    paired_proportions,
    proportion_interval,
)


def test_one_seed_has_no_interval() -> None:
    interval = mean_interval([0.8])
    assert (interval.estimate, interval.low, interval.high, interval.n) == (0.8, None, None, 1)


@pytest.mark.parametrize("values", [[], [np.nan, 1.0], [np.inf], [[1.0]]])
def test_what_has_no_interval_is_refused(values) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_interval(values)


def test_a_difference_of_two_samples_is_as_published() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table II, example (a), method 10: 56 of 70 less 48 of 80."""
    interval = difference_interval(proportion_interval(48, 80), proportion_interval(56, 70))
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert interval.n == 150
    assert difference_interval(mean_interval([0.5]), interval).low is None


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


@pytest.mark.parametrize(("sizes", "lost", "gained"), [([5] * 20, 0.05, 0.05), ([40, 20, 10] * 4, 0.1, 0.03)])
def test_a_mean_of_paired_differences_is_held_as_often_as_promised(sizes, lost, gained) -> None:
    """And is not much wider than what as many images of each group really scatter."""
    rng, cases = np.random.default_rng(0), np.array(sizes)
    drawn = np.stack([rng.multinomial(own, [lost, gained, 1 - lost - gained], 2000) for own in cases], 1)  # (B, K, 3)
    found = [paired_proportions(one[:, 0], one[:, 1], cases) for one in drawn]
    assert 0.93 <= np.mean([own.low <= lost - gained <= own.high for own in found]) <= 0.995
    means = ((drawn[..., 0] - drawn[..., 1]) / cases).mean(1)
    assert [own.estimate for own in found] == pytest.approx(means)
    assert np.mean([own.high - own.low for own in found]) / (2 * 1.96 * means.std()) < 1.3
    every = paired_proportions([5] * 100, [0] * 100, [5] * 100)
    assert every.low < every.estimate == every.high == 1


@pytest.mark.parametrize(("images", "share"), [(3, 0.9), (10, 0.9), (10, 0.97)])
def test_the_mean_of_shares_of_few_cases_is_held_as_often_as_promised(images: int, share: float) -> None:
    drawn = np.sort(np.random.default_rng(images).binomial(images, share, (2000, 10)), axis=1)  # groups count alike
    hits, times = np.unique(drawn, axis=0, return_counts=True)
    found = [mean_of_proportions(own, [images] * 10) for own in hits]
    below = times @ [own.high < share for own in found] / 2000
    above = times @ [own.low > share for own in found] / 2000
    assert 0.925 <= 1 - above - below <= 0.98  # 2,000 studies: a standard error of 0.5 points
    assert below < 0.06  # a group whose few cases are all right is not known to be


def test_a_mean_of_shares_has_no_end_beyond_0_and_1() -> None:
    whole, none = mean_of_proportions([3, 200], [3, 200]), mean_of_proportions([0, 0], [3, 200])
    assert (whole.estimate, whole.high, none.estimate, none.low) == (1, 1, 0, 0)
    assert whole.low == pytest.approx(1 - none.high)
    assert 0.5 < whole.low < mean_of_proportions([30, 200], [30, 200]).low
