"""How good one model is on its test images, or on later ones: what decides, classes, what it confuses, its mistakes.

And what a call of `peft-vit train` came to, in lines and as a row beside others: the answer first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from peft_vit.base.console import quoted, some_of
from peft_vit.base.errors import UserError
from peft_vit.base.statistics import Interval, difference_interval, proportion_interval
from peft_vit.base.statistics.reliability import ReliabilityBin, equal_count_bins
from peft_vit.core.config import TaskName
from peft_vit.core.records import Calibrated, Decision, Metrics, Predictions, RunRecord, TestedCalibration
from peft_vit.core.tasks import TASKS, DecidingMetric, metric_of, rows_of, thresholds_of
from peft_vit.core.tasks.classification import ACCURACY, BALANCED_ACCURACY
from peft_vit.deploy.page.document import Column, Raw, Table, table
from peft_vit.deploy.page.formatting import bounds_of, count, gain_of, or_dash, plain, value_of
from peft_vit.deploy.presentation import Counts

MOST_BINS, IN_A_BIN = 10, 20  # of a reliability curve: bins, and images in each at least
_LEAST_BINS = 3
TOO_FEW = ": too few to tell which is better"  # after an interval of a difference that holds 0, on images
_NAMED = 8  # classes
_FEWEST_TESTED, _FEW_TESTED = 5, 20  # images; fewer say next to nothing, and less than folds
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


# --- in lines, and as a row beside others ---


def test_score(record: RunRecord) -> Interval:
    """Return what decides in a finished run, on the test images, with its interval."""
    assert record.predictions is not None
    return score_on(record.predictions, metric_of(record.spec), record.decision)


def best_known(record: RunRecord) -> tuple[Interval, str]:
    """Return what decides, on test images, or on more images of folds where few tested, and on what."""
    score, on_folds = test_score(record), record.on_folds
    if on_folds is None or score.n >= min(_FEW_TESTED, len(on_folds.images)):
        return score, "test images"
    return score_on(on_folds, metric_of(record.spec), record.decision), "images that trainings like it left out in turn"


def test_line(record: RunRecord) -> str:
    """Return the test of a finished run in a line; where too few images tested, its validation."""
    score, metric, validation = test_score(record), metric_of(record.spec), record.validation
    words, (known, where) = metric.words, best_known(record)
    if known.n > score.n:
        head = f"{words.capitalize()} {_score(metric, known)}, on {known.n} {where}"
        return f"{head}; {score.n} images tested it alone, with {value_of(metric, score.estimate)}."
    if score.n < _FEWEST_TESTED and validation is not None:
        value = value_of(metric, metric.of(validation))
        return f"Validation {words} {value}, on {validation.n} images that training chose by; only {score.n} tested it."
    return f"Test {words} {_score(metric, score)}, on {score.n} images that training has not seen."


def untested(record: RunRecord) -> list[str]:
    """Return which classes no test image is of, in a line; nothing where each has one."""
    if record.predictions is None:
        return []
    counts = TASKS[record.task].counts(rows_of(record.predictions.labels), len(record.class_names))
    lacking = [plain(name) for name, images in zip(record.class_names, counts, strict=False) if not images]
    if not lacking:
        return []
    of = "it" if len(lacking) == 1 else "these classes"
    return [f"No test image is of {some_of(lacking, _NAMED)}: the test says nothing of {of}."]


def later_lines(tested: ImagesTest) -> list[str]:
    """Return a test on later images in lines: the score, how it differs from the model's own test, what is confused."""
    metric, value, change = tested.metric, tested.value, tested.change
    lines = [f"{metric.words.capitalize()} {_score(metric, value)}, on {count(value.n)} images."]
    if tested.own is None or change is None:
        lines.append("Its own test is not known: the record of its run is not beside the file.")
    else:
        ends = f"{or_dash(change.low, partial(gain_of, metric))} to {or_dash(change.high, partial(gain_of, metric))}"
        points = " points" if metric.is_share else ""
        own = f"its own test: {value_of(metric, tested.own.estimate)} on {count(tested.own.n)} images"
        lines.append(f"{gain_of(metric, change.estimate)}{points} ({ends}) compared with {own}.")
        if change.may_be_zero:
            lines.append("That may be chance: these are other images.")
    return [*lines, *most_frequent_mistake(tested.quality)]


def most_frequent_mistake(quality: ModelQuality | None) -> list[str]:
    """Return which class is predicted as which other one most often; nothing without mistakes, or without classes."""
    return [
        f"Its most frequent mistake: {one.truth} predicted as {one.taken_for} ({one.images} of {one.of} images)."
        for one in (() if quality is None else quality.confusions[:1])
    ]


def result_lines(record: RunRecord, folder: Path, seconds: float, page: Path | None = None) -> list[str]:
    """Return what training came to, beside the probe that it started from, and what to do with the model.

    Args:
        record: of a finished run.
        folder: of the run, or of the call that made it.
        seconds: that all of the call took.
        page: on the model, if one was written.
    """
    place = quoted(folder)
    return [
        test_line(record),
        *untested(record),
        *beside_the_probe(record),
        f"Time: {seconds:.0f} s.",
        f"Model: {folder}",
        f"Page: {page}" if page is not None else f"Page: peft-vit report {place}",
        f"To predict: peft-vit predict {place} PHOTO.jpg",
    ]


def beside_the_probe(record: RunRecord) -> list[str]:
    """Return what the linear probe that training started from has on the same test images, and what training gained.

    Nothing where there is no probe, or its test was not recorded.
    """
    metric, predictions, test = metric_of(record.spec), record.predictions, record.probe_test
    if record.spec.experiment.is_probe:
        return ["It is a linear probe: the backbone is as it was, and only the last layer was fitted."]
    if test is None or predictions is None:
        return []
    labels, by_probe, predicted = map(rows_of, (predictions.labels, test.predicted, predictions.predicted))  # N each
    of_probe = _score(metric, metric.interval(labels, by_probe, test.thresholds), metric.suffix)
    of_probe = f"A linear probe has {of_probe} on the same test images."
    if record.chosen_step == 0:
        return [of_probe, "Training did not improve on it on validation images, so you get the linear probe."]
    gain = metric.gain(labels, by_probe, predicted, test.thresholds, thresholds_of(record.decision))
    if gain.low is None or gain.high is None:
        return [of_probe, f"{count(gain.n)} test images can't tell what training gained on it: {gain.reason}."]
    better, *ends = (metric.sign * value for value in (gain.estimate, gain.low, gain.high))
    size = gain_of(metric, abs(better)).removeprefix("+") + (" points" if metric.is_share else "")
    gap = f"{size} {'better' if better > 0 else 'worse'}" if better else "as good"
    bounds = " to ".join(gain_of(metric, end) for end in sorted(ends))
    unclear = TOO_FEW if gain.may_be_zero else ""
    return [of_probe, f"You get the trained model, which is {gap} here; on other test images {bounds}{unclear}."]


def _score(metric: DecidingMetric, interval: Interval, suffix: str = "") -> str:
    value = value_of(metric, interval.estimate)
    return f"{value}{suffix} (95 % interval {bounds_of(metric, interval)})"


def train_row(
    folder: Path, method: str, settings: str, state: str, record: RunRecord | None, seconds: float
) -> dict[str, Raw]:
    """Return a row on a call of `train`, whose run has a record or none yet; what is not known of it is None.

    Args:
        folder: of the call.
        method: that was trained.
        settings: as they were typed.
        state: what became of it.
        record: of what it delivers.
        seconds: that all of it took.
    """
    if record is not None and record.spec.experiment.method != method:
        method = "linear probe"  # which was better than what was trained
    row: dict[str, Raw] = {"run": folder.name, "method": method, "settings": settings, "state": state}
    row |= dict.fromkeys(("classes", "metric", "test", "low", "high", "test_images", "minutes"))
    if record is not None:
        row |= {"minutes": seconds / 60, "classes": len(record.class_names) or None}
    if record is not None and record.test is not None:  # what decides, with its 95 % interval
        score = test_score(record)
        row |= {"metric": metric_of(record.spec).name, "test": score.estimate, "test_images": score.n}
        row |= {"low": score.low, "high": score.high}
    return row


def train_runs_table(rows: Sequence[dict[str, Raw]]) -> Table:
    """Return a row a call of `train`."""

    def test(row: dict[str, Any]) -> str | None:
        if row["metric"] is None:
            return None
        metric = next(task.metrics[row["metric"]] for task in TASKS.values() if row["metric"] in task.metrics)
        bounds = bounds_of(metric, Interval(row["test"], row["low"], row["high"], 0, 0))
        return f"{row['metric'].replace('_', ' ')} {value_of(metric, row['test'])} ({bounds})"

    return table(
        "runs",
        "Runs of `peft-vit train`",
        rows,
        [
            "run",
            "date",
            "images",
            "classes",
            "method",
            Column("settings", "settings", lambda settings: settings or "defaults"),
            Column("test", test),
            Column("minutes", "minutes", "{:.1f}".format),
            "state",
        ],
        "In brackets the 95 % interval: what other test images would change.",
    )
