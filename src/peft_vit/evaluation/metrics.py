"""How good predictions are: accuracy, balanced accuracy, AUROC, NLL, ECE."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from peft_vit.records import Metrics

ECE_BINS = 15


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log probabilities (N, classes) in float64."""
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


def measure(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> Metrics:
    """Return every measure of a split, from finite logits (N, classes) and labels (N,).

    Balanced accuracy is the mean, over the classes that have an image in the split, of the share of their images that
    is found (scikit-learn's `balanced_accuracy_score`); of a class without an image nothing is known, and the run's
    record names it in its warnings. AUROC is None unless there are two classes and both have images.
    """
    log_probability = log_softmax(logits.astype(np.float64))
    probability = np.exp(log_probability)  # (N, classes)
    predicted = log_probability.argmax(1)  # (N,)
    correct = predicted == labels
    binary = logits.shape[1] == 2 and len(np.unique(labels)) == 2
    return Metrics(
        n=len(labels),
        accuracy=float(correct.mean()),
        balanced_accuracy=float(balanced_accuracy_score(labels, predicted)),
        auroc=float(roc_auc_score(labels, log_probability[:, 1] - log_probability[:, 0])) if binary else None,
        nll=float(-log_probability[np.arange(len(labels)), labels].mean()),
        ece=expected_calibration_error(probability.max(1), correct),
    )
