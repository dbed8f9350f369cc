"""What people are shown of a task: what a model says of images, in words, tables and a browser, and on a page.

Nothing here needs torch. To add a task: a `Presentation` here, and its place in PRESENTED.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from peft_vit.base.statistics import prediction_sets, probabilities, spearman
from peft_vit.core.records import Calibrated, Decision
from peft_vit.core.tasks import CLASSIFICATION, MULTILABEL, REGRESSION, Labels, Meaning, Task
from peft_vit.core.tasks.metric import Flags, Floats, Outputs, unweighted
from peft_vit.core.tasks.multilabel import above_thresholds, average_precision, f1
from peft_vit.core.tasks.regression import (
    half_widths,
    mean_absolute_error,
    r_squared,
    root_mean_squared_error,
    scales_of,
)

if TYPE_CHECKING:
    from PIL import Image

Named: TypeAlias = tuple[tuple[str, float], ...]  # classes and their probabilities, from the largest
Counts: TypeAlias = NDArray[np.int64]
Rows: TypeAlias = list[dict[str, Any]]
_WORST_SHOWN, _NUMBERS_SHOWN = 12, 3  # images with the largest errors, and of each those of its numbers
_LABELS_SHOWN, _OF_A_LABEL_SHOWN = 6, 4  # whose errors a page shows, those with most of them, and images of each
_USUAL = 0.9  # coverage of an interval where none is asked for


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image. Probabilities are calibrated if the model's file says how."""

    file: Path | None = None  # None: of an array
    class_name: str = ""  # the most probable one; empty of numbers
    probability: float = math.nan
    classes: Named = ()  # its set, with a coverage
    top: Named = ()  # so many as were asked for
    unlike: bool | None = None  # unlike all images that were trained on; None: the model can't tell
    distance: float | None = None  # to the nearest of them
    labels: Named = ()  # of a model of several labels: those above their thresholds
    numbers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by name: number, and its interval's ends


@dataclass(frozen=True)
class Explanation:
    """Where a model looked in an image.

    Attributes:
        class_name: that it said.
        weights: (cells, cells): of patches, see `attended`; or by how much the log-probability of this class falls
            where the image is covered.
        picture: the image as the model gets it, under a grey veil where little matters.
        by: how it was made.
    """

    class_name: str
    weights: NDArray[np.float32]
    picture: Image.Image
    by: Literal["attention", "occlusion"]


class Errors(NamedTuple):
    """How far numbers are from the true ones."""

    sizes: Floats  # (N, K), predicted less true
    reach: Floats | None  # (N, K): how far intervals reach to both sides; None: there are none
    coverage: float = 0.0  # of these


class ImageSelection(NamedTuple):
    """Test images that a page shows."""

    slug: str
    title: str
    rule: str  # how they were chosen
    groups: tuple[tuple[str, tuple[tuple[int, tuple[str, ...]], ...]], ...]  # title, and of each image place and lines


class LabelledOutputs(NamedTuple):
    """What a model says of test images."""

    labels: Labels  # N, the true ones
    predicted: Labels  # N
    names: Sequence[str]  # of outputs, as a page has them
    decision: Decision | None


class Presentation(Protocol):
    """How a task's outputs are shown: probabilities of names, as most have them, or what a task has instead.

    Outputs are (N, K), `names` those of its columns.

    Attributes:
        task: that is shown.
        note: how to read its table of outputs.
        promise: what people call what `predict --coverage` gives, its shares that hold, its size, and what it is.
        holds: of which images it holds the truth, at so many percent. Never more than about: validation images have
            chosen steps, sizes and penalties before they make thresholds, and folds do not test the last training.
    """

    task: Task
    note: str = ""
    promise: tuple[str, str, str, str]
    holds: str = ""

    def prediction(
        self, outputs: Outputs, names: Sequence[str], meaning: Meaning, coverage: float | None, top: int
    ) -> Prediction:
        """Return what is reported of an image, by its outputs (K,)."""

    def for_browser(self, meaning: Meaning, coverage: float | None) -> dict[str, Any]:
        """Return what web.js has to know to answer alike, and the words of its page.

        Args:
            meaning: of outputs.
            coverage: of what is promised; None: the model has none.
        """

    def cells(self, prediction: Prediction, with_sets: bool) -> dict[str, Any]:
        """Return an image's cells in a table of predictions, between `file` and `unlike`, by column."""
        ranked = {
            column + ("" if place == 1 else f"_{place}"): cell
            for place, named in enumerate(prediction.top, start=1)
            for column, cell in zip(("class", "probability"), named, strict=True)
        }
        return ranked | ({"set": [name for name, _ in prediction.classes]} if with_sets else {})

    def measures(self, outputs: LabelledOutputs) -> Rows:
        """Return what a page says of each output: its name, and measures; none: it says it otherwise."""
        return []

    def errors(self, outputs: LabelledOutputs) -> Errors | None:
        """Return how far predictions are off; None: they are not numbers."""
        return None

    def cooccurrence(self, outputs: LabelledOutputs) -> tuple[Counts, Counts] | None:
        """Return on how many images two outputs are together, (K, K), in truth and as predicted; None: never."""
        return None

    def image_selections(self, outputs: LabelledOutputs) -> Iterator[ImageSelection]:
        """Yield which images a page shows, such as the worst ones."""
        yield from ()


def ranked(names: Sequence[str], probability: Floats, mask: Flags | bool = True) -> Named:
    """Return names in a mask (K,), from the most probable on, by probabilities (K,); of equal ones the first."""
    chosen = np.broadcast_to(mask, len(names))
    return tuple((names[k], float(probability[k])) for k in np.argsort(-probability, kind="stable") if chosen[k])


def of_ranking(ranking: Named, top: int, *, classes: Named = (), labels: Named = ()) -> Prediction:
    """Return what is reported of an image whose names are ranked."""
    name, probability = ranking[0]
    return Prediction(None, name, probability, classes, ranking[:top], labels=labels)


class Classes(Presentation):
    """One class an image."""

    task = CLASSIFICATION
    promise = (
        "Prediction sets",
        "Sets that hold the class",
        "Classes in a set",
        "On the test images, which chose nothing. `predict --coverage` gives such sets: the classes that an image may "
        "be of. They hold about as often as asked.",
    )
    holds = "The set at {0:g} % holds the true class of about {0:g} in 100 images"

    def prediction(
        self, outputs: Outputs, names: Sequence[str], meaning: Meaning, coverage: float | None, top: int
    ) -> Prediction:
        """Return the most probable classes, and with a coverage the set of those that the image may be of."""
        calibrated = cast("Calibrated | None", meaning)
        p = probabilities(outputs[None], 1.0 if calibrated is None else calibrated.temperature)  # (1, classes)
        in_set = np.zeros(p.shape, dtype=bool)
        if coverage is not None and calibrated is not None:
            in_set = prediction_sets(p, calibrated.threshold(coverage))
        return of_ranking(ranked(names, p[0]), top, classes=ranked(names, p[0], in_set[0]))

    def for_browser(self, meaning: Meaning, coverage: float | None) -> dict[str, Any]:
        """Return the temperature, and the threshold of sets."""
        calibrated = cast("Calibrated | None", meaning)
        sets = None
        if calibrated is not None and coverage is not None:
            sets = {"coverage": coverage, "threshold": calibrated.threshold(coverage)}
        return {
            "says": "which of {} classes it is of",
            "kind": "classes",
            "temperature": 1.0 if calibrated is None else calibrated.temperature,
            "set": sets,
        }


class Numbers(Presentation):
    """Each image has a number, or several."""

    task = REGRESSION
    note = "Errors are in the number's unit, beside the error of always saying the median."
    promise = (
        "Intervals",
        "Intervals that hold the number",
        "Mean width",
        "On the test images, which chose nothing; widths of several numbers are in standard deviations. `predict` "
        "gives such intervals, of 90 % or of --coverage. They hold about as often as asked.",
    )
    holds = "The interval at {0:g} % holds the true number of about {0:g} in 100 images"

    def prediction(
        self, outputs: Outputs, names: Sequence[str], meaning: Meaning, coverage: float | None, top: int
    ) -> Prediction:
        """Return each number with the interval that holds it in a share of images, 0.9 if none is asked for."""
        decision = cast("Decision", meaning)
        predicted = self.task.predicted(outputs[None], decision)  # (1, K)
        ends = [predicted]
        if decision.coverages:
            widths = half_widths(decision, predicted, coverage or _usual(decision))
            ends = [predicted, predicted - widths, predicted + widths]
        rows = np.concatenate(ends).T.tolist()  # (K, 1 or 3)
        return Prediction(numbers={name: tuple(row) for name, row in zip(names, rows, strict=True)})

    def for_browser(self, meaning: Meaning, coverage: float | None) -> dict[str, Any]:
        """Return units, and how wide intervals are."""
        decision = cast("Decision", meaning)
        at, sizes = zip(*scales_of(decision), strict=True)
        wide = {"half_widths": decision.threshold(coverage), "at": at, "scale": sizes} if coverage else {}
        return {
            "says": "{} numbers" if len(decision.center) > 1 else "a number",
            "kind": "numbers",
            "center": decision.center,
            "spread": decision.spread,
            "set": {"coverage": coverage, **wide} if coverage else None,
        }

    def cells(self, prediction: Prediction, with_sets: bool) -> dict[str, Any]:
        """Return each number, and its interval's ends."""
        ends = ("", "_low", "_high")
        return {
            name + end: cell
            for name, values in prediction.numbers.items()
            for end, cell in zip(ends, values, strict=False)
        }

    def measures(self, outputs: LabelledOutputs) -> Rows:
        """Return mean, errors, R² and rank correlation of each number."""
        labels, predicted, names, _ = outputs
        rows = []
        for k, name in enumerate(names):
            y, p = labels[:, [k]], predicted[:, [k]]
            rows.append(
                {
                    "Number": name,
                    "Images": len(y),
                    "Mean": float(y.mean()),
                    "Standard deviation": float(y.std()),
                    "Mean absolute error": unweighted(mean_absolute_error, y, p),
                    "of the median": unweighted(mean_absolute_error, y, self.task.constant(y)),
                    "RMSE": unweighted(root_mean_squared_error, y, p),
                    "R²": unweighted(r_squared, y, p),
                    "Spearman": spearman(p[:, 0], y[:, 0]),
                }
            )
        return rows

    def errors(self, outputs: LabelledOutputs) -> Errors:
        """Return predicted less true, and how far the usual intervals reach."""
        labels, predicted, _, decision = outputs
        if decision is None or not decision.coverages:
            return Errors(predicted - labels, None)
        coverage = _usual(decision)
        return Errors(predicted - labels, half_widths(decision, predicted, coverage), coverage)

    def image_selections(self, outputs: LabelledOutputs) -> Iterator[ImageSelection]:
        """Yield the images with the largest errors, in standard deviations."""
        labels, predicted, names, decision = outputs
        errors = self.errors(outputs)
        spread = (1.0,) if decision is None else decision.spread
        sizes = np.abs(errors.sizes) / np.array(spread)  # (N, K)
        worst = np.argsort(-sizes.mean(1), kind="stable")[:_WORST_SHOWN].tolist()
        images = []
        for n in worst:
            lines = []
            for k in np.argsort(-sizes[n], kind="stable")[:_NUMBERS_SHOWN].tolist():
                reach = "" if errors.reach is None else f" ± {errors.reach[n, k]:.3g}"
                lines.append(f"{names[k]}: {predicted[n, k]:.3g}{reach}, is {labels[n, k]:.3g}")
            images.append((n, tuple(lines)))
        rule = "Sorted by the size of the error. Is the number right?"
        yield ImageSelection(
            "worst", "The largest errors", rule, ((f"{len(worst)} of {len(labels)} images", tuple(images)),)
        )


def _usual(decision: Decision) -> float:
    """Return the coverage of intervals where none is asked for: 0.9, or the largest that there is below."""
    return min(_USUAL, decision.coverages[-1])


class ManyLabels(Presentation):
    """Several labels an image, or none."""

    task = MULTILABEL
    note = "A label is predicted from its threshold on, which has the largest F1 on the validation images."
    promise = (
        "Prediction sets",
        "An image's labels in its set",
        "Labels in a set",
        "Means over the test images that have a label; they chose nothing. `predict --coverage` gives such sets: the "
        "labels that an image may have. They hold about as much as asked.",
    )
    holds = "The set at {0:g} % holds about {0:g} % of an image's labels on average"

    def prediction(
        self, outputs: Outputs, names: Sequence[str], meaning: Meaning, coverage: float | None, top: int
    ) -> Prediction:
        """Return the labels that reach their threshold, the most probable ones, and with a coverage a set."""
        decision = cast("Decision", meaning)
        set_threshold = math.inf if coverage is None else decision.threshold(coverage)[0]
        (p,) = self.task.predicted(outputs[None], decision)
        return of_ranking(
            ranked(names, p),
            top,
            labels=ranked(names, p, p >= decision.thresholds),
            classes=ranked(names, p, p >= set_threshold),
        )

    def for_browser(self, meaning: Meaning, coverage: float | None) -> dict[str, Any]:
        """Return the temperature, and thresholds of labels and of sets."""
        decision = cast("Decision", meaning)
        known = {"coverage": coverage, "threshold": decision.threshold(coverage)[0]} if coverage else None
        return {
            "says": "which of {} labels it has",
            "kind": "labels",
            "temperature": decision.temperature,
            "thresholds": decision.thresholds,
            "set": known,
        }

    def cells(self, prediction: Prediction, with_sets: bool) -> dict[str, Any]:
        """Return its labels, the most probable ones with their probabilities, and the set."""
        return {"labels": [name for name, _ in prediction.labels], **super().cells(prediction, with_sets)}

    def measures(self, outputs: LabelledOutputs) -> Rows:
        """Return images, average precision, threshold, precision, recall and F1 of each label."""
        labels, predicted, names, decision = outputs
        rows = []
        for k, name in enumerate(names):
            known = ~np.isnan(labels[:, k])
            truth, scores = labels[known, k] == 1, predicted[known, k]
            threshold = 0.5 if decision is None else decision.thresholds[k]
            reported, positives = scores >= threshold, int(truth.sum())
            hits = int((truth & reported).sum())
            precision = average_precision(scores, truth, np.ones((1, len(truth))))[0] if positives else None
            rows.append(
                {
                    "Label": name,
                    "Images with it": positives,
                    "of": len(truth),
                    "Average precision": precision,
                    "Threshold": threshold,
                    "Told": int(reported.sum()),
                    "Precision": hits / reported.sum() if reported.any() else None,
                    "Recall": hits / positives if positives else None,
                    "F1": float(f1(hits, reported.sum(), positives)) if positives else None,
                }
            )
        return rows

    def cooccurrence(self, outputs: LabelledOutputs) -> tuple[Counts, Counts]:
        """Return on how many images two labels are, in truth and as predicted."""
        true = (outputs.labels == 1).astype(np.int64)
        predicted = above_thresholds(outputs.predicted, outputs.decision).astype(np.int64)
        return true.T @ true, predicted.T @ predicted

    def image_selections(self, outputs: LabelledOutputs) -> Iterator[ImageSelection]:
        """Yield the surest false alarms, and the misses that it holds for least probable, of each label."""
        labels, predicted, names, decision = outputs
        reported = above_thresholds(predicted, decision)
        kinds = (
            ("false_alarms", reported & (labels == 0), -predicted, "is predicted and not there"),
            ("misses", ~reported & (labels == 1), predicted, "is there and not predicted"),
        )
        for slug, wrong, order, what in kinds:
            most = np.argsort(-wrong.sum(0), kind="stable")[:_LABELS_SHOWN]
            groups = []
            for k in (int(k) for k in most if wrong[:, k].any()):
                rows = np.flatnonzero(wrong[:, k])
                worst = rows[np.argsort(order[rows, k], kind="stable")][:_OF_A_LABEL_SHOWN].tolist()
                images = []
                for n in worst:
                    truth = self.task.text(labels[n], names).replace("|", ", ")
                    images.append((n, (f"{names[k]}: {predicted[n, k]:.1%}", f"is {truth}")))
                groups.append((f"{names[k]}: {len(worst)} of {len(rows)}", tuple(images)))
            if groups:
                rule = f"Of each label the images on which it {what}, the surest first. Is the label right?"
                yield ImageSelection(slug, f"The surest {slug.replace('_', ' ')}", rule, tuple(groups))


PRESENTED: dict[str, Presentation] = {kind.task.name: kind for kind in (Classes(), Numbers(), ManyLabels())}
