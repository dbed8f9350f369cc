"""What a task says, for training, evaluation, splits, `tune` and pages alike.

Outputs are what the head returns, (N, K); labels are what a task says they are, N of them. Nothing here needs torch,
so that reports can be made without it; a loss takes it from the tensors' own library when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import scipy
from numpy.typing import NDArray

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import Interval, TemperaturePrior, bootstrap_interval, unseen_share
from peft_vit.core.config import ClassWeights, LossName, TaskName
from peft_vit.core.records import Calibrated, Decision, Metrics, Predictions

if TYPE_CHECKING:
    from torch import Tensor

# Ends and search are not those of `statistics.fit_temperature`: with its own every training would start elsewhere.
LOG_TEMPERATURES = (math.log(0.1), math.log(100.0))
COVERAGES = tuple(percent / 100 for percent in range(80, 100))  # for which a model has thresholds
SHOWN = (0.8, 0.9, 0.95, 0.99)  # that test images measure
_AT_ONCE = 1_000_000  # weights held at a time
_EFFECTIVE = 0.999  # beta of effective numbers
_GAIN, _GAIN_SD, _GAIN_STEPS = 0.03, 0.03, 60  # what training adds at last, its spread, steps for two thirds of it
Labels: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float64]
Meaning: TypeAlias = Calibrated | Decision | None  # of outputs, see `Task.decide`
Column: TypeAlias = Literal["classes", "lists", "numbers"]
Named: TypeAlias = tuple[tuple[str, float], ...]  # classes and their probabilities, from the largest


@dataclass(frozen=True)
class DecidingMetric:
    """A measure by which validation chooses, models are compared, and a person reads how good one is.

    Attributes:
        name: what `training.metric` calls it, and its field of `Metrics`.
        words: what people call it.
        interval: of labels and what was predicted of them: its value, and where it may lie with other test images.
            Probabilities from which on labels are reported may follow, (K,) or of each image (N, K).
        gain: of labels and what was predicted of them before and after: the value after minus the one before, likewise.
            Thresholds of both may follow.
        by_image: of what `interval` takes: what each image brings, (N,), whose mean is the value. Of balanced accuracy
            that is the mean in which each class counts the same.
        suffix: said behind a value where one may take it for another metric.
        sign: 1 if the higher value is the better one, -1 if the lower one is.
        equal_classes: each class counts as much as any other, however many images it has.
        is_share: it lies between 0 and 1, and is said in percent.
        counts_images: it is a share of images, so that each brings 0 or 1.
        has_unit: it is in the unit of the labels.
        as_share: a measure that says the same from 0 to 1.
    """

    name: str
    words: str
    interval: Callable[..., Interval]
    gain: Callable[..., Interval]
    by_image: Callable[..., Floats]
    suffix: str = ""
    sign: Literal[1, -1] = 1
    equal_classes: bool = False
    is_share: bool = True
    counts_images: bool = False
    has_unit: bool = False
    as_share: str = ""

    def of(self, metrics: Metrics) -> float:
        """Return its value."""
        return metrics.value(self.name)

    def share_of(self, metrics: Metrics) -> float:
        """Return what is larger of the better predictions, and 1 of perfect ones."""
        return metrics.value(self.as_share or self.name)

    def loss(self, *arguments: Any) -> Interval:
        """Return how much worse a metric becomes; arguments as those of `gain`."""
        gain = self.gain(*arguments)
        if self.sign < 0:
            return gain
        low, high = (None if end is None else -end for end in (gain.high, gain.low))
        return replace(gain, estimate=-gain.estimate, low=low, high=high)

    def unit(self, decision: Decision | None) -> float:
        """Return the unit whose hundredths differences are counted in: 1, or the standard deviation of one number."""
        if self.has_unit and decision is not None and len(decision.spread) == 1:
            return decision.spread[0]
        return 1.0

    def images_alike(self, labels: Labels) -> float:
        """Return how many images would tell its value as well as these N if all counted the same.

        That is N, and where classes count the same ``K^2 / sum 1 / n_c`` of K with n_c images: then the mean of K
        shares p, all of them about as large, has the variance of a share of so many, ``sum p (1 - p) / n_c / K^2``.
        """
        if not self.equal_classes or not len(labels):
            return float(len(labels))
        counts = np.unique(labels, return_counts=True)[1]  # (K,)
        return float(len(counts) ** 2 / np.sum(1 / counts))

    def quality(self, metrics: Metrics) -> tuple[float, float]:
        """Return what is larger of the better predictions: its value, and of equal ones the lower loss."""
        return self.sign * self.of(metrics), -metrics.nll

    def worth(self, metrics: Metrics, *, before: Metrics, expected: float, images: float) -> bool:
        """Return whether a trained model is to be kept: few images do not outweigh what training usually brings.

        Its gain g has the prior N(expected, s^2), s = 0.03, and n images measure g with about the variance
        e^2 = v (1 - v) / n of its value v, a share. The posterior mean is above 0 if the measured gain is above
        -expected e^2 / s^2. What is worse by more than 2 e is not kept: training may fail, of which the prior knows
        nothing. A value in another unit has to be better.

        Args:
            metrics: of the trained model.
            before: on the same images, of what it would be kept instead of.
            expected: gain, see `expected_gain`.
            images: n, see `images_alike`.
        """
        value, slack = self.of(metrics), 0.0
        if self.is_share and 0 <= value <= 1:
            share = min(max(value, 0.5 / images), 1 - 0.5 / images)
            error = math.sqrt(share * (1 - share) / images)
            slack = min(expected * error**2 / _GAIN_SD**2, 2 * error)
        return (self.sign * (value - self.of(before)) + slack, -metrics.nll) > (0.0, -before.nll)

    def text(self, value: float) -> str:
        """Return a value as a terminal shows it."""
        return self.plain(value) + self.suffix

    def plain(self, value: float) -> str:
        """Return a value without what it is of."""
        return f"{value:.1%}" if self.is_share else f"{value:.3g}"


def expected_gain(steps: int) -> float:
    """Return what so many steps of training may add to a regression on frozen features, a share.

    About 3 points at last, most of it in 100 steps: LoRA's mean gain over its probe on ELPV, digits and Fashion-MNIST
    at 50 labels a class, and how it grows from 48 to 498 steps. From data set to data set it varies by about as much.
    """
    return _GAIN * (1 - math.exp(-steps / _GAIN_STEPS))


def bootstrapped(
    name: str,
    words: str,
    statistic: Callable[[Labels, Labels, Floats], Floats],
    *,
    at_thresholds: bool = False,
    cases: Callable[[Labels], Sequence[int]] = lambda labels: [len(labels)],
    **more: Any,
) -> DecidingMetric:
    """Return a metric whose intervals are bootstraps over images, that of a gain over the same images of both.

    Args:
        name: as in `DecidingMetric`.
        words: likewise.
        statistic: of labels (N, K), what was predicted (N, K), and weights of images (B, N): its values (B,).
        at_thresholds: it reads 1 for what is reported, from a label's threshold on, by default 1/2.
        cases: of labels (N, K): of each part that it is the mean of, how many independent cases speak for it.
        more: other attributes.
    """

    is_share = more.get("is_share", True)

    def taken(predicted: Labels, thresholds: Sequence[float]) -> Floats:
        p = np.asarray(predicted, dtype=float)
        return (p >= (thresholds if len(thresholds) else 0.5)).astype(float) if at_thresholds else p

    def interval(labels: Labels, predicted: Labels, thresholds: Sequence[float] = ()) -> Interval:
        y, p = np.asarray(labels, dtype=float), taken(predicted, thresholds)  # what is not known is None in records
        unseen = float(np.mean([unseen_share(count) for count in cases(y)])) if is_share else None
        return bootstrap_interval(len(y), lambda weights: statistic(y, p, weights), unseen=unseen)

    def gain(
        labels: Labels, before: Labels, after: Labels, was: Sequence[float] = (), now: Sequence[float] = ()
    ) -> Interval:
        y, p, q = np.asarray(labels, dtype=float), taken(before, was), taken(after, now)
        unseen = unseen_share(len(y)) if is_share else None  # images on which the two may differ in what counts

        def difference(weights: Floats) -> Floats:
            return statistic(y, q, weights) - statistic(y, p, weights)

        return bootstrap_interval(len(y), difference, unseen=unseen, bounds=(-1.0, 1.0))

    def by_image(labels: Labels, predicted: Labels, thresholds: Sequence[float] = ()) -> Floats:
        y, p = np.asarray(labels, dtype=float), taken(predicted, thresholds)
        return pseudo_values(len(y), lambda weights: statistic(y, p, weights))

    return DecidingMetric(name, words, interval, gain, by_image, **more)


def pseudo_values(images: int, statistic: Callable[[Floats], Floats]) -> Floats:
    """Return N T - (N - 1) T_i for each of N images, where T_i is a statistic T without image i: jackknife, (N,).

    Of a mean they are its terms. Of other statistics their mean has less bias than T, and their variance over N is
    about that of T. Source: Tukey, Annals of Mathematical Statistics 29 (1958), p. 614.

    Args:
        images: N.
        statistic: of weights (B, N): its values (B,).
    """
    whole, without = float(statistic(np.ones((1, images)))[0]), np.empty(images)
    block = max(1, _AT_ONCE // images)
    for start in range(0, images, block):
        left_out = 1 - np.eye(images)[start : start + block]  # (B, N)
        without[start : start + block] = statistic(left_out)
    values: Floats = images * whole - (images - 1) * np.nan_to_num(without, nan=whole)
    return values


class Errors(NamedTuple):
    """How far numbers are from the true ones."""

    sizes: Floats  # (N, K), predicted less true
    reach: Floats | None  # (N, K): how far intervals reach to both sides; None: there are none
    coverage: float = 0.0  # of these


class Shown(NamedTuple):
    """Test images that a page shows."""

    slug: str
    title: str
    rule: str  # how they were chosen
    groups: tuple[tuple[str, tuple[tuple[int, tuple[str, ...]], ...]], ...]  # title, and of each image place and lines


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
        gap: what a split says whose images lack a class, of its name.
        outputs: what people call them.
        linear: what people call its linear head.
        note: how to read its table of outputs.
        promise: what people call what `predict --coverage` gives, its shares that hold, its size, and what it is.
        holds: of which images it holds the truth, at so many percent. Never more than about: validation images have
            chosen steps, sizes and penalties before they make thresholds, and folds do not test the last training.
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
    gap: str = ""
    outputs: str = "classes"
    linear: str = "logistic regression"
    note: str = ""
    promise: tuple[str, str, str, str]
    holds: str = ""

    # --- labels as people have them ---

    def recognizes(self, cells: Mapping[str, Sequence[str]]) -> bool:
        """Return whether a table's columns, but path and split, look like its labels."""

    def fault(self, cells: Mapping[str, str]) -> str | None:
        """Return what is wrong with a row's cells, by column; None: nothing."""

    def read(self, texts: Sequence[str], columns: Sequence[str]) -> tuple[tuple[str, ...], Labels]:
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

    def read_split(
        self, texts: Sequence[str], columns: Sequence[str], is_test: NDArray[np.bool_] | None
    ) -> tuple[tuple[str, ...], Labels]:
        """Return likewise of images of which some, (N,), are for the test alone.

        Raises:
            UserError: as `refuse_one_answer`, of all images and of the others.
        """
        names, labels = self.read(texts, columns)
        self.refuse_one_answer(names, labels, "image")
        if is_test is not None and not is_test.all():
            self.refuse_one_answer(names, labels[~is_test], "training image")
        return names, labels

    def made_up(self, classes: NDArray[np.int64]) -> tuple[tuple[str, ...], Labels]:
        """Return names and labels for made-up images of so many classes, (N,)."""

    def text(self, label: Any, names: Sequence[str]) -> str:
        """Return a label in words."""
        return " ".join(f"{name}={value:g}" for name, value in zip(names, label, strict=True))

    def images_of(self, images: int, names: Sequence[str]) -> str:
        """Return how many images there are of what, in words."""

    def counted(self, names: Sequence[str]) -> str:
        """Return how many outputs there are, in words."""
        return f"{len(names)} {self.outputs if len(names) != 1 else self.outputs.removesuffix('s')}"

    def members(self, labels: Labels, place: int) -> NDArray[np.bool_]:
        """Return which images count for an output, (N,): those of its class."""

    def marks(self, labels: Labels) -> NDArray[np.int64]:
        """Return numbers, (N,), that are equal where copies of one image may have both labels."""

    def counts(self, labels: Labels, width: int) -> NDArray[np.int64]:
        """Return how many images are of each class, (K,)."""
        return np.array([self.members(labels, place).sum() for place in range(width)])

    def strata(self, labels: Labels) -> NDArray[Any]:
        """Return what splits and folds hold in equal shares: (N,) integers, or (N, S) bool where they have several."""

    # --- learning ---

    def fitted(self, labels: Labels) -> Task:
        """Return the task as it is learned from these labels of training images."""
        return self

    def restored(self, decision: Decision | None) -> Task:
        """Return the task as it was learned by a model whose outputs mean this."""
        return self

    def aligned(self, outputs: NDArray[np.floating], learned: Task) -> NDArray[np.floating]:
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

    def deciding(self, counts: NDArray[np.int64]) -> DecidingMetric:
        """Return the metric that `auto` is, with so many images of each class (K,)."""
        return next(iter(self.metrics.values()))

    def head_width(self, names: Sequence[str]) -> int:
        """Return how many outputs the head has, for the names of what is predicted."""
        return len(names)

    def loss_weights(self, counts: NDArray[np.int64], how: ClassWeights = "balanced") -> Floats:
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

    def linear_heads(
        self, z: Floats, labels: Labels, strengths: Sequence[float], weights: Floats
    ) -> Iterator[tuple[Floats, Floats]]:
        """Yield weight (K, D) and bias (K,) of the linear head with the least penalized loss, one after the other.

        Args:
            z: standardized features (N, D).
            labels: of N images.
            strengths: l2 of ``sum_i w_i loss_i / sum_i w_i + (l2 / 2) ||W||_F^2``.
            weights: w_i (N,).
        """

    def left_out(
        self, z: Floats, labels: Labels, groups: NDArray[np.int64], strengths: Sequence[float], weights: Floats
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
        """Return what outputs are to be divided by for the lowest loss on held-out images."""
        return 1.0

    def training_temperature(self, outputs: Tensor, labels: Tensor) -> float:
        """Return what outputs are divided by beyond that while training, a power of two."""
        return 1.0

    # --- what came of it ---

    def measure(self, outputs: NDArray[np.floating], labels: Labels, decision: Decision | None = None) -> Metrics:
        """Return every measure of a split, with a decision those of what is shown by it."""

    def predicted(self, outputs: NDArray[np.floating], decision: Decision | None = None) -> Labels:
        """Return what is predicted, as metrics take it."""

    def same(
        self,
        before: NDArray[np.floating],
        after: NDArray[np.floating],
        decision: Decision | None = None,
        decision_after: Decision | None = None,
    ) -> NDArray[np.bool_]:
        """Return of which images two models' outputs say the same, (N,)."""

    def right(
        self, outputs: NDArray[np.floating], labels: Labels, decision: Decision | None = None
    ) -> NDArray[np.bool_]:
        """Return of which images outputs say what is true, (N,)."""

    def constant(self, labels: Labels) -> Labels:
        """Return what always the same answer would predict of images, at its best."""

    def decide(
        self,
        outputs: NDArray[np.floating],
        labels: Labels,
        prior: TemperaturePrior,
        images: NDArray[np.int64] | None = None,
    ) -> Decision | None:
        """Return what outputs mean, by images that were not trained on; None: softmax, see `Calibrated`.

        Args:
            outputs: (N, K).
            labels: N.
            prior: of the temperature.
            images: (N,) which image each row is of, as where folds are repeated; None: each of another.
        """
        return None

    def covered(
        self, decision: Decision, outputs: NDArray[np.floating], labels: Labels
    ) -> tuple[dict[float, float], dict[float, float]]:
        """Return by coverage of SHOWN how often sets or intervals hold the truth, and their mean size."""
        return {}, {}

    def predictions(
        self,
        outputs: NDArray[np.float32],
        labels: Labels,
        positions: NDArray[np.int64],
        *,
        keep_logits: bool = False,
        decision: Decision | None = None,
    ) -> Predictions:
        """Return what is predicted of each image of a split."""
        known = [[None if np.isnan(value) else float(value) for value in row] for row in labels]
        return Predictions(
            images=positions.tolist(),
            labels=known,
            predicted=self.predicted(outputs, decision).tolist(),
            probability=[],
            logits=short(outputs) if keep_logits else None,
        )

    def answers(
        self, outputs: NDArray[np.floating], names: Sequence[str], meaning: Meaning, coverage: float | None, top: int
    ) -> list[dict[str, Any]]:
        """Return what is reported of each image, as arguments of `deployment.Prediction`."""

    def for_browser(self, meaning: Meaning, coverage: float | None) -> dict[str, Any]:
        """Return what web.js has to know to answer alike, and the words of its page.

        Args:
            meaning: of outputs.
            coverage: of what is promised; None: the model has none.
        """

    def columns(self, names: Sequence[str], meaning: Meaning, top: int, coverage: bool) -> list[str]:
        """Return the columns of a table of predictions, between `file` and `unlike`."""

    def cells(self, prediction: Any, coverage: bool) -> list[Any]:
        """Return an image's cells of them."""

    # --- the page ---

    def rows(
        self, labels: Labels, predicted: Labels, names: Sequence[str], decision: Decision | None
    ) -> list[dict[str, Any]]:
        """Return what a page says of each output on test images: its name, and measures; none: it says it otherwise."""
        return []

    def errors(self, labels: Labels, predicted: Labels, decision: Decision | None) -> Errors | None:
        """Return how far predictions are off; None: they are not numbers."""
        return None

    def together(
        self, labels: Labels, predicted: Labels, decision: Decision | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Return on how many images two outputs are together, (K, K), in truth and as predicted; None: never."""
        return None

    def shown(
        self, labels: Labels, predicted: Labels, names: Sequence[str], decision: Decision | None
    ) -> Iterator[Shown]:
        """Yield which test images a page shows, such as the worst ones."""
        yield from ()


def meaning_fields(meaning: Meaning) -> dict[str, Any]:
    """Return what outputs mean as fields of a record or a card: `decision`, or `calibrated` of a softmax."""
    is_decision = isinstance(meaning, Decision)
    return {"calibrated": None if is_decision else meaning, "decision": meaning if is_decision else None}


def counted_images(counts: NDArray[np.int64], how: ClassWeights) -> Floats:
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


def least_loss_temperature(loss: Callable[[float], float]) -> float:
    """Return what outputs have to be divided by for the lowest loss, which is given for each divisor."""
    found = scipy.optimize.minimize_scalar(
        lambda log_t: loss(math.exp(log_t)), bounds=LOG_TEMPERATURES, method="bounded"
    )
    return math.exp(float(found.x))


def rows_of(answers: Sequence[Any]) -> Labels:
    """Return labels, or what was predicted, as metrics take it: (N,), or (N, K) with NaN for what is not known."""
    rows = np.array(answers)
    return rows.astype(float) if rows.dtype == object else rows


def short(outputs: NDArray[np.float32]) -> list[list[float]]:
    """Return outputs (N, K) as short as float32 is."""
    return [[float(str(z)) for z in row] for row in outputs]


def ranked_columns(names: Sequence[str], top: int) -> list[str]:
    """Return the columns of the most probable classes: class, probability, class_2, ..."""
    numbers = ("", *(f"_{place}" for place in range(2, min(top, len(names)) + 1)))
    return [name + number for number in numbers for name in ("class", "probability")]


def ranked_cells(prediction: Any) -> list[Any]:
    """Return an image's cells of them."""
    return [cell for named in prediction.top for cell in named]
