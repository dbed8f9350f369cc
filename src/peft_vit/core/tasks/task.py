"""What a task says of labels and outputs, for training, evaluation, splits and `tune` alike.

What people are shown of it stands in `deploy.presentation`.

Outputs are what the head returns, (N, K); labels are what a task says they are, N of them. Nothing here needs torch,
so that reports can be made without it; a loss takes it from the tensors' own library when it is called.
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
_LARGEST_GRADIENT = 1e-7  # at which a linear head has converged; L-BFGS ends there or at its most iterations
_MOST_ITERATIONS = 10_000
Meaning: TypeAlias = Calibrated | Decision | None  # of outputs, see `Task.decide`
NamedLabels: TypeAlias = tuple[tuple[str, ...], Labels]  # names of the K outputs, and labels of N images
LinearHeads: TypeAlias = Iterator[tuple[Floats, Floats]]  # weight (K, D) and bias (K,) of one after the other
Coverage: TypeAlias = tuple[dict[float, float], dict[float, float]]  # how often the truth is held, and mean size
Column: TypeAlias = Literal["classes", "lists", "numbers"]


class Task(Protocol):
    """What is learned. What most tasks share stands here.

    Attributes:
        name: what configurations call it.
        one_class: each image is of one class, and a label is its number: folders may hold them, and what is there for
            classes alone may be asked for, such as shots and importance by Fisher information.
        column: what a column of a Hugging Face data set holds whose labels are of this task, if no other is asked for.
        metrics: which may decide, by name; the first is the default.
        loss_names: what may be made less in training; the first is the default.
        compared_by: the name of that by which studies compare; empty: that which decides.
        least_outputs: names that there have to be at least.
        smooths: labels may be smoothed.
        mixes: the augmentations that may mix two images, since a label between theirs says what is in the mix.
        weighs: outputs may have other weights in the loss than 1.
        fifth_of: of what a split takes a fifth.
        several: how many images there are of what, of their number, that of names, and these.
        gap: what a split says whose images lack a class, of its name.
        outputs: what people call them.
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
    fifth_of: str = "each class"
    several: str
    gap: str = ""
    outputs: str = "classes"

    # --- labels as people have them ---

    def recognizes(self, cells: Mapping[str, Sequence[str]]) -> bool:
        """Return whether a table's columns, but path and split, look like its labels."""

    def fault(self, cells: Mapping[str, str]) -> str | None:
        """Return what is wrong with a row's cells, by column; None: nothing."""

    def read(self, texts: Sequence[str], columns: Sequence[str]) -> NamedLabels:
        """Return the names of outputs, and the labels, of cells that are joined by '|'."""

    def refuse_one_answer(self, names: Sequence[str], labels: Labels, image: str) -> None:
        """Refuse labels of which nothing can be learned, since all images have the same.

        Args:
            names: of outputs.
            labels: N.
            image: what one of them is called.

        Raises:
            UserError: naming the output.
        """
        return

    def read_split(self, texts: Sequence[str], columns: Sequence[str], is_test: Flags | None) -> NamedLabels:
        """Return likewise of images of which some, (N,), are for the test alone.

        Raises:
            UserError: as `refuse_one_answer`, of all images and of the others.
        """
        names, labels = self.read(texts, columns)
        self.refuse_one_answer(names, labels, "image")
        if is_test is not None and not is_test.all():
            self.refuse_one_answer(names, labels[~is_test], "training image")
        return names, labels

    def made_up(self, classes: Ints) -> NamedLabels:
        """Return names and labels for made-up images of so many classes, (N,)."""

    def text(self, label: Any, names: Sequence[str]) -> str:
        """Return a label in words."""
        return " ".join(f"{name}={value:g}" for name, value in zip(names, label, strict=True))

    def images_of(self, images: int, names: Sequence[str]) -> str:
        """Return how many images there are of what, in words."""
        return self.several.format(images, len(names), ", ".join(names))

    def counted(self, names: Sequence[str]) -> str:
        """Return how many outputs there are, in words."""
        return f"{len(names)} {self.outputs if len(names) != 1 else self.outputs.removesuffix('s')}"

    def members(self, labels: Labels, place: int) -> Flags:
        """Return which images count for an output, (N,): those of its class, or where there are no classes all."""
        return np.ones(len(labels), dtype=bool)

    def marks(self, labels: Labels) -> Ints:
        """Return numbers, (N,), that are equal where copies of one image may have both labels, as measurements may."""
        return np.zeros(len(labels), dtype=np.int64)

    def counts(self, labels: Labels, width: int) -> Ints:
        """Return how many images count for each of K outputs, (K,)."""
        return np.array([self.members(labels, place).sum() for place in range(width)])

    def strata(self, labels: Labels) -> Labels:
        """Return what splits and folds hold in equal shares: (N,) integers, or (N, S) bool where they have several."""

    # --- learning ---

    def fitted(self, labels: Labels) -> Task:
        """Return the task as it is learned from these labels of training images."""
        return self

    def restored(self, decision: Decision | None) -> Task:
        """Return the task as it was learned by a model whose outputs mean this."""
        return self

    def aligned(self, outputs: Outputs, learned: Task) -> Outputs:
        """Return outputs of a model that has learned the same from other images, as if from these."""
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
        """Return the metric that `auto` is, with so many images of each class (K,)."""
        return next(iter(self.metrics.values()))

    def head_width(self, names: Sequence[str]) -> int:
        """Return how many outputs the head has, for the names of what is predicted."""
        return len(names)

    def loss_weights(self, counts: Ints, how: ClassWeights) -> Floats:
        """Return the weight of each output in the loss, (K,), by how many images are of its class, (K,)."""
        return np.ones(len(counts))

    def loss(
        self,
        outputs: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        label_smoothing: float = 0.0,
        name: LossName | None = None,
    ) -> Tensor:
        """Return the mean loss of training: that of a name, or the first of `loss_names`."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each image without weights, (N,)."""

    def shares(self, labels: Tensor, width: int) -> Tensor:
        """Return labels of N images as they are mixed and as `loss` takes them, too: (N, K), of a head of a width."""
        return labels

    def image_weights(self, labels: Labels, weights: Floats) -> Floats:
        """Return the weight of each image in a linear fit, (N,), with weights of the loss (K,)."""
        return np.ones(len(labels))

    def linear_heads(self, z: Floats, labels: Labels, strengths: Sequence[float], weights: Floats) -> LinearHeads:
        """Yield weight (K, D) and bias (K,) of the linear head with the least penalized loss, one after the other.

        Args:
            z: standardized features (N, D).
            labels: of N images.
            strengths: l2 of ``sum_i w_i loss_i / sum_i w_i + (l2 / 2) ||W||_F^2``.
            weights: w_i (N,).
        """

    def left_out(
        self, z: Floats, labels: Labels, groups: Ints, strengths: Sequence[float], weights: Floats
    ) -> Sequence[Floats] | None:
        """Return by strength what linear heads say of images that they were not fitted to, (N, K), without more fits.

        Args:
            z: as `linear_heads` has it.
            labels: likewise.
            groups: (N,), of images that are left out together, as views of one object: each of their heads knows none
                of them.
            strengths: as `linear_heads` has it.
            weights: likewise.

        Returns:
            None where that has no closed form: heads are fitted without a fold of the images at a time then.
        """
        return None

    def temperature(self, outputs: Tensor, labels: Tensor) -> float:
        """Return what outputs are to be divided by for the lowest loss on held-out images (arXiv 1706.04599)."""

        def loss(log_t: float) -> float:
            return float(self.loss(outputs / math.exp(log_t), labels, None))

        return math.exp(float(scipy.optimize.minimize_scalar(loss, bounds=LOG_TEMPERATURES, method="bounded").x))

    def guessing(self, outputs: Tensor, labels: Tensor) -> float:
        """Return the loss of guessing; 0: outputs are of one size whatever they say."""
        return 0.0

    def training_temperature(self, outputs: Tensor, labels: Tensor) -> float:
        """Return the least power of two with which the loss is at least half of what guessing costs.

        What is predicted stays the same, and division by it can be undone to the bit.
        """
        least, factor = self.guessing(outputs, labels) / 2, 1.0
        while float(self.loss(outputs / factor, labels, None)) < least:
            factor *= 2
        return factor

    # --- what came of it ---

    def measure(self, outputs: Outputs, labels: Labels, decision: Decision | None = None) -> Metrics:
        """Return every measure of a split, with a decision those of what is shown by it."""

    def predicted(self, outputs: Outputs, decision: Decision | None = None) -> Labels:
        """Return what is predicted, as metrics take it."""

    def told(self, outputs: Outputs, decision: Decision | None = None) -> Labels:
        """Return what is said of each image in the end, N as labels are."""
        return self.predicted(outputs, decision)

    def same(
        self, before: Outputs, after: Outputs, decision: Decision | None = None, decision_after: Decision | None = None
    ) -> Flags:
        """Return of which images two models' outputs say the same, (N,)."""
        told = self.told(before, decision) == self.told(after, decision_after)
        return told.reshape(len(told), -1).all(1)

    def right(self, outputs: Outputs, labels: Labels) -> Flags:
        """Return of which images outputs say what is true, as far as it is known, (N,)."""
        told = (self.told(outputs) == labels) | np.isnan(labels)
        return told.reshape(len(told), -1).all(1)

    def constant(self, labels: Labels) -> Labels:
        """Return what always the same answer would predict of images, at its best."""

    def decide(
        self, outputs: Outputs, labels: Labels, prior: TemperaturePrior, images: Ints | None = None
    ) -> Decision | None:
        """Return what outputs mean, by images that were not trained on; None: softmax, see `Calibrated`.

        Args:
            outputs: (N, K).
            labels: N.
            prior: of the temperature.
            images: (N,) which image each row is of, as where folds are repeated; None: each of another.
        """
        return None

    def covered(self, decision: Decision, outputs: Outputs, labels: Labels) -> Coverage:
        """Return by coverage of SHOWN how often sets or intervals hold the truth, and their mean size."""
        return {}, {}

    def meaning(self, outputs: Outputs, labels: Labels, prior: TemperaturePrior) -> Meaning:
        """Return what outputs mean, by images that were not trained on; None if there are none. See `decide`."""
        return self.decide(outputs, labels, prior)

    def tested(self, meaning: Meaning, outputs: Outputs, labels: Labels, unlike: int | None) -> TestedCalibration:
        """Return what the meaning of outputs comes to on test images, of which some are flagged as unlike others."""
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
        """Return what is predicted of each image of a split."""
        return Predictions(
            images=positions.tolist(),
            labels=np.where(np.isnan(labels), np.array(None), labels).tolist(),
            predicted=self.predicted(outputs, decision).tolist(),
            probability=self.confidence(outputs),
            logits=[[float(str(z)) for z in row] for row in outputs] if keep_logits else None,  # as short as float32 is
        )

    def confidence(self, outputs: Outputs) -> list[float]:
        """Return how probable what is predicted of each image is, where it is one class."""
        return []


def meaning_fields(meaning: Meaning) -> dict[str, Any]:
    """Return what outputs mean as fields of a record or a card: `decision`, or `calibrated` of a softmax."""
    is_decision = isinstance(meaning, Decision)
    return {"calibrated": None if is_decision else meaning, "decision": meaning if is_decision else None}


def counted_images(counts: Ints, how: ClassWeights) -> Floats:
    """Return what the images of each class count for, (K,): their number, or their effective number.

    That is (1 - b^n) / (1 - b) of n images: of a class that has many, a further one brings hardly anything new. With
    b = 0.999 a class of 100 images counts for 95, and none for more than 1,000 (Cui et al. 2019, arXiv 1901.05555).

    Args:
        counts: images of each class, (K,).
        how: balanced, effective.
    """
    images = np.maximum(counts, 1).astype(float)
    effective: Floats = (1 - _EFFECTIVE**images) / (1 - _EFFECTIVE)
    return effective if how == "effective" else images


def rows_of(answers: Sequence[Any]) -> Labels:
    """Return labels, or what was predicted, as metrics take it: (N,), or (N, K) with NaN for what is not known."""
    rows = np.array(answers)
    return rows.astype(float) if rows.dtype == object else rows


def by_coverage(threshold: Callable[[float], Any]) -> tuple[tuple[float, ...], tuple[Any, ...]]:
    """Return those of COVERAGES that images are enough for, and the threshold, or several, that each has."""
    found = {coverage: threshold(coverage) for coverage in COVERAGES}
    held = {coverage: own for coverage, own in found.items() if np.isfinite(own).all()}
    return tuple(held), tuple(held.values())


def on_shown(meaning: Calibrated | Decision, held_and_size: Callable[[float], tuple[Any, Any]]) -> Coverage:
    """Return how often sets or intervals hold the truth, and their mean size, by those of SHOWN that there are."""
    found = {coverage: held_and_size(coverage) for coverage in SHOWN if coverage in meaning.coverages}
    held = {coverage: float(own) for coverage, (own, _) in found.items()}
    return held, {coverage: float(size) for coverage, (_, size) in found.items()}


def logistic_regressions(count: int) -> list[Callable[[Floats, Labels, Floats, float], tuple[Floats, Floats]]]:
    """Return so many fits by scikit-learn: of z (N, D), labels (N,), weights (N,) and C, coefficients and intercepts.

    Each starts from where it ended last.
    """
    from sklearn.linear_model import LogisticRegression  # only here: it takes 100 MB of memory
    from threadpoolctl import ThreadpoolController

    threads = ThreadpoolController()  # once: it looks through all libraries that are loaded

    def fit(model: Any, z: Floats, labels: Labels, weights: Floats, c: float) -> tuple[Floats, Floats]:
        model.set_params(C=c)
        with threads.limit(limits=1):  # two threads wait for each other at products this small, at worst for long
            model.fit(z, labels, sample_weight=weights)
        return model.coef_, model.intercept_

    settings: dict[str, Any] = {"tol": _LARGEST_GRADIENT, "max_iter": _MOST_ITERATIONS, "warm_start": True}
    return [partial(fit, LogisticRegression(**settings)) for _ in range(count)]
