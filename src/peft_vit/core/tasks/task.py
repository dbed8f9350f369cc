"""What a task says of labels and outputs, for training, evaluation, splits and `tune` alike.

What people are shown of it stands in `deploy.presentation`. Shapes, which methods do not repeat:

    outputs    of the head, (N, K)
    labels     of N images: (N,) int64 with one class an image, else (N, K)
    names      of the K outputs
    counts     images of each class, (K,)
    decision   what outputs mean, by images that were not trained on; None: nothing is decided

Nothing here needs torch, so that reports can be made without it; a loss imports it when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast

import numpy as np
import scipy

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import TemperaturePrior
from peft_vit.core.config import ClassWeights, LossName, TaskName, TrainingConfig
from peft_vit.core.records import Calibrated, Decision, Metrics, Predictions, TestedCalibration
from peft_vit.core.tasks.metric import DecidingMetric, Flags, Floats, Ints, Labels, Outputs

if TYPE_CHECKING:
    from torch import Tensor

# Ends and search are not those of `statistics.fit_temperature`: with its own every training would start elsewhere.
LOG_TEMPERATURES = (math.log(0.1), math.log(100.0))
COVERAGES = tuple(percent / 100 for percent in range(80, 100))  # for which a model has thresholds
SHOWN = (0.8, 0.9, 0.95, 0.99)  # that test images measure
_EFFECTIVE = 0.999  # beta of effective numbers
CONVERGED = 1e-7  # at which a linear head has converged; L-BFGS ends there or at its most iterations
_MOST_ITERATIONS = 10_000
Meaning: TypeAlias = Calibrated | Decision | None  # of outputs, see `Task.decide`
NamedLabels: TypeAlias = tuple[tuple[str, ...], Labels]  # names of the K outputs, and labels of N images
LinearHeads: TypeAlias = Iterator[tuple[Floats, Floats]]  # weight (K, D) and bias (K,) of one after the other
Coverage: TypeAlias = tuple[dict[float, float], dict[float, float]]  # how often the truth is held, and mean size
Column: TypeAlias = Literal["classes", "lists", "numbers"]


class Task(Protocol):
    """What is learned; defaults are those of most tasks.

    Attributes:
        name: config name (classification, multilabel, regression).
        one_class: labels are class numbers, (N,): folders may hold the images, and shots and Fisher information apply.
        column: kind of Hugging Face column that holds such labels.
        metrics: by name; the first is the default.
        loss_names: the first is the default.
        compared_by: metric by which studies compare; empty: the deciding one.
        least_outputs: minimum of K.
        smooths: whether label smoothing applies.
        mixes: augmentations whose mixed labels are valid labels.
        weighs: whether class weights apply.
        several: template of the number of images, K and names, for messages.
        gap: template of a split that lacks a class: its name, classes present, K.
        outputs: plural noun of an output.
    """

    name: TaskName
    one_class: bool = False
    column: Column | None = None
    metrics: Mapping[str, DecidingMetric]
    loss_names: tuple[LossName, ...]
    compared_by: str = ""
    least_outputs: int = 1
    smooths: bool = False
    mixes: tuple[str, ...] = ("mixup", "cutmix")
    weighs: bool = True
    several: str
    gap: str = ""
    outputs: str = "classes"

    # --- labels as people have them ---

    def recognizes(self, cells: Mapping[str, Sequence[str]]) -> bool:
        """Return whether a table's columns, without path and split, look like labels of this task."""

    def fault(self, cells: Mapping[str, str]) -> str | None:
        """Return the error in a row's cells, by column; None: they are valid."""

    def read(self, texts: Sequence[str], columns: Sequence[str]) -> NamedLabels:
        """Return names and labels of rows whose cells are joined by '|'."""

    def refuse_one_answer(self, names: Sequence[str], labels: Labels, image: str) -> None:
        """Refuse an output that is the same for all images.

        Args:
            names: of outputs.
            labels: of the images.
            image: noun of one of them, for the message.

        Raises:
            UserError: naming the output.
        """
        return

    def read_split(self, texts: Sequence[str], columns: Sequence[str], is_test: Flags | None) -> NamedLabels:
        """Return names and labels, checked by `refuse_one_answer` on all images and on the training images."""
        names, labels = self.read(texts, columns)
        self.refuse_one_answer(names, labels, "image")
        if is_test is not None and not is_test.all():
            self.refuse_one_answer(names, labels[~is_test], "training image")
        return names, labels

    def synthetic_labels(self, classes: Ints) -> NamedLabels:
        """Return names and labels of synthetic images with these classes, (N,)."""

    def text(self, label: Any, names: Sequence[str]) -> str:
        """Return a label in words."""
        return " ".join(f"{name}={value:g}" for name, value in zip(names, label, strict=True))

    def images_of(self, images: int, names: Sequence[str]) -> str:
        """Return the number of images with what they show, for messages."""
        return self.several.format(images, len(names), ", ".join(names))

    def counted(self, names: Sequence[str]) -> str:
        """Return the number of outputs with their noun."""
        return f"{len(names)} {self.outputs if len(names) != 1 else self.outputs.removesuffix('s')}"

    def members(self, labels: Labels, place: int) -> Flags:
        """Return which images belong to an output, (N,): those of its class; all where there are no classes."""
        return np.ones(len(labels), dtype=bool)

    def label_ids(self, labels: Labels) -> Ints:
        """Return integers (N,), equal for labels that copies of one image may have; all measurements may."""
        return np.zeros(len(labels), dtype=np.int64)

    def counts(self, labels: Labels, width: int) -> Ints:
        """Return the number of images of each output, (K,)."""
        return np.array([self.members(labels, place).sum() for place in range(width)])

    def strata(self, labels: Labels) -> Labels:
        """Return the strata of splits and folds: (N,) integers, or (N, S) bool where an image is in several."""

    # --- learning ---

    def fitted(self, labels: Labels) -> Task:
        """Return the task with what it takes from labels of training images."""
        return self

    def restored(self, decision: Decision | None) -> Task:
        """Return the task with what a trained model's decision holds."""
        return self

    def aligned(self, outputs: Outputs, learned: Task) -> Outputs:
        """Return outputs of a model fitted to other images on the scale of this task."""
        return outputs

    def metric(self, name: str) -> DecidingMetric:
        """Return the metric of a name.

        Raises:
            UserError: if it is `auto`, which images decide, or of another task.
        """
        if name not in self.metrics:
            message = f"{name} is for studies alone; here, give {' or '.join(self.metrics)}"
            if name != "auto":
                message = f"{name} is not a metric of {self.name}; give {' or '.join(self.metrics)}, or auto"
            raise UserError(message, field="training.metric")
        return self.metrics[name]

    def need_one_class(self, field: str, remedy: str = "leave it out") -> None:
        """Refuse a setting unless each image is of one class."""
        if not self.one_class:
            alone = f"is there for one class an image, and these have {self.name} labels"
            raise UserError(f"{alone}; {remedy}", field=field)

    def check(self, training: TrainingConfig) -> None:
        """Refuse a training whose metric, loss, mixed images or weights the task does not have, naming the setting."""
        self.metric(training.metric)
        if training.loss not in (None, *self.loss_names):
            message = f"{training.loss} is not a loss of {self.name}; give {' or '.join(self.loss_names)}"
            raise UserError(message, field="training.loss")
        for change in training.augmentation:
            if change.mixes and change.name not in self.mixes:
                others = " or ".join([*self.mixes, "none"])
                message = f"{change.name} makes images whose {self.outputs} nobody can tell; give {others}"
                raise UserError(message, field="training.augmentation")
        if training.class_weights != "none" and not self.weighs:
            message = f"has no effect on {self.outputs}, which have no classes; leave it out"
            raise UserError(message, field="training.class_weights")

    def deciding(self, counts: Ints) -> DecidingMetric:
        """Return the metric of `auto`."""
        return next(iter(self.metrics.values()))

    def head_width(self, names: Sequence[str]) -> int:
        """Return the head's number of outputs."""
        return len(names)

    def loss_weights(self, counts: Ints, scheme: ClassWeights) -> Floats:
        """Return the weight of each output in the loss, (K,)."""
        return np.ones(len(counts))

    def loss(
        self,
        outputs: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        label_smoothing: float = 0.0,
        name: LossName | None = None,
    ) -> Tensor:
        """Return the mean training loss, of a name or the first of `loss_names`; weights are (K,)."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each image without weights, (N,)."""

    def shares(self, labels: Tensor, width: int) -> Tensor:
        """Return labels that can be mixed and that `loss` takes, (N, K), with K = width."""
        return labels

    def image_weights(self, labels: Labels, weights: Floats) -> Floats:
        """Return sample weights of a linear fit, (N,), from weights of the loss (K,)."""
        return np.ones(len(labels))

    def linear_heads(
        self, z: Floats, labels: Labels, strengths: Sequence[float], weights: Floats, tolerance: float = CONVERGED
    ) -> LinearHeads:
        """Yield weight (K, D) and bias (K,) of the linear head with the least penalized loss, one after the other.

        Args:
            z: standardized features (N, D).
            labels: of N images.
            strengths: l2 of ``sum_i w_i loss_i / sum_i w_i + (l2 / 2) ||W||_F^2``.
            weights: w_i (N,).
            tolerance: the largest gradient at which one has converged, where there is no closed form.
        """

    def held_out_outputs(
        self, z: Floats, labels: Labels, groups: Ints, strengths: Sequence[float], weights: Floats
    ) -> Sequence[Floats] | None:
        """Return outputs (N, K) by strength of `linear_heads` fitted without an image's group, (N,), in closed form.

        None: there is no closed form, and heads are fitted fold by fold.
        """
        return None

    def temperature(self, outputs: Tensor, labels: Tensor) -> float:
        """Return the divisor of outputs with the lowest loss on held-out images (arXiv 1706.04599)."""

        def loss(log_t: float) -> float:
            return float(self.loss(outputs / math.exp(log_t), labels, None))

        return math.exp(float(scipy.optimize.minimize_scalar(loss, bounds=LOG_TEMPERATURES, method="bounded").x))

    def guess_loss(self, outputs: Tensor, labels: Tensor) -> float:
        """Return the loss of guessing; 0 where outputs have no confidence."""
        return 0.0

    def training_temperature(self, outputs: Tensor, labels: Tensor) -> float:
        """Return the least power of two with which the loss is at least half of what guessing costs.

        What is predicted stays the same, and division by it can be undone to the bit.
        """
        target, factor = self.guess_loss(outputs, labels) / 2, 1.0
        while float(self.loss(outputs / factor, labels, None)) < target:
            factor *= 2
        return factor

    # --- what came of it ---

    def measure(self, outputs: Outputs, labels: Labels, decision: Decision | None = None) -> Metrics:
        """Return all measures of a split."""

    def predicted(self, outputs: Outputs, decision: Decision | None = None) -> Labels:
        """Return predictions as metrics take them: classes (N,), probabilities or numbers (N, K)."""

    def final_predictions(self, outputs: Outputs, decision: Decision | None = None) -> Labels:
        """Return predictions in the form of labels."""
        return self.predicted(outputs, decision)

    def same(
        self, before: Outputs, after: Outputs, decision: Decision | None = None, decision_after: Decision | None = None
    ) -> Flags:
        """Return on which images two models agree, (N,)."""
        equal = self.final_predictions(before, decision) == self.final_predictions(after, decision_after)
        return equal.reshape(len(equal), -1).all(1)

    def right(self, outputs: Outputs, labels: Labels) -> Flags:
        """Return which images are predicted correctly in all known labels, (N,)."""
        equal = (self.final_predictions(outputs) == labels) | np.isnan(labels)
        return equal.reshape(len(equal), -1).all(1)

    def constant(self, labels: Labels) -> Labels:
        """Return the predictions of the best constant."""

    def decide(
        self, outputs: Outputs, labels: Labels, prior: TemperaturePrior, images: Ints | None = None
    ) -> Decision | None:
        """Return the decision from held-out images; None with softmax outputs, see `Calibrated`.

        Args:
            outputs: of held-out images.
            labels: of them.
            prior: of the temperature.
            images: (N,) image of each row, where folds are repeated; None: one row an image.
        """
        return None

    def covered(self, decision: Decision, outputs: Outputs, labels: Labels) -> Coverage:
        """Return the empirical coverage and mean size of sets or intervals, by coverage of SHOWN."""
        return {}, {}

    def meaning(self, outputs: Outputs, labels: Labels, prior: TemperaturePrior, images: Ints | None = None) -> Meaning:
        """Return the meaning of outputs from held-out images, see `decide`; None without images."""
        return self.decide(outputs, labels, prior, images)

    def tested(self, meaning: Meaning, outputs: Outputs, labels: Labels, unlike: int | None) -> TestedCalibration:
        """Return calibration on test images; `unlike` counts those flagged as out of distribution."""
        decision = cast("Decision", meaning)
        covered, sizes = self.covered(decision, outputs, labels)
        nll = self.measure(outputs, labels, decision).nll
        return TestedCalibration(nll=nll, probability=[], covered=covered, set_size=sizes, unlike=unlike)

    def predictions(
        self,
        outputs: Outputs,
        labels: Labels,
        positions: Ints,
        *,
        keep_logits: bool = False,
        decision: Decision | None = None,
    ) -> Predictions:
        """Return the predictions that a record holds, for images at these positions of the data set, (N,)."""
        return Predictions(
            images=positions.tolist(),
            labels=np.where(np.isnan(labels), np.array(None), labels).tolist(),
            predicted=self.predicted(outputs, decision).tolist(),
            probability=self.confidence(outputs),
            logits=[[float(str(z)) for z in row] for row in outputs] if keep_logits else None,  # as short as float32 is
        )

    def confidence(self, outputs: Outputs) -> list[float]:
        """Return the probability of the predicted class, (N,); empty where there is no such class."""
        return []


def meaning_fields(meaning: Meaning | None) -> dict[str, Any]:
    """Return the meaning of outputs as fields of a record or a card: `decision`, or `calibrated` of a softmax."""
    is_decision = isinstance(meaning, Decision)
    return {"calibrated": None if is_decision else meaning, "decision": meaning if is_decision else None}


def effective_counts(counts: Ints, scheme: ClassWeights) -> Floats:
    """Return the number, or the effective number, of images of each class, (K,).

    The effective number of n images is (1 - b^n) / (1 - b), with b = 0.999 95 of 100 and never more than 1,000 (Cui et
    al. 2019, arXiv 1901.05555).

    Args:
        counts: images of each class, (K,).
        scheme: balanced, effective.
    """
    images = np.maximum(counts, 1).astype(float)
    effective: Floats = (1 - _EFFECTIVE**images) / (1 - _EFFECTIVE)
    return effective if scheme == "effective" else images


def rows_of(answers: Sequence[Any]) -> Labels:
    """Return labels or predictions of a record as metrics take them: (N,), or (N, K) with NaN where unknown."""
    rows = np.array(answers)
    return rows.astype(float) if rows.dtype == object else rows


def coverage_thresholds(threshold: Callable[[float], Any]) -> tuple[tuple[float, ...], tuple[Any, ...]]:
    """Return those of COVERAGES with finite thresholds, for which there are enough images, and the thresholds."""
    thresholds = {coverage: threshold(coverage) for coverage in COVERAGES}
    finite = {coverage: values for coverage, values in thresholds.items() if np.isfinite(values).all()}
    return tuple(finite), tuple(finite.values())


def measured_coverage(meaning: Calibrated | Decision, held_and_size: Callable[[float], tuple[Any, Any]]) -> Coverage:
    """Return the empirical coverage and mean size of sets or intervals, by those of SHOWN that `meaning` has."""
    pairs = {coverage: held_and_size(coverage) for coverage in SHOWN if coverage in meaning.coverages}
    held, sizes = ({coverage: float(pair[k]) for coverage, pair in pairs.items()} for k in (0, 1))
    return held, sizes


def logistic_regressions(
    count: int, tolerance: float = CONVERGED
) -> list[Callable[[Floats, Labels, Floats, float], tuple[Floats, Floats]]]:
    """Return logistic regressions of scikit-learn with warm starts: (z (N, D), labels (N,), weights (N,), C) ->
    coefficients and intercepts, at which no gradient is larger than the tolerance.
    """
    from sklearn.linear_model import LogisticRegression  # only here: it takes 100 MB of memory
    from threadpoolctl import ThreadpoolController

    threads = ThreadpoolController()  # once: it looks through all libraries that are loaded

    def fit(model: Any, z: Floats, labels: Labels, weights: Floats, c: float) -> tuple[Floats, Floats]:
        model.set_params(C=c)
        with threads.limit(limits=1):  # two threads wait for each other at products this small, at worst for long
            model.fit(z, labels, sample_weight=weights)
        return model.coef_, model.intercept_

    settings: dict[str, Any] = {"tol": tolerance, "max_iter": _MOST_ITERATIONS, "warm_start": True}
    return [partial(fit, LogisticRegression(**settings)) for _ in range(count)]
