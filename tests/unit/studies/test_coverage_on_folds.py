"""How often sets and intervals hold the truth on images of folds, each by what other folds say."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from peft_vit.base.statistics import conformal_quantile, error_scale
from peft_vit.core.records import Calibrated, Decision
from peft_vit.core.tasks import CLASSIFICATION, MULTILABEL, OF_FOLDS, REGRESSION
from peft_vit.core.tasks.regression import half_widths
from peft_vit.data import ImageIndex
from peft_vit.deploy.presentation import Numbers
from peft_vit.fit.outcomes import Outcome, covered_on_folds, predictions_on

pytestmark = pytest.mark.part("runner")
RNG = np.random.default_rng(5)
IMAGES, FOLDS, REPEATED = 200, 5, 2
NUMBERS = RNG.normal(20, 4, (IMAGES, 1))
THERE = (RNG.random((IMAGES, 4)) < 0.4).astype(float)


def outcomes(learned, labels, logits) -> list[Outcome]:
    """Return runs on folds, each repetition with other folds, whose outputs are noisy ones of the labels."""
    made = []
    for _ in range(REPEATED):
        for own in np.array_split(RNG.permutation(IMAGES), FOLDS):
            noise = RNG.normal(0, 1 + np.abs(logits[own]) / 2)
            made.append(Outcome(own, labels[own], logits[own] + noise, 1.0, Path(), learned))
    return made


def test_intervals_of_a_fold_are_those_of_the_other_images() -> None:
    task = REGRESSION.fitted(NUMBERS)
    folds = outcomes(task, NUMBERS, (NUMBERS - np.array(task.center)) / np.array(task.spread))
    held = covered_on_folds(folds, task)
    by_hand = []
    predicted, truth, images = (
        np.concatenate(parts)
        for parts in zip(*((task.predicted(o.logits)[:, 0], o.labels[:, 0], o.images) for o in folds), strict=True)
    )
    for own in folds:
        others = ~np.isin(images, own.images)
        scale, quotients = error_scale(predicted[others], truth[others], images[others])
        said = task.predicted(own.logits)[:, 0]
        reach = conformal_quantile(quotients, 0.9, images[others]) * scale.of(said)
        by_hand += (np.abs(said - own.labels[:, 0]) <= reach).tolist()
    assert held[0.9] == pytest.approx(np.mean(by_hand))
    assert held[0.8] == pytest.approx(0.8, abs=0.05)
    assert list(held) == [0.8, 0.9, 0.95, 0.99]


def test_sets_of_labels_hold_as_often_as_asked_on_folds() -> None:
    held = covered_on_folds(outcomes(MULTILABEL, THERE, 4 * THERE - 2), MULTILABEL)
    assert held[0.8] == pytest.approx(0.8, abs=0.05)
    assert held[0.95] == pytest.approx(0.95, abs=0.03)


def test_there_is_nothing_of_one_class_an_image_or_without_folds() -> None:
    classes = RNG.integers(0, 3, IMAGES)
    assert covered_on_folds(outcomes(CLASSIFICATION, classes, np.eye(3)[classes]), CLASSIFICATION) == {}
    assert covered_on_folds([], MULTILABEL) == {}


@pytest.mark.parametrize(("task", "labels"), [(MULTILABEL, THERE[:30]), (REGRESSION, NUMBERS[:30])])
def test_an_image_that_repetitions_predict_counts_once(task, labels) -> None:
    outputs = labels + RNG.normal(size=labels.shape)
    once = task.decide(outputs, labels, OF_FOLDS)
    for times in (2, 3):
        rows = np.tile(np.arange(30), times)
        again = task.decide(outputs[rows], labels[rows], OF_FOLDS, rows)
        assert again.images == once.images == 30
        assert again.coverages == once.coverages  # 99 % needs 99 images
        assert again.temperature == pytest.approx(once.temperature, rel=1e-4)
        for name in ("half_widths", "thresholds", "set_thresholds"):
            assert np.array(getattr(again, name)) == pytest.approx(np.array(getattr(once, name)), rel=1e-4)
    assert 0.99 not in once.coverages
    assert bool(once.set_thresholds) == (task is MULTILABEL)


def test_an_image_of_three_repetitions_does_not_outvote_two_others() -> None:
    outputs = np.array([[2.0], [2.0], [2.0], [1.0], [0.0], [-1.0]])  # the first image thrice
    labels, images = np.array([[0.0], [0.0], [0.0], [1.0], [1.0], [0.0]]), np.array([0, 0, 0, 1, 2, 3])
    decision = MULTILABEL.decide(outputs, labels, OF_FOLDS, images)
    plain = MULTILABEL.decide(outputs[2:], labels[2:], OF_FOLDS)
    assert decision.temperature == pytest.approx(plain.temperature, rel=1e-4)
    assert decision.thresholds == pytest.approx(plain.thresholds, rel=1e-4)
    p = 1 / (1 + np.exp(-outputs[4:, 0] / decision.temperature))
    assert decision.thresholds[0] == pytest.approx(p.mean())  # F1 is 2 * 2 / (3 + 2) there


def test_half_widths_of_an_older_record_are_in_the_numbers_unit() -> None:
    written = {"images": 20, "center": (20.0,), "spread": (4.0,), "coverages": (0.9,), "half_widths": ((3.0,),)}
    decision = Decision.model_validate(written)
    assert half_widths(decision, np.array([[5.0], [50.0]]), 0.9).tolist() == [[3.0], [3.0]]
    prediction = Numbers().prediction(np.zeros(1), ["age"], decision, 0.9, 1)
    assert prediction.numbers["age"] == (20.0, 17.0, 23.0)


def test_predictions_on_folds_say_how_probable_the_label_is() -> None:
    labels = RNG.integers(0, 3, IMAGES)
    folds = outcomes(CLASSIFICATION, labels, 2 * np.eye(3)[labels])
    index = ImageIndex(labels, tuple("abc"), None, "", lambda _: Image.new("L", (1, 1)))
    meaning = Calibrated(images=IMAGES, temperature=1.5, coverages=(), thresholds=())
    found = predictions_on(folds, CLASSIFICATION, meaning, index)
    assert found is not None
    assert found.files == [index.title(k) for own in folds for k in own.images.tolist()]
    p = softmax(np.concatenate([own.logits for own in folds]) / 1.5, axis=1)
    assert found.label_probability == pytest.approx([row[labels[k]] for row, k in zip(p, found.images, strict=True)])
    assert found.probability == pytest.approx(p.max(1).tolist())
    assert predictions_on([], CLASSIFICATION, meaning, index) is None
