"""Which images to label next, what a model of the labels proposes for the others, and how good it is.

Everything is computed from frozen features, without torch, of the images that have some: all are finite. Images that
test, and those that are skipped, are neither labelled nor available here; `expected_accuracy` alone asks for tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from peft_vit.base.statistics import Interval, TemperaturePrior, fit_temperature, proportion_interval
from peft_vit.base.statistics.drawing import assign_folds
from peft_vit.base.statistics.more_labels import gain_of_doubling
from peft_vit.core.tasks.classification import CLASSIFICATION, log_softmax
from peft_vit.core.tasks.metric import Flags, Floats, Ints

Features = NDArray[np.float32]  # (N, D)
_COVERED = 3000  # images at most that are covered, and chosen from, at a time
_COPY = 1e-5  # squared distance of unit vectors up to which two images are copies
_L2, _TOLERANCE = 0.03, 1e-3  # of the regression; at the second, probabilities are right to a few hundredths
_FOLDS, _HELD_OUT = 5, 200  # images are held out in folds until these are so many
_PRIOR = TemperaturePrior(median=2.0, spread=0.7)  # a regression separates few images, and is too sure of others
_SURE, _FEWEST_OF_WALL, _SIZE_OF_WALL = 0.9, 8, 20  # share of a wall that is expected to be right, and its images
# Labels to train on of a class, in the mean, before there is a wall, which tells a model little: of a draw of digits
# and of Fashion-MNIST 85.7 and 67.0 % were right after 186 and 182 keys with walls from 8 labels a class on, without
# any 89.2 and 66.6 % after 150 (benchmarks/labelling.py --hands).
FEWEST_OF_CLASS = 15


def herding(
    features: Features, labelled: Ints, available: Flags, count: int, probabilities: Floats | None = None
) -> list[int]:
    """Return the images that cover the most of what a model is unsure of, together with what is labelled.

    One after the other, each is the x with the largest

        sum_n U(x_n) max(0, k(x_n, x) - max_y k(x_n, y)),    k(a, b) = exp(-|a - b|^2 / s^2),

    over available images n, y those that are labelled or chosen before, on standardized features of length 1. U is 1
    less the difference of the two largest probabilities; s is the median distance of a labelled image to the nearest
    other one, copies apart. So few labels choose what is typical, many choose what is uncertain. Source: Bae, Oliveira
    and Sutherland 2025, arXiv 2412.20644, with margins; its s is the smallest distance, which two like images decide.

    Args:
        features: (N, D).
        labelled: class of each image, (N,); -1: it has none.
        available: which images may be chosen, (N,).
        count: how many are wanted; fewer are returned where fewer are available.
        probabilities: of each image and class, (N, K), see `propose`; None: nobody knows, U is 1.
    """
    pool, known = np.flatnonzero(available), np.flatnonzero(labelled >= 0)
    if len(pool) > _COVERED:  # another sample with each label, so that no image is left out for ever
        pool = np.random.default_rng([0, len(known)]).choice(pool, _COVERED, replace=False)
    z = _standardized(features)
    unit = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    of_pool, of_known = unit[pool], unit[known]  # (P, D), (L, D)
    between = _squared_distances(of_known, of_known)  # (L, L)
    nearest = between.min(1, initial=np.inf, where=between > _COPY)  # (L,)
    scale = np.median(nearest[np.isfinite(nearest)]) if np.isfinite(nearest).any() else 1.0
    unsure = np.ones(len(pool), np.float32)
    if probabilities is not None:
        second, first = np.partition(probabilities[pool], -2, axis=1)[:, -2:].T
        unsure = (1 - (first - second)).astype(np.float32)
    kernel = np.exp(-_squared_distances(of_pool, of_pool) / scale)  # (P, P)
    covered = np.exp(-_squared_distances(of_known, of_pool) / scale).max(0, initial=0.0)  # (P,)
    chosen: list[int] = []
    for _ in range(min(count, len(pool))):
        gain = np.maximum(kernel - covered, 0) @ unsure  # (P,)
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
        covered = np.maximum(covered, kernel[chosen[-1]])
    return pool[chosen].tolist()


def propose(features: Features, labelled: Ints, num_classes: int) -> Floats:
    """Return probabilities of each image and class, (N, K), by a regression on the images that are labelled.

    A class without a labelled image has none; with fewer than two such classes all are equally probable.
    """
    z, known = _standardized(features), labelled >= 0
    logits = _logits(z, labelled, num_classes)
    if logits is None:
        return np.full((len(features), num_classes), 1 / num_classes)
    return np.exp(log_softmax(logits / _temperature(z[known], labelled[known])))


def wall(probabilities: Floats, available: Flags, num_labelled: int) -> tuple[int, list[int]] | None:
    """Return a class and the available images that are surest of it, the surest first; None: no class has enough.

    There are as many as nine in ten are expected to be right of, so that who looks at all of them has few to take out.
    With few labels a class one by one is worth more to a model.

    Args:
        probabilities: (N, K), see `propose`.
        available: which images may be shown, (N,).
        num_labelled: labels to train on.
    """
    predicted, walls = probabilities.argmax(1), []
    if num_labelled < FEWEST_OF_CLASS * probabilities.shape[1]:
        return None
    for label in range(probabilities.shape[1]):
        own = np.flatnonzero(available & (predicted == label))
        surest = own[np.argsort(-probabilities[own, label], kind="stable")][:_SIZE_OF_WALL]
        expected = np.cumsum(probabilities[surest, label]) / np.arange(1, len(surest) + 1)  # falls
        enough = int((expected >= _SURE).sum())
        if enough >= _FEWEST_OF_WALL:
            walls.append((expected[enough - 1], label, surest[:enough].tolist()))
    return max(walls)[1:] if walls else None


class Accuracy(NamedTuple):
    """How good a regression on the labelled images is."""

    now: Interval  # share of the labelled test images that it has right
    gain: Interval | None  # by how much that is expected to rise with as many labels again; None: too few are there


def expected_accuracy(features: Features, labelled: Ints, tested: Ints, num_classes: int) -> Accuracy | None:
    """Return what is known of the accuracy; None without test images, or with fewer than two classes.

    Args:
        features: (N, D).
        labelled: class of each image that is learned from, (N,); -1: of the others.
        tested: class of each test image that is labelled, (N,); -1: of the others.
        num_classes: K.
    """
    z, is_test, known = _standardized(features), tested >= 0, np.flatnonzero(labelled >= 0)

    def wrong(labels: Ints) -> Floats | None:
        logits = _logits(z, labels, num_classes)
        return None if logits is None else (logits.argmax(1) != tested)[is_test].astype(float)

    of_all = wrong(labelled)
    if of_all is None or not is_test.any():
        return None
    now = proportion_interval(len(of_all) - of_all.sum(), len(of_all))
    half = np.full(len(labelled), -1)
    half[known] = assign_folds(labelled[known], known, 2, np.random.default_rng(0))
    first, second = (wrong(np.where(half == number, labelled, -1)) for number in range(2))
    if first is None or second is None:
        return Accuracy(now, None)
    return Accuracy(now, gain_of_doubling((first + second) / 2, of_all, share=1.0))


def _logits(z: NDArray[Any], labelled: Ints, num_classes: int) -> Floats | None:
    """Return logits (N, K) by a regression on the images that are labelled; None: these are of fewer than two classes.

    Those of a class without an image are -inf.
    """
    known = labelled >= 0
    classes, labels = np.unique(labelled[known], return_inverse=True)
    if len(classes) < 2:
        return None
    W, b = next(CLASSIFICATION.linear_heads(z[known], labels, [_L2], np.ones(len(labels)), _TOLERANCE))
    logits = np.full((len(z), num_classes), -np.inf)
    logits[:, classes] = z @ W.T + b
    return logits


def _temperature(z: Features, labels: Ints) -> float:
    """Return what divides logits, by images (L, D) that are left out of the fit in folds.

    An image that is the only one of its class says nothing.
    """
    rows = np.flatnonzero(np.bincount(labels)[labels] > 1)
    classes, labels = np.unique(labels[rows], return_inverse=True)
    if len(classes) < 2:
        return _PRIOR.median
    fold_of = assign_folds(labels, rows, _FOLDS, np.random.default_rng(0))
    logits = np.full((len(rows), len(classes)), np.nan)
    for fold in np.unique(fold_of)[: max(1, _FOLDS * _HELD_OUT // len(rows))]:
        left_out = fold_of == fold
        fitted = _logits(z[rows], np.where(left_out, -1, labels), len(classes))
        assert fitted is not None  # every class has an image that is not left out
        logits[left_out] = fitted[left_out]
    known = np.isfinite(logits[:, 0])
    return fit_temperature(logits[known], labels[known], _PRIOR)


def _standardized(features: Features) -> Features:
    """Return features (N, D) less their means, in standard deviations."""
    centre, spread = features.mean(0), features.std(0)  # (D,)
    spread[spread <= 1e-6 * np.abs(centre)] = 1.0  # a constant feature tells nothing, and must not divide
    return (features - centre) / spread


def _squared_distances(a: Features, b: Features) -> Features:
    """Return those between unit vectors, (M, D) and (N, D) to (M, N)."""
    return np.maximum(2 - 2 * a @ b.T, 0)
