"""How good one model is on its test images, or on later ones: what decides, classes, what it confuses, its mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import Interval, difference_interval, proportion_interval
from peft_vit.base.statistics.reliability import ReliabilityBin, equal_count_bins
from peft_vit.core.config import TaskName
from peft_vit.core.records import Calibrated, Decision, Metrics, Predictions, RunRecord, TestedCalibration
from peft_vit.core.tasks import TASKS, DecidingMetric, rows_of, thresholds_of
from peft_vit.core.tasks.classification import ACCURACY, BALANCED_ACCURACY
from peft_vit.deploy.page.formatting import plain
from peft_vit.deploy.presentation import Counts

MOST_BINS, IN_A_BIN = 10, 20  # of a reliability curve: bins, and images in each at least
_LEAST_BINS = 3
PREDICTED = "Models that were not trained on an image predicted it. The label that is least believed comes first."
TOGETHER = "They stay on one side of every split. Of copies one will do; groups are as --group says."


@dataclass(frozen=True)
class ClassResult:
    """One class on the test images."""

    name: str
    images: int  # that are of it
    recall: Interval | None  # None: there are none
    predicted: int  # images that are called so
    precision: float | None  # share of these that are of it; None: there are none


@dataclass(frozen=True)
class Confusion:
    """Images of one class that are predicted as another one."""

    truth: str
    taken_for: str
    images: int
    of: int  # images of the class


@dataclass(frozen=True)
class PredictedImage:
    """A test image and what the model says of it."""

    position: int  # in the data set
    file: str  # name, or "image 7" of a set without files
    truth: str
    predicted: str
    probability: float  # of what is said
    right: bool  # whether that is true


@dataclass(frozen=True)
class ModelQuality:
    """One model on its test images."""

    accuracy: Interval  # of the population of images
    balanced_accuracy: Interval  # mean of the classes' recall, over the classes that have test images
    classes: tuple[ClassResult, ...]
    confusion: Counts  # (true, predicted)
    images: tuple[PredictedImage, ...]  # in the order of the test split

    @property
    def mistakes(self) -> list[PredictedImage]:
        """Return the images of which it says something wrong, the surest first."""
        wrong = [image for image in self.images if not image.right]
        return sorted(wrong, key=lambda image: (-image.probability, image.position))

    @property
    def confusions(self) -> list[Confusion]:
        """Return which classes are predicted as which, the most frequent first."""
        names, totals = [result.name for result in self.classes], self.confusion.sum(1)
        wrong = self.confusion - np.diag(np.diag(self.confusion))
        pairs = [
            Confusion(names[row], names[column], int(wrong[row, column]), int(totals[row]))
            for row, column in np.argwhere(wrong).tolist()
        ]
        return sorted(pairs, key=lambda pair: (-pair.images, pair.of))

    @property
    def mean_confidence(self) -> float:
        """Return the mean probability of what is said; equal to the accuracy where probabilities hold."""
        return float(np.mean([image.probability for image in self.images]))

    def reliability(self) -> tuple[ReliabilityBin, ...]:
        """Return bins of equal counts that hold at least `IN_A_BIN` images each; none where there are too few."""
        bins = min(MOST_BINS, len(self.images) // IN_A_BIN)
        if bins < _LEAST_BINS:
            return ()
        sure, right = zip(*((image.probability, image.right) for image in self.images), strict=True)
        return equal_count_bins(sure, right, bins)

    def sample_images(self, right: bool, most: int) -> list[PredictedImage]:
        """Return up to so many images on which it is right, or wrong, drawn blindly from one class after the other."""
        candidates = [image for image in self.images if image.right == right]
        rounds: dict[str, int] = {}
        turns: list[tuple[int, int, int]] = []
        for place in np.random.default_rng(0).permutation(len(candidates)).tolist():
            truth = candidates[place].truth
            rounds[truth] = rounds.get(truth, 0) + 1
            turns.append((rounds[truth], len(turns), place))
        return [candidates[place] for place in sorted(place for _, _, place in sorted(turns)[:most])]


def doubted_labels(on_folds: Predictions, class_names: Sequence[str]) -> list[PredictedImage]:
    """Return images of folds whose label is less probable than another class, the least probable first.

    Of several predictions of an image the first counts. None where it isn't known how probable labels are.
    """
    doubted: dict[int, tuple[float, PredictedImage]] = {}
    probable, names = on_folds.label_probability or (), [plain(name) for name in class_names]
    columns = probable, on_folds.images, on_folds.files or (), on_folds.labels, on_folds.predicted, on_folds.probability
    for of_label, position, file, label, answer, sure in zip(*columns, strict=False):
        image = PredictedImage(position, plain(file), names[label], names[answer], sure, label == answer)
        doubted.setdefault(position, (of_label, image))
    ranked = sorted(doubted.values(), key=lambda one: (one[0], one[1].position))
    return [image for _, image in ranked if not image.right]


def model_quality(record: RunRecord | ImagesTest) -> ModelQuality | None:
    """Return what a run's model is worth on its test images; None if the record holds no predictions of classes.

    Probabilities of answers are the calibrated ones, where there are such.
    """
    predictions, tested = record.predictions, record.tested_calibration
    if predictions is None or not predictions.labels or not TASKS[record.task].one_class:
        return None
    labels, predicted = np.asarray(predictions.labels), np.asarray(predictions.predicted)
    k = max(len(record.class_names), int(labels.max()) + 1, int(predicted.max()) + 1)
    names = [plain(name) for name in record.class_names]
    names += [f"class {place}" for place in range(len(names), k)]
    confusion = np.zeros((k, k), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    probabilities = predictions.probability if tested is None else tested.probability
    files = [plain(file) for file in predictions.files or ()]
    files = files or [f"image {position}" for position in predictions.images]
    by_class = zip(
        names, np.diag(confusion).tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist(), strict=True
    )
    by_image = zip(predictions.images, files, labels.tolist(), predicted.tolist(), probabilities, strict=True)
    return ModelQuality(
        accuracy=ACCURACY.interval(labels, predicted),
        balanced_accuracy=BALANCED_ACCURACY.interval(labels, predicted),
        classes=tuple(
            ClassResult(
                name, n, proportion_interval(hits, n) if n else None, answers, hits / answers if answers else None
            )
            for name, hits, n, answers in by_class
        ),
        confusion=confusion,
        images=tuple(
            PredictedImage(position, file, names[label], names[answer], p, label == answer)
            for position, file, label, answer, p in by_image
        ),
    )


def score_on(predictions: Predictions, metric: DecidingMetric, decision: Decision | None) -> Interval:
    """Return what decides of predictions, with its interval."""
    return metric.interval(rows_of(predictions.labels), rows_of(predictions.predicted), thresholds_of(decision))


def constant_on(predictions: Predictions, metric: DecidingMetric, task: TaskName) -> float:
    """Return the same of always giving one answer, such as the most frequent class."""
    labels = rows_of(predictions.labels)
    return metric.interval(labels, TASKS[task].constant(labels)).estimate


@dataclass(frozen=True)
class ImagesTest:
    """What a model says of labelled images that came later; the first fields are called as those of a `RunRecord`.

    Attributes:
        metric: what decides.
        own: the same metric on the model's own test images; None: its record is not there.
        unreadable: what is wrong with images that are left out.
    """

    task: TaskName
    class_names: Sequence[str]
    predictions: Predictions
    calibrated: Calibrated | None
    decision: Decision | None
    test: Metrics
    tested_calibration: TestedCalibration
    metric: DecidingMetric
    own: Interval | None
    unreadable: Sequence[UserError]

    @cached_property
    def value(self) -> Interval:
        """Return what decides."""
        return score_on(self.predictions, self.metric, self.decision)

    @cached_property
    def constant(self) -> float:
        """Return the same of always giving one answer."""
        return constant_on(self.predictions, self.metric, self.task)

    @cached_property
    def quality(self) -> ModelQuality | None:
        """Return what it confuses; None of several labels, or of numbers."""
        return model_quality(self)

    @property
    def change(self) -> Interval | None:
        """Return how much more it has here than on its own test images; None: that is not known."""
        return None if self.own is None else difference_interval(self.own, self.value)
