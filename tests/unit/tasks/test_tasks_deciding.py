"""What decides, and where it may lie with other test images."""

import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import mean_of_proportions
from peft_vit.core.records import Metrics
from peft_vit.core.tasks import CLASSIFICATION, REGRESSION, expected_gain
from peft_vit.core.tasks.classification import ACCURACY, BALANCED_ACCURACY

pytestmark = pytest.mark.part("trainer")


def accurate(images: int, share: float, nll: float = 1.0) -> Metrics:
    return Metrics(n=images, accuracy=share, balanced_accuracy=share, auroc=None, nll=nll, ece=0.0)


def test_balanced_accuracy_decides_from_more_than_three_times_as_many_images_on() -> None:
    assert CLASSIFICATION.deciding(np.array([30, 10, 20])) is ACCURACY
    assert CLASSIFICATION.deciding(np.array([31, 10, 20])) is BALANCED_ACCURACY
    assert CLASSIFICATION.metric("balanced_accuracy") is BALANCED_ACCURACY
    with pytest.raises(UserError, match=r"training\.metric: auto is for studies alone"):
        CLASSIFICATION.metric("auto")


def test_a_value_is_said_with_what_it_is_of() -> None:
    metrics = Metrics(n=4, accuracy=0.75, balanced_accuracy=0.5, auroc=None, nll=0.3, ece=0.1)
    assert [metric.text(metric.of(metrics)) for metric in (ACCURACY, BALANCED_ACCURACY)] == ["75.0%", "50.0% balanced"]


@pytest.mark.parametrize(
    ("images", "before", "after", "kept"),
    [
        (40, 0.95, 0.90, True),  # two images of 40 say little against what training usually brings
        (40, 0.95, 0.65, False),
        (1000, 0.95, 0.90, False),
        (1000, 0.90, 0.90, True),
        (40, 0.90, 0.95, True),
    ],
)
def test_training_is_kept_while_its_gain_is_expected_to_be_above_zero(images, before, after, kept) -> None:
    usual = expected_gain(140)
    gains = np.linspace(-1, 1, 20_001)
    density = norm.pdf(gains, usual, 0.03) * norm.pdf(after - before, gains, (after * (1 - after) / images) ** 0.5)
    assert (trapezoid(gains * density, gains) > 0) == kept
    assert (
        ACCURACY.worth(accurate(images, after), before=accurate(images, before), expected=usual, images=images) == kept
    )


def test_of_rare_classes_a_balanced_value_is_known_as_by_few_images() -> None:
    """Of 90 + 10 images it is known as by 4 / (1/90 + 1/10) = 36, which the scatter of such values shows."""
    labels, rng = np.repeat([0, 1], [90, 10]), np.random.default_rng(0)
    right = rng.random((20_000, 100)) < 0.9
    values = (right[:, :90].mean(1) + right[:, 90:].mean(1)) / 2
    alike = BALANCED_ACCURACY.images_alike(labels)
    assert alike == pytest.approx(36)
    assert values.var() == pytest.approx(0.9 * 0.1 / alike, rel=0.05)
    assert ACCURACY.images_alike(labels) == BALANCED_ACCURACY.images_alike(np.arange(100) % 2) == 100
    trained, start = accurate(100, 0.85), accurate(100, 0.9)  # a rare image, which counts five points
    kept = [
        metric.worth(trained, before=start, expected=0.03, images=metric.images_alike(labels))
        for metric in (ACCURACY, BALANCED_ACCURACY)
    ]
    assert kept == [False, True]


@pytest.mark.parametrize(("images", "before", "after"), [(30, 0.83, 0.60), (8, 1.0, 0.5), (4, 1.0, 0.25)])
def test_a_training_that_has_failed_is_not_kept_however_few_images_say_so(images, before, after) -> None:
    assert not ACCURACY.worth(accurate(images, after), before=accurate(images, before), expected=0.03, images=images)


def test_where_nothing_is_expected_of_training_it_has_to_be_better() -> None:
    for own, kept in ((accurate(40, 0.9, 1.1), False), (accurate(40, 0.9, 0.9), True), (accurate(40, 0.85), False)):
        assert ACCURACY.worth(own, before=accurate(40, 0.9), expected=0.0, images=40) == kept
    assert ACCURACY.worth(
        accurate(40, 1.0, 1.1), before=accurate(40, 1.0), expected=0.03, images=40
    )  # labels were smoothed
    errors = [Metrics(n=40, nll=1.0, more={"mae": mae, "r2": 1 - mae}) for mae in (0.30, 0.31)]
    for name in ("mae", "r2"):
        metric = REGRESSION.metric(name)
        assert [metric.worth(errors[k], before=errors[1 - k], expected=0.03, images=40) for k in (0, 1)] == [
            True,
            False,
        ]


def test_intervals_are_wilsons_and_of_several_classes_one_that_the_rarest_decides() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 2], [90, 12])  # of class 1 there is no image
    predicted = np.where(rng.random(102) < 0.8, labels, 1)
    hits, images = np.array([(predicted[labels == k] == k).sum() for k in (0, 2)]), np.array([90, 12])
    plain, balanced = (metric.interval(labels, predicted) for metric in (ACCURACY, BALANCED_ACCURACY))
    assert (plain.low, plain.high) == pytest.approx(proportion_confint(hits.sum(), 102, method="wilson"))
    estimate = (hits[0] / 90 + hits[1] / 12) / 2
    assert balanced.estimate == pytest.approx(estimate)
    alike = 4 / (1 / 90 + 1 / 12)  # images of one class whose share were known as well
    pulled = (hits + 3 * (estimate * alike + 1) / (alike + 2)) / (images + 3)

    def shares(move: float) -> np.ndarray:
        return expit(logit(pulled) + move / images)

    def beyond(move: float, side: int) -> float:
        error = np.sqrt((shares(move) * (1 - shares(move)) / images).sum()) / 2
        return float(shares(move).mean() - estimate - side * norm.ppf(0.975) * error)

    ends = [shares(brentq(beyond, -500, 500, args=(side,), xtol=1e-12)).mean() for side in (-1, 1)]
    assert (balanced.low, balanced.high) == pytest.approx(ends)
    assert balanced.high - balanced.low > plain.high - plain.low  # the rare class is known least
    one = mean_of_proportions([7], [9])
    assert (one.low, one.high) == pytest.approx(proportion_confint(7, 9, method="wilson"))


def test_a_gain_is_the_difference_of_two_values_on_the_same_images() -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 2], [90, 30])
    before, after = (np.where(rng.random(120) < share, labels, 1) for share in (0.6, 0.8))
    for metric in (ACCURACY, BALANCED_ACCURACY):
        gain = metric.gain(labels, before, after)
        values = [metric.interval(labels, predicted).estimate for predicted in (before, after)]
        assert gain.estimate == pytest.approx(values[1] - values[0])
        assert gain.low < gain.estimate < gain.high
    alone = labels == 0  # of one class both metrics are one
    plain, balanced = (m.gain(labels[alone], before[alone], after[alone]) for m in (ACCURACY, BALANCED_ACCURACY))
    assert (balanced.low, balanced.high) == pytest.approx((plain.low, plain.high))
    none = ACCURACY.gain(labels, before, before)
    assert none.low == pytest.approx(-none.high) != 0
