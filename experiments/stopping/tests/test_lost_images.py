"""What images can tell of a loss: scipy's exact binomial test and its intervals, and a bound that is counted out."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from experiments.stopping.lost_images import difference_limits, loss_bounds, loss_p_values
from experiments.stopping.sequential import StoppingRule, follow
from experiments.stopping.spending import boundaries

RULE = StoppingRule("non-inferiority", 0.01, (5, 10, 15), correlation=0.3, images=400)


@pytest.mark.parametrize("images", [1, 40, 400, 5000])
@pytest.mark.parametrize("margin", [0.01, 0.2])
def test_whole_counts_are_those_of_the_exact_binomial_test(images, margin) -> None:
    for lost in {0, 1, images // 100, images // 2, images}:
        less, more = loss_p_values(-lost / images, images, margin)
        for p_value, side in ((less, "less"), (more, "greater")):
            expected = stats.binomtest(lost, images, margin, alternative=side).pvalue
            assert p_value == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_between_whole_counts_p_values_rise_without_a_jump() -> None:
    means = np.linspace(0.02, -0.06, 4001)
    less, more = loss_p_values(means, 400, 0.01)
    assert (np.diff(less) > 0).all()
    assert (np.diff(more) <= 0).all()
    assert max(np.abs(np.diff(less)).max(), np.abs(np.diff(more)).max()) < 0.01


@pytest.mark.parametrize("images", [30, 250])
@pytest.mark.parametrize("gained", [1, 3, 6])
def test_no_image_lost_and_some_gained_is_no_more_likely_than_p(images, gained) -> None:
    margin = 0.01
    p_value = loss_p_values(gained / images, images, margin)[0]
    shares = np.linspace(0, 0.45, 400)  # gained; lost is a margin more
    none_lost = (1 - shares - margin) ** images
    likely = none_lost * stats.binom.sf(gained - 1, images, shares / (1 - shares - margin))
    assert 0.1 * p_value < likely.max() <= p_value


@pytest.mark.parametrize("images", [60, 400, 3000])
@pytest.mark.parametrize("level", [0.004, 0.05])
def test_bounds_are_where_p_values_are_the_level(images, level) -> None:
    least, most = loss_bounds(images, 0.01, (level, level / 2))
    assert loss_p_values(least, images, 0.01)[0] == pytest.approx(level, rel=1e-6)
    assert loss_p_values(most, images, 0.01)[1] == pytest.approx(level / 2, rel=1e-6)


@pytest.mark.parametrize("lost", [0, 1, 7, 300])
def test_limits_of_whole_counts_are_clopper_and_pearsons(lost) -> None:
    images, level = 300, 0.03
    ends = stats.binomtest(lost, images).proportion_ci(1 - 2 * level, method="exact")
    low, high = difference_limits(-lost / images, images, (level, level))
    assert low == pytest.approx(-ends.high)
    assert high == pytest.approx(-ends.low if lost else ends.high)
    if lost == 0:
        assert low == pytest.approx(level ** (1 / images) - 1)


@pytest.mark.parametrize("gained", [0, 0.5, 2, 4, 9])
def test_the_lower_limit_is_a_margin_whose_p_value_is_the_level(gained) -> None:
    low, high = difference_limits(gained / 300, 300, (0.03, 0.03))
    assert high > gained / 300
    if low == 0:
        assert 2**-gained < 0.03
    else:
        assert loss_p_values(gained / 300, 300, -low)[0] == pytest.approx(0.03)


@pytest.mark.parametrize(("images", "pairs"), [(400, 5), (350, 10), (332, 15)])
def test_equal_models_are_shown_as_soon_as_their_images_can(images, pairs) -> None:
    (course,) = follow({"equal": [0.0] * 15}, replace(RULE, images=images))
    assert (course.noninferiority, course.looks[-1].pairs) == ("supported", pairs)
    look = course.looks[-1]
    level = stats.norm.sf(boundaries(RULE.fractions, 0.05)[len(course.looks) - 1])
    assert 0.99**images <= level
    assert (look.low, look.high) == pytest.approx((level ** (1 / images) - 1, 1 - level ** (1 / images)))
    assert look.low > -0.01
    assert look.noninferiority is not None
    assert look.noninferiority.upper_bound <= 0 < look.noninferiority.p_value <= 0.05


def test_too_few_images_show_nothing_and_are_given_up() -> None:
    (course,) = follow({"equal": [0.0] * 15}, replace(RULE, images=150))
    assert (course.noninferiority, course.stopped, course.looks[-1].pairs) == ("not decided", "futile", 10)
    assert course.looks[-1].low == pytest.approx(-3.37 / 150, abs=5e-4)  # the rule of three, at this look's level
    (course,) = follow({"equal": [0.0] * 15}, replace(RULE, images=None))
    assert (course.noninferiority, course.stopped) == ("not decided", "maximum")
    assert math.isinf(course.looks[-1].low)


def test_an_image_more_or_less_makes_no_leap() -> None:
    """The p-value of one image lost or gained lies beside that of none, though folds scatter only with one."""
    fold = 400 // 5
    p_value_of = {}
    for images in (-1, 0, 1):
        (course,) = follow({"one": [images / fold, 0.0, 0.0, 0.0, 0.0]}, RULE)
        assert course.looks[0].noninferiority is not None
        p_value_of[images] = course.looks[0].noninferiority.p_value
    assert p_value_of[-1] > p_value_of[0] > p_value_of[1] / 2 > 0
    assert p_value_of[-1] < 6 * p_value_of[0]


def test_several_share_the_level_of_images_too() -> None:
    equal = {f"equal {i}": [0.0] * 15 for i in range(4)}
    assert {result.noninferiority for result in follow(equal, RULE)} == {"not decided"}  # one alone would be supported
    assert {result.noninferiority for result in follow(equal, replace(RULE, images=500))} == {"supported"}
    beside = {"clear": [0.04, 0.05, 0.045] * 5, "equal": [0.0] * 15}
    assert [result.noninferiority for result in follow(beside, RULE)] == ["supported", "supported"]  # Holm hands it on


def test_a_constant_loss_is_refuted_if_images_can() -> None:
    (course,) = follow({"worse": [-0.05] * 15}, RULE)
    assert (course.noninferiority, course.looks[-1].pairs) == ("refuted", 5)
    assert course.looks[-1].high < -0.01
    (course,) = follow({"worse": [-0.02] * 15}, replace(RULE, images=100))
    assert course.noninferiority == "not decided"
