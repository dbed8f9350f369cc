"""Classification: each image is of one class.

A label is the number of a class, int64; the head has an output a class, whose softmax is its probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from peft_vit.base.statistics import (
    Interval,
    mean_of_proportions,
    paired_proportions,
    prediction_sets,
    probabilities,
    proportion_interval,
)
from peft_vit.core.config import ClassWeights, LossName
from peft_vit.core.records import Calibrated, Decision, Metrics, Predictions
from peft_vit.core.tasks.task import (
    DecidingMetric,
    Floats,
    Labels,
    Meaning,
    Named,
    Task,
    counted_images,
    least_loss_temperature,
    ranked_cells,
    ranked_columns,
    short,
)

if TYPE_CHECKING:
    from torch import Tensor

Classes = NDArray[np.int64]
LARGEST_IMBALANCE = 3.0  # largest class over smallest; above, a constant guess is right in three of four at least
ECE_BINS = 15
_LARGEST_GRADIENT = 1e-7  # at which a linear head has converged; L-BFGS ends there or at its most iterations
_MOST_ITERATIONS = 10_000


# --- measures of logits -----------------------------------------------------------------------------------------------


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log probabilities (N, classes) in float64, without scipy, which no training process loads."""
    shifted = logits - logits.max(1, keepdims=True)  # (N, classes)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def expected_calibration_error(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = ECE_BINS
) -> float:
    """Return the mean gap between confidence and accuracy over equal-width bins (Guo et al. 2017, arXiv 1706.04599).

    Args:
        confidence: probability of the predicted class, (N,) in [0, 1].
        correct: whether the prediction is right, (N,).
        bins: number of bins; bin m holds confidences in ((m - 1) / bins, m / bins].
    """
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (N,)
    gaps = np.bincount(index, weights=correct.astype(float) - confidence, minlength=bins)  # (N,) -> (bins,)
    return float(np.abs(gaps).sum() / len(confidence))


def area_under_roc(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the share of pairs of a 1 and a 0 in which the 1 has the higher score; equal scores count half.

    That is the area under the receiver operating characteristic (Hanley and McNeil, Radiology 143, 1982, p. 29).

    Args:
        scores: (N,), finite.
        labels: (N,), 0 or 1, both present.
    """
    _, places = np.unique(scores, return_inverse=True)  # (N,), from the lowest score on
    ones = np.bincount(places[labels == 1], minlength=places.max() + 1)  # by score
    zeros = np.bincount(places[labels == 0], minlength=places.max() + 1)
    below = np.cumsum(zeros) - zeros  # (scores,): zeros with a lower score
    return float(np.sum(ones * (2 * below + zeros)) / (2 * ones.sum() * zeros.sum()))


def _by_class(labels: Classes, predicted: Classes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many images of each class that is among the labels are found, and how many there are, (classes,)."""
    _, places, images = np.unique(labels, return_inverse=True, return_counts=True)  # (N,) -> (classes,)
    return np.bincount(places[predicted == labels], minlength=len(images)), images


def balanced_accuracy(predicted: Classes, labels: Classes) -> float:
    """Return the mean, over the classes that are among the labels (N,), of the share of their images that is found."""
    hits, images = _by_class(labels, predicted)
    return float(np.mean(hits / images))


def _accuracy_interval(labels: Classes, predicted: Classes, *_: Any) -> Interval:
    return proportion_interval(int((predicted == labels).sum()), len(labels))


def _balanced_interval(labels: Classes, predicted: Classes, *_: Any) -> Interval:
    return mean_of_proportions(*_by_class(labels, predicted))


def _accuracy_gain(labels: Classes, before: Classes, after: Classes, *_: Any) -> Interval:
    was_right, is_right = before == labels, after == labels
    return paired_proportions((is_right & ~was_right).sum(), (was_right & ~is_right).sum(), len(labels))


def _balanced_gain(labels: Classes, before: Classes, after: Classes, *_: Any) -> Interval:
    was_right, is_right = before == labels, after == labels
    gains, images = _by_class(labels, np.where(is_right & ~was_right, labels, -1))
    losses = _by_class(labels, np.where(was_right & ~is_right, labels, -1))[0]
    return paired_proportions(gains, losses, images)


def _right(labels: Classes, predicted: Classes, *_: Any) -> Floats:
    return (predicted == labels).astype(float)


ACCURACY = DecidingMetric("accuracy", "accuracy", _accuracy_interval, _accuracy_gain, _right, counts_images=True)
BALANCED_ACCURACY = DecidingMetric(
    "balanced_accuracy",
    "balanced accuracy",
    _balanced_interval,
    _balanced_gain,
    _right,
    suffix=" balanced",
    equal_classes=True,
    counts_images=True,
)


# --- the task ---------------------------------------------------------------------------------------------------------


class _Classification(Task):
    """See `Task`."""

    name = "classification"
    one_class = True
    column = "classes"
    metrics: Mapping[str, DecidingMetric] = {metric.name: metric for metric in (ACCURACY, BALANCED_ACCURACY)}
    loss_names = ("cross_entropy",)
    compared_by = "accuracy"
    least_outputs = 2
    smooths = True
    gap = "balanced {} accuracy is the mean over {} of {} classes"
    promise = (
        "Prediction sets",
        "Sets that hold the class",
        "Classes in a set",
        "On the test images, which chose nothing. `predict --coverage` gives such sets: the classes that an image may "
        "be of. They hold about as often as asked.",
    )
    holds = "The set at {0:g} % holds the true class of about {0:g} in 100 images"

    def recognizes(self, cells: Mapping[str, Sequence[str]]) -> bool:
        """Return whether there is one column of labels."""
        return set(cells) == {"label"}

    def fault(self, cells: Mapping[str, str]) -> str | None:
        """Refuse an image without a class."""
        return None if "".join(cells.values()) else "expected a path and a label, one value a column"

    def read(self, texts: Sequence[str], columns: Sequence[str]) -> tuple[tuple[str, ...], Classes]:
        """Return the different texts, sorted, and the place of each among them."""
        names = sorted(set(texts))
        number = {name: k for k, name in enumerate(names)}
        return tuple(names), np.array([number[text] for text in texts], dtype=np.int64)

    def made_up(self, classes: Classes) -> tuple[tuple[str, ...], Classes]:
        """Return the classes."""
        return tuple(f"class_{k}" for k in range(int(classes.max()) + 1)), classes

    def text(self, label: Any, names: Sequence[str]) -> str:
        """Return the name of a class."""
        return names[int(label)]

    def images_of(self, images: int, names: Sequence[str]) -> str:
        """Return how many images there are, and classes."""
        return f"{images:,} images of {len(names)} classes"

    def members(self, labels: Classes, place: int) -> NDArray[np.bool_]:
        """Return which images are of a class, (N,)."""
        return np.asarray(labels == place)

    def marks(self, labels: Classes) -> NDArray[np.int64]:
        """Return the classes."""
        return labels

    def deciding(self, counts: NDArray[np.int64]) -> DecidingMetric:
        """Return accuracy, unless a class has more than LARGEST_IMBALANCE times as many images as another."""
        return ACCURACY if counts.max() <= LARGEST_IMBALANCE * counts.min() else BALANCED_ACCURACY

    def counts(self, labels: Classes, width: int) -> NDArray[np.int64]:
        """Return how many images are of each class, (classes,)."""
        return np.bincount(labels, minlength=width)

    def strata(self, labels: Classes) -> NDArray[np.int64]:
        """Return the classes."""
        return labels

    def loss_weights(self, counts: NDArray[np.int64], how: ClassWeights = "balanced") -> Floats:
        """Return weights in inverse proportion to `counted_images`, (classes,); over the images they average to 1.

        Balanced, that is n / (classes * n_c) of class c.
        """
        known = counted_images(counts, how)
        weights: Floats = counts.sum() / ((counts / known).sum() * known)
        return weights

    def loss(
        self,
        outputs: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        label_smoothing: float = 0.0,
        name: LossName | None = None,
    ) -> Tensor:
        """Return sum_n sum_c w[c] t[n, c] (-log p[n, c]) / N, the cross entropy with class weights w and targets t.

        With a label y_n, t[n, y_n] is 1; smoothing (arXiv 1512.00567) makes it (1 - s) t + s / classes. A mixed image
        has shares of two classes, and each share has the weight of its class.

        torch's weighted mean divides by the batch's own weights, sum_n w[y_n], instead of N: in a batch of one the
        weight cancels, and an image counts the less the more its batch weighs. Divided by N, an image's weight is the
        same in any batch.

        Args:
            outputs: logits (N, classes).
            labels: (N,) int64, or shares of each class (N, classes) that add up to 1.
            weights: (classes,), see `loss_weights`, or None: all 1.
            label_smoothing: s, from 0 to below 1.
            name: there is one.
        """
        from torch.nn import functional as F

        if weights is None:
            return F.cross_entropy(outputs, labels, label_smoothing=label_smoothing)
        total = F.cross_entropy(outputs, labels, weight=weights, reduction="sum", label_smoothing=label_smoothing)
        return total / len(labels)

    def shares(self, labels: Tensor, width: int) -> Tensor:
        """Return 1 of each image's class, (N, classes)."""
        from torch.nn import functional as F

        return F.one_hot(labels, width).float()  # (N,) -> (N, classes)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of each image, (N,)."""
        from torch.nn import functional as F

        return F.cross_entropy(outputs, labels, reduction="none")

    def measure(self, outputs: NDArray[np.floating], labels: Classes, decision: Decision | None = None) -> Metrics:
        """Return every measure of a split, from finite logits (N, classes) and labels (N,).

        Of a class without an image in the split nothing is known, and the run's record names it in its warnings. AUROC
        is None unless there are two classes and both have images.
        """
        log_probability = log_softmax(outputs.astype(np.float64))
        probability = np.exp(log_probability)  # (N, classes)
        predicted = log_probability.argmax(1)  # (N,)
        correct = predicted == labels
        binary = outputs.shape[1] == 2 and len(np.unique(labels)) == 2
        return Metrics(
            n=len(labels),
            accuracy=float(correct.mean()),
            balanced_accuracy=balanced_accuracy(predicted, labels),
            auroc=area_under_roc(log_probability[:, 1] - log_probability[:, 0], labels) if binary else None,
            nll=float(-log_probability[np.arange(len(labels)), labels].mean()),
            ece=expected_calibration_error(probability.max(1), correct),
        )

    def predicted(self, outputs: NDArray[np.floating], decision: Decision | None = None) -> Classes:
        """Return the most probable class, (N,); of equal ones the first."""
        return outputs.argmax(1)

    def same(
        self,
        before: NDArray[np.floating],
        after: NDArray[np.floating],
        decision: Decision | None = None,
        decision_after: Decision | None = None,
    ) -> NDArray[np.bool_]:
        """Return of which images both name the same class."""
        return np.asarray(before.argmax(1) == after.argmax(1))

    def right(
        self, outputs: NDArray[np.floating], labels: Classes, decision: Decision | None = None
    ) -> NDArray[np.bool_]:
        """Return of which images the class is named."""
        return np.asarray(outputs.argmax(1) == labels)

    def constant(self, labels: Labels) -> Classes:
        """Return the most frequent class."""
        return np.full_like(labels, np.bincount(labels).argmax())

    def predictions(
        self,
        outputs: NDArray[np.float32],
        labels: Classes,
        positions: NDArray[np.int64],
        *,
        keep_logits: bool = False,
        decision: Decision | None = None,
    ) -> Predictions:
        """Return the most probable class of each image and its probability; of equal ones the first.

        Args:
            outputs: logits (N, classes), finite.
            labels: (N,).
            positions: (N,) in the data set.
            keep_logits: with them.
        """
        log_probability = log_softmax(outputs.astype(np.float64))
        return Predictions(
            images=positions.tolist(),
            labels=labels.tolist(),
            predicted=log_probability.argmax(1).tolist(),
            probability=np.exp(log_probability.max(1)).tolist(),
            logits=short(outputs) if keep_logits else None,
        )

    def answers(
        self, outputs: NDArray[np.floating], names: Sequence[str], meaning: Meaning, coverage: float | None, top: int
    ) -> list[dict[str, Any]]:
        """Return the most probable classes, and with a coverage the set of those that the image may be of."""
        calibrated = cast("Calibrated | None", meaning)
        told = []
        for row in probabilities(outputs, 1.0 if calibrated is None else calibrated.temperature):
            ranked = np.argsort(-row, kind="stable")  # of equal ones the first class
            labels: Named = tuple((names[k], float(row[k])) for k in ranked)
            classes: Named = ()
            if coverage is not None and calibrated is not None:
                inside = prediction_sets(row[None], calibrated.threshold(coverage))[0][ranked]  # (classes,)
                classes = tuple(label for label, is_in in zip(labels, inside, strict=True) if is_in)
            name, probability = labels[0]
            told.append({"class_name": name, "probability": probability, "classes": classes, "top": labels[:top]})
        return told

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

    def columns(self, names: Sequence[str], meaning: Meaning, top: int, coverage: bool) -> list[str]:
        """Return columns of classes and probabilities, and of the set."""
        return [*ranked_columns(names, top), *(["set"] if coverage else [])]

    def cells(self, prediction: Any, coverage: bool) -> list[Any]:
        """Return an image's."""
        return [*ranked_cells(prediction), *([[name for name, _ in prediction.classes]] if coverage else [])]

    def image_weights(self, labels: Classes, weights: Floats) -> Floats:
        """Return the weight of each image's class, (N,)."""
        of_images: Floats = weights[labels]
        return of_images

    def linear_heads(
        self, z: Floats, labels: Classes, strengths: Sequence[float], weights: Floats
    ) -> Iterator[tuple[Floats, Floats]]:
        """Yield multinomial logistic regressions, by scikit-learn, whose C is 1 / (l2 sum w).

        With two classes scikit-learn fits one row for the difference of the logits; W has half of it and its negative
        as rows, whose ||W||_F^2 is half of that row's: C is twice as large.
        """
        from sklearn.linear_model import LogisticRegression  # only here: it takes 100 MB of memory
        from threadpoolctl import ThreadpoolController

        threads = ThreadpoolController()  # once: it looks through all libraries that are loaded
        two = len(np.unique(labels)) == 2
        model = LogisticRegression(tol=_LARGEST_GRADIENT, max_iter=_MOST_ITERATIONS, warm_start=True)
        for l2 in strengths:
            model.set_params(C=(2.0 if two else 1.0) / (l2 * weights.sum()))
            with threads.limit(limits=1):  # two threads wait for each other at products this small, at worst for long
                model.fit(z, labels, sample_weight=weights)
            weight, bias = model.coef_, model.intercept_  # (classes, D), (classes,); (1, D), (1,) of two
            if two:  # (2, D), (2,)
                weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
            yield weight, bias

    def temperature(self, outputs: Tensor, labels: Tensor) -> float:
        """Return what logits have to be divided by for the lowest NLL (arXiv 1706.04599)."""
        return least_loss_temperature(lambda factor: float(self.loss(outputs / factor, labels, None)))

    def training_temperature(self, outputs: Tensor, labels: Tensor) -> float:
        """Return the least power of two with which the loss is at least half of what guessing costs, log(classes) / 2.

        The predicted classes stay the same, and division by it can be undone to the bit.
        """
        factor = 1.0
        while float(self.loss(outputs / factor, labels, None)) < math.log(outputs.shape[1]) / 2:
            factor *= 2
        return factor


CLASSIFICATION: Task = _Classification()
