"""What decides, where it may lie with other test images, and the one scale on which all tasks are compared."""

import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import norm
from sklearn.metrics import average_precision_score
from statsmodels.stats.proportion import proportion_confint

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import mean_of_proportions
from peft_vit.base.statistics.odds import choose_model, means_of_images
from peft_vit.core.records import Metrics
from peft_vit.core.tasks import CLASSIFICATION, MULTILABEL, REGRESSION, Scores, expected_gain
from peft_vit.core.tasks.classification import ACCURACY, BALANCED_ACCURACY, log_softmax

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


RNG = np.random.default_rng(5)
LABELS = (RNG.random((50, 2)) < (0.4, 0.3)).astype(float)
OUTPUTS = RNG.normal(size=(50, 2)) + 1.5 * LABELS
NUMBERS = RNG.normal(100, 20, (50, 1))
GUESSED = REGRESSION.fitted(NUMBERS).aligned(NUMBERS + RNG.normal(0, 8, (50, 1)), REGRESSION)


def test_what_an_image_brings_is_the_jackknifes_pseudo_value() -> None:
    scores = Scores.on(MULTILABEL, MULTILABEL.metric("map"), LABELS)
    brought = scores.by_image(OUTPUTS, LABELS)

    def map_of(rows: np.ndarray) -> float:
        return average_precision_score(LABELS[rows], OUTPUTS[rows])

    everything = np.arange(50)
    expected = [50 * map_of(everything) - 49 * map_of(np.delete(everything, i)) for i in range(50)]
    assert brought == pytest.approx(expected)
    bounds = scores.metric.interval(LABELS, MULTILABEL.predicted(OUTPUTS))  # a bootstrap: another way to the variance
    assert brought.std() / 50**0.5 == pytest.approx((bounds.high - bounds.low) / 3.92, rel=0.25)


def test_errors_are_in_standard_deviations_and_the_better_the_higher() -> None:
    scores = Scores.on(REGRESSION, REGRESSION.metric("mae"), NUMBERS)
    predicted = scores.task.predicted(GUESSED)
    assert scores.by_image(GUESSED, NUMBERS) == pytest.approx(-np.abs(predicted - NUMBERS)[:, 0] / NUMBERS.std())
    measured = scores.task.measure(GUESSED, NUMBERS)
    assert scores.of(measured) == pytest.approx(scores.by_image(GUESSED, NUMBERS).mean())
    assert scores.text(scores.of(measured)) == f"{measured.more['mae']:.3g} mean error"
    assert (scores.best, scores.hundredths(0.01)) == (0.0, "1 % of a standard deviation")
    ranks = Scores.on(REGRESSION, REGRESSION.metric("r2"), NUMBERS)
    assert (ranks.deviation, ranks.best, ranks.hundredths(0.01), ranks.hundredths(0.005)) == (
        1.0,
        1.0,
        "1 point",
        "0.5 points",
    )


def test_of_classes_an_image_brings_whether_it_is_right() -> None:
    logits, labels = RNG.normal(size=(40, 3)), RNG.integers(0, 3, 40)
    for name in ("accuracy", "balanced_accuracy"):
        scores = Scores.on(CLASSIFICATION, CLASSIFICATION.metric(name), labels)
        assert scores.by_image(logits, labels).tolist() == (log_softmax(logits).argmax(1) == labels).tolist()


def test_an_image_that_folds_predict_three_times_chooses_a_threshold_once() -> None:
    """By hand: a 1, a 0 thrice, a 1, from the surest. Of images F1 is 2/3 at the first and 4/5 at all, of rows 4/7.

    All are reported then. Of the rows F1 is 4/7, without the first one 2/5, and the first brings 5 * 4/7 - 4 * 2/5.
    """
    labels, outputs = np.array([[1.0], [0], [0], [0], [1]]), np.array([[2.0], [1], [1], [1], [0.5]])
    scores = Scores.on(MULTILABEL, MULTILABEL.metric("f1_micro"), labels)
    brought = scores.by_image(outputs, labels, np.array([7, 3, 3, 3, 5]))
    assert brought[[0, 4]] == pytest.approx(20 / 7 - 8 / 5)
    assert scores.by_image(outputs, labels)[4] != pytest.approx(20 / 7 - 8 / 5)


@pytest.mark.parametrize("unit", [1.0, 0.01, 30.0])
def test_odds_of_scores_that_are_no_shares_do_not_depend_on_their_unit(unit) -> None:
    rng = np.random.default_rng(1)
    folds = np.arange(100)[None] % 5
    own = rng.normal(0, 1, 100)
    values = np.stack([own + rng.normal(0, 0.3, 100) + lead for lead in (0.0, 0.05, 0.3)])[:, None]  # (C, R, N)
    measured = means_of_images(unit * values, folds, counts=False)
    assert measured.means == pytest.approx(unit * values.mean((1, 2)))
    odds = choose_model(measured, [1, 2, 3], range(3), range(3), unit * 0.1).estimates
    plain = choose_model(means_of_images(values, folds, counts=False), [1, 2, 3], range(3), range(3), 0.1).estimates
    for one, other in zip(odds, plain, strict=True):
        assert one.loss / unit == pytest.approx(other.loss, abs=1e-6)
        assert one.chance_of_loss == pytest.approx(other.chance_of_loss, abs=1e-4)
        assert one.score.estimate / unit == pytest.approx(other.score.estimate, abs=1e-6)
    assert plain[0].chance_of_loss > plain[1].chance_of_loss > 0.9  # the third leads by 0.3 and 0.25
    assert plain[2].score.low < values[2].mean() < plain[2].score.high
