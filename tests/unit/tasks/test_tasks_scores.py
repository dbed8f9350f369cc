"""All tasks are compared on one scale: shares, of which more is better, and what each image brings to them."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from peft_vit.base.statistics.odds import choose_model, means_of_images
from peft_vit.core.tasks import CLASSIFICATION, MULTILABEL, REGRESSION, Scores
from peft_vit.core.tasks.classification import log_softmax

pytestmark = pytest.mark.part("trainer")
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
