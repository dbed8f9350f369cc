"""How good predictions are: accuracy, balanced accuracy, AUROC, NLL, ECE."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from peft_vit.records import Metrics

ECE_BINS = 15


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log probabilities (N, classes) in float64, without scipy, which no training process loads."""
    shifted = logits - logits.max(1, keepdims=True)
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


def balanced_accuracy(predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Return the mean, over the classes that are among the labels (N,), of the share of their images that is found."""
    _, places, images = np.unique(labels, return_inverse=True, return_counts=True)  # (N,) -> (classes,)
    found = np.bincount(places[predicted == labels], minlength=len(images))
    return float(np.mean(found / images))


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
    below = np.cumsum(zeros) - zeros
    return float(np.sum(ones * (2 * below + zeros)) / (2 * ones.sum() * zeros.sum()))


def measure(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> Metrics:
    """Return every measure of a split, from finite logits (N, classes) and labels (N,).

    Of a class without an image in the split nothing is known, and the run's record names it in its warnings. AUROC is
    None unless there are two classes and both have images.
    """
    log_probability = log_softmax(logits.astype(np.float64))
    probability = np.exp(log_probability)  # (N, classes)
    predicted = log_probability.argmax(1)  # (N,)
    correct = predicted == labels
    binary = logits.shape[1] == 2 and len(np.unique(labels)) == 2
    return Metrics(
        n=len(labels),
        accuracy=float(correct.mean()),
        balanced_accuracy=balanced_accuracy(predicted, labels),
        auroc=area_under_roc(log_probability[:, 1] - log_probability[:, 0], labels) if binary else None,
        nll=float(-log_probability[np.arange(len(labels)), labels].mean()),
        ece=expected_calibration_error(probability.max(1), correct),
    )
