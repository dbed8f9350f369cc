"""One model on its test images: measures against scikit-learn, mistakes and confusions in their order."""

import numpy as np
import planted
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, precision_score, recall_score

from peft_vit.base.statistics import proportion_interval
from peft_vit.core.records import Predictions, RunRecord
from peft_vit.deploy.page.quality import IN_A_BIN, MOST_BINS, model_quality

NAMES = ["ant", "bee", "cat", "dog"]


def record_of(n: int, *, files: bool = False, classes: int = 3) -> RunRecord:
    """Return a run with n predictions of three of four classes; about one in four is wrong."""
    rng = np.random.default_rng(n)
    labels = rng.integers(0, classes, n)
    predicted = np.where(rng.random(n) < 0.75, labels, rng.integers(0, 4, n))
    predictions = Predictions(
        images=list(range(7, 7 + n)),
        labels=labels.tolist(),
        predicted=predicted.tolist(),
        probability=rng.uniform(0.3, 1, n).tolist(),
        files=[f"{NAMES[label]}/{place}.png" for place, label in enumerate(labels)] if files else None,
    )
    record = planted.record(planted.experiments()["lora_r8"], 0, 0.75)
    return record.model_copy(update={"predictions": predictions, "class_names": NAMES})


def test_measures_are_those_of_scikit_learn() -> None:
    record = record_of(200)
    quality, of = model_quality(record), record.predictions
    assert quality.confusion.tolist() == confusion_matrix(of.labels, of.predicted, labels=range(4)).tolist()
    right = sum(a == b for a, b in zip(of.labels, of.predicted, strict=True))
    assert quality.accuracy == proportion_interval(right, 200)
    with pytest.warns(UserWarning, match="not in y_true"):
        balanced = balanced_accuracy_score(of.labels, of.predicted)
    assert quality.balanced_accuracy.estimate == pytest.approx(balanced)
    recall = recall_score(of.labels, of.predicted, average=None, labels=range(4), zero_division=0)
    precision = precision_score(of.labels, of.predicted, average=None, labels=range(4), zero_division=0)
    for found, sensitivity, predictive in zip(quality.classes, recall, precision, strict=True):
        assert found.precision == pytest.approx(predictive)
        assert (None if found.recall is None else found.recall.estimate) == (
            pytest.approx(sensitivity) if found.images else None
        )
    assert quality.classes[3].recall is None  # no test image is of it
    assert quality.mean_confidence == pytest.approx(np.mean(of.probability))


def test_mistakes_come_surest_first_and_confusions_most_frequent_first() -> None:
    quality = model_quality(record_of(200, files=True))
    mistakes = quality.mistakes
    assert [image.probability for image in mistakes] == sorted((m.probability for m in mistakes), reverse=True)
    assert all(image.truth != image.predicted and image.file.startswith(image.truth) for image in mistakes)
    assert sum(pair.images for pair in quality.confusions) == len(mistakes)
    images = [pair.images for pair in quality.confusions]
    assert images == sorted(images, reverse=True)
    assert model_quality(record_of(5)).images[0].file == "image 7"


def test_some_images_are_drawn_without_looking_and_always_the_same() -> None:
    quality = model_quality(record_of(200))
    for right in (True, False):
        shown = quality.sample_images(right, 6)
        assert len(shown) == 6
        assert all(image.right == right for image in shown)
        assert shown == quality.sample_images(right, 6)
        assert [sum(image.truth == name for image in shown) for name in NAMES] == [2, 2, 2, 0]
    assert len(quality.sample_images(False, 1000)) == len(quality.mistakes)


@pytest.mark.parametrize(("n", "bins"), [(59, 0), (60, 3), (190, 9), (1000, MOST_BINS)])
def test_bins_hold_enough_images_or_there_are_none(n: int, bins: int) -> None:
    found = model_quality(record_of(n)).reliability()
    assert len(found) == bins
    assert all(b.count >= IN_A_BIN for b in found)


def test_a_record_without_predictions_says_nothing() -> None:
    assert model_quality(record_of(5).model_copy(update={"predictions": None})) is None
