"""Classification: each image is of one class.

A label is the number of a class, int64; the head has an output a class, whose softmax is its probability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from peft_vit.base.statistics import (
    Interval,
    TemperaturePrior,
    class_scores,
    conformal_quantile,
    fit_temperature,
    mean_of_proportions,
    paired_proportions,
    prediction_sets,
    probabilities,
    proportion_interval,
)
from peft_vit.core.config import ClassWeights, LossName
from peft_vit.core.records import Calibrated, Decision, Metrics, TestedCalibration
from peft_vit.core.tasks.metric import DecidingMetric, Flags, Floats, Ints, Labels, Outputs, area_under_roc
from peft_vit.core.tasks.task import (
    CONVERGED,
    LinearHeads,
    Meaning,
    NamedLabels,
    Task,
    coverage_thresholds,
    effective_counts,
    logistic_regressions,
    measured_coverage,
)

if TYPE_CHECKING:
    from torch import Tensor

Classes = Ints  # (N,), the number of each image's class
LARGEST_IMBALANCE = 3.0  # largest class over smallest; above, a constant guess is right in three of four at least
ECE_BINS = 15
_WORST = 0.01  # share above chance, at least, and below all, by which a temperature is expected


# --- measures of logits -----------------------------------------------------------------------------------------------


def log_softmax(logits: Outputs) -> Floats:
    """Return log probabilities (N, classes) in float64, without scipy, which no training process loads."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)  # (N, classes)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def expected_calibration_error(confidence: Floats, correct: Flags, bins: int = ECE_BINS) -> float:
    """Return the mean gap between confidence and accuracy over equal-width bins (Guo et al. 2017, arXiv 1706.04599).

    Args:
        confidence: probability of the predicted class, (N,) in [0, 1].
        correct: whether the prediction is right, (N,).
        bins: number of bins; bin m holds confidences in ((m - 1) / bins, m / bins].
    """
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (N,)
    gaps = np.bincount(index, weights=correct.astype(float) - confidence, minlength=bins)  # (N,) -> (bins,)
    return float(np.abs(gaps).sum() / len(confidence))


def _auroc(log_probability: Floats, labels: Classes) -> float:
    scores = log_probability[:, 1] - log_probability[:, 0]  # (N,)
    return float(area_under_roc(scores, labels == 1, np.ones((1, len(labels))))[0])


def _by_class(labels: Classes, predicted: Classes) -> tuple[Ints, Ints]:
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


def _accuracy_gain(labels: Classes, baseline: Classes, predicted: Classes, *_: Any) -> Interval:
    was_right, is_right = baseline == labels, predicted == labels
    return paired_proportions((is_right & ~was_right).sum(), (was_right & ~is_right).sum(), len(labels))


def _balanced_gain(labels: Classes, baseline: Classes, predicted: Classes, *_: Any) -> Interval:
    was_right, is_right = baseline == labels, predicted == labels
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


def usual_temperature(accuracy: float, num_classes: int, most_images: float = math.inf) -> TemperaturePrior:
    """Return what is known of a classifier's temperature before held-out images, if it learned from smoothed labels.

    ln T = 0.24 - 0.29 x, x the logit of the accuracy above chance, (a - 1/K) / (1 - 1/K), between -1 and 4: the more
    of new images are right, the more too careful a model is whose labels were smoothed by 0.1. Fitted to the best T on
    60 to 400 test images of 11 trainings by LoRA, 56 to 592 steps, on digits, clothing and solar cells (20 to 256
    labels a class); ln T has a standard deviation of 0.11 around it, twice that as the accuracy is only expected.

    Args:
        accuracy: expected on new images.
        num_classes: K.
        most_images: see `TemperaturePrior`.
    """
    share = (accuracy - 1 / num_classes) / (1 - 1 / num_classes)
    share = min(max(share, _WORST), 1 - _WORST)
    x = min(max(math.log(share / (1 - share)), -1.0), 4.0)
    return TemperaturePrior(math.exp(0.24 - 0.29 * x), 0.22, most_images)


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
    several = "{:,} images of {} classes"
    gap = "balanced {} accuracy is the mean over {} of {} classes"

    def recognizes(self, cells: Mapping[str, Sequence[str]]) -> bool:
        """Return whether there is one column of labels."""
        return set(cells) == {"label"}

    def fault(self, cells: Mapping[str, str]) -> str | None:
        """Refuse an image without a class."""
        return None if "".join(cells.values()) else "has no label"

    def read(self, texts: Sequence[str], columns: Sequence[str]) -> NamedLabels:
        """Return the different texts, sorted, and the place of each among them."""
        names = sorted(set(texts))
        number = {name: k for k, name in enumerate(names)}
        return tuple(names), np.array([number[text] for text in texts], dtype=np.int64)

    def synthetic_labels(self, classes: Classes) -> NamedLabels:
        """Return the classes."""
        return tuple(f"class_{k}" for k in range(int(classes.max()) + 1)), classes

    def text(self, label: Any, names: Sequence[str]) -> str:
        """Return the name of a class."""
        return names[int(label)]

    def members(self, labels: Classes, place: int) -> Flags:
        """Return which images are of a class, (N,)."""
        return labels == place

    def label_ids(self, labels: Classes) -> Ints:
        """Return the classes."""
        return labels

    def deciding(self, counts: Ints) -> DecidingMetric:
        """Return accuracy, unless a class has more than LARGEST_IMBALANCE times as many images as another."""
        return ACCURACY if counts.max() <= LARGEST_IMBALANCE * counts.min() else BALANCED_ACCURACY

    def counts(self, labels: Classes, width: int) -> Ints:
        """Return how many images are of each class, (classes,)."""
        return np.bincount(labels, minlength=width)

    def strata(self, labels: Classes) -> Ints:
        """Return the classes."""
        return labels

    def loss_weights(self, counts: Ints, scheme: ClassWeights) -> Floats:
        """Return weights in inverse proportion to `effective_counts`, (classes,); over the images they average to 1.

        Balanced, that is n / (classes * n_c) of class c.
        """
        effective = effective_counts(counts, scheme)
        return counts.sum() / ((counts / effective).sum() * effective)

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

    def measure(self, outputs: Outputs, labels: Classes, decision: Decision | None = None) -> Metrics:
        """Return every measure of a split, from finite logits (N, classes) and labels (N,).

        Of a class without an image in the split nothing is known, and the run's record names it in its warnings. AUROC
        is None unless there are two classes and both have images.
        """
        log_probability = log_softmax(outputs)
        probability = np.exp(log_probability)  # (N, classes)
        predicted = log_probability.argmax(1)  # (N,)
        correct = predicted == labels
        binary = outputs.shape[1] == 2 and len(np.unique(labels)) == 2
        return Metrics(
            n=len(labels),
            accuracy=float(correct.mean()),
            balanced_accuracy=balanced_accuracy(predicted, labels),
            auroc=_auroc(log_probability, labels) if binary else None,
            nll=float(-log_probability[np.arange(len(labels)), labels].mean()),
            ece=expected_calibration_error(probability.max(1), correct),
        )

    def predicted(self, outputs: Outputs, decision: Decision | None = None) -> Classes:
        """Return the most probable class, (N,); of equal ones the first."""
        return log_softmax(outputs).argmax(1)

    def confidence(self, outputs: Outputs) -> list[float]:
        """Return its probability, (N,)."""
        return np.exp(log_softmax(outputs).max(1)).tolist()

    def meaning(
        self, outputs: Outputs, labels: Classes, prior: TemperaturePrior, images: Ints | None = None
    ) -> Calibrated | None:
        """Return the temperature, and thresholds of sets of the probabilities that it makes; None without images.

        One number on so many images hardly fits to them, so the thresholds take the same images
        (docs/explanation/tuning.md has how far coverage then is from what was asked).
        """
        if not len(labels):
            return None
        which = np.arange(len(labels)) if images is None else images  # (N,)
        temperature = fit_temperature(outputs, labels, prior, images)
        scores = class_scores(probabilities(outputs, temperature), labels)
        coverages, thresholds = coverage_thresholds(lambda coverage: conformal_quantile(scores, coverage, which))
        return Calibrated(images=len(set(which)), temperature=temperature, coverages=coverages, thresholds=thresholds)

    def tested(self, meaning: Meaning, outputs: Outputs, labels: Classes, unlike: int | None) -> TestedCalibration:
        """Return NLL, probabilities and coverage with the temperature of `meaning`, or 1 without it."""
        calibrated = cast("Calibrated | None", meaning)
        p = probabilities(outputs, 1.0 if calibrated is None else calibrated.temperature)  # (N, classes)
        true_p, rows = 1 - class_scores(p, labels), np.arange(len(p))  # (N,)

        def held_and_size(coverage: float) -> tuple[float, float]:
            inside = prediction_sets(p, cast("Calibrated", calibrated).threshold(coverage))
            return inside[rows, labels].mean(), inside.sum(1).mean()

        covered, sizes = ({}, {}) if calibrated is None else measured_coverage(calibrated, held_and_size)
        return TestedCalibration(
            nll=float(-np.log(np.maximum(true_p, np.finfo(float).tiny)).mean()),
            probability=p[rows, outputs.argmax(1)].clip(0, 1).tolist(),
            covered=covered,
            set_size=sizes,
            unlike=unlike,
        )

    def constant(self, labels: Labels) -> Classes:
        """Return the most frequent class."""
        return np.full_like(labels, np.bincount(labels).argmax())

    def image_weights(self, labels: Classes, weights: Floats) -> Floats:
        """Return the weight of each image's class, (N,)."""
        return weights[labels]

    def linear_heads(
        self, z: Floats, labels: Classes, strengths: Sequence[float], weights: Floats, tolerance: float = CONVERGED
    ) -> LinearHeads:
        """Yield multinomial logistic regressions, by scikit-learn, whose C is 1 / (l2 sum w).

        With two classes scikit-learn fits one row for the difference of the logits; W has half of it and its negative
        as rows, whose ||W||_F^2 is half of that row's: C is twice as large.
        """
        (fit,), two = logistic_regressions(1, tolerance), len(np.unique(labels)) == 2
        for l2 in strengths:
            c = (2.0 if two else 1.0) / (l2 * weights.sum())
            weight, bias = fit(z, labels, weights, c)  # (classes, D), (classes,); (1, D), (1,) of two
            if two:  # (2, D), (2,)
                weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
            yield weight, bias

    def guess_loss(self, outputs: Tensor, labels: Tensor) -> float:
        """Return log(classes)."""
        return math.log(outputs.shape[1])


CLASSIFICATION: Task = _Classification()
