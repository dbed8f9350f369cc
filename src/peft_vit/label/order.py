"""Which images to label next, what a model of the labels proposes for the others, and how good it is.

Everything is computed from frozen features, without torch, of the images that have some: all are finite. Images that
test, and those that are skipped, are neither labelled nor available here; `expected_accuracy` alone asks for tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peft_vit.base.statistics import Interval, proportion_interval
from peft_vit.base.statistics.drawing import assign_folds
from peft_vit.base.statistics.more_labels import gain_of_doubling
from peft_vit.core.tasks import CLASSIFICATION
from peft_vit.core.tasks.classification import log_softmax

Features = NDArray[np.float32]  # (N, D)
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]
_COVERED = 3000  # images at most that are covered, and chosen from, at a time
_COPY = 1e-5  # squared distance of unit vectors up to which two images are copies
_L2 = 0.03  # of the regression
_SURE, _FEWEST_OF_WALL, _SIZE_OF_WALL = 0.9, 8, 20  # share of a wall that is expected to be right, and its images


def herding(
    features: Features, labelled: Ints, available: Flags, count: int, probabilities: Floats | None = None
) -> list[int]:
    """Return the images that cover the most of what a model is unsure of, together with what is labelled.

    One after the other, each is the x with the largest

        sum_n U(x_n) max(0, k(x_n, x) - max_y k(x_n, y)),    k(a, b) = exp(-|a - b|^2 / s^2),

    over available images n, y those that are labelled or chosen before, on features of length 1. U is 1 less the
    difference of the two largest probabilities; s is the smallest distance of two labelled images, copies apart. So few
    labels choose what is typical, many choose what is uncertain. Source: Bae, Oliveira and Sutherland 2025, arXiv
    2412.20644, uncertainty herding with margins and an adaptive radius.

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
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    of_pool, of_known = unit[pool], unit[known]  # (P, D), (L, D)
    between = _squared_distances(of_known, of_known)  # (L, L)
    scale = between.min(initial=1.0, where=between > _COPY)
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


def at_random(available: Flags, count: int, seed: int) -> list[int]:
    """Return so many of the available images (N,), in an order that follows from the seed and from N alone."""
    order = np.random.default_rng([seed, len(available)]).permutation(len(available))
    return order[available[order]][:count].tolist()


def propose(features: Features, labelled: Ints, num_classes: int) -> Floats:
    """Return probabilities of each image and class, (N, K), by a regression on the images that are labelled.

    A class without a labelled image has none; with fewer than two such classes all are equally probable.
    """
    model = _Regression.fit(features, labelled, num_classes)
    return np.full((len(features), num_classes), 1 / num_classes) if model is None else model.probabilities(features)


def wall(
    probabilities: Floats, available: Flags, labelled: Ints, size: int = _SIZE_OF_WALL
) -> tuple[int, list[int]] | None:
    """Return a class and the available images that are surest of it, the surest first; None: no class has enough.

    There are as many as nine in ten are expected to be right of, so that whoever looks at all of them has few to take
    out. Of several such classes it is the one with the fewest labels.

    Args:
        probabilities: (N, K), see `propose`.
        available: which images may be shown, (N,).
        labelled: class of each image, (N,); -1: it has none.
        size: images at most.
    """
    counts, predicted = np.bincount(labelled[labelled >= 0], minlength=probabilities.shape[1]), probabilities.argmax(1)
    for label in np.argsort(counts, kind="stable").tolist():
        own = np.flatnonzero(available & (predicted == label))
        surest = own[np.argsort(-probabilities[own, label], kind="stable")][:size]
        expected = np.cumsum(probabilities[surest, label]) / np.arange(1, len(surest) + 1)  # falls
        enough = int((expected >= _SURE).sum())
        if enough >= _FEWEST_OF_WALL:
            return label, surest[:enough].tolist()
    return None


@dataclass(frozen=True)
class Accuracy:
    """How good a regression on the labelled images is.

    Attributes:
        now: share of the labelled test images that it has right.
        gain: by how much that is expected to rise with as many labels again; None: too few are there to say.
    """

    now: Interval
    gain: Interval | None


def expected_accuracy(features: Features, labelled: Ints, tested: Ints, num_classes: int) -> Accuracy | None:
    """Return what is known of the accuracy; None without test images, or with fewer than two classes.

    Args:
        features: (N, D).
        labelled: class of each image that is learned from, (N,); -1: of the others.
        tested: class of each test image that is labelled, (N,); -1: of the others.
        num_classes: K.
    """
    rows = np.flatnonzero(tested >= 0)

    def wrong(labels: Ints) -> Floats | None:
        model = _Regression.fit(features, labels, num_classes)
        return None if model is None else (model.logits(features[rows]).argmax(1) != tested[rows]).astype(float)

    of_all = wrong(labelled)
    if of_all is None or not len(rows):
        return None
    now, known = proportion_interval(float((1 - of_all).sum()), len(rows)), np.flatnonzero(labelled >= 0)
    half = assign_folds(labelled[known], known, 2, np.random.default_rng(0))
    of_halves = []
    for number in range(2):
        labels = np.full_like(labelled, -1)
        labels[known[half == number]] = labelled[known[half == number]]
        of_halves.append(wrong(labels))
    first, second = of_halves
    if first is None or second is None:
        return Accuracy(now, None)
    return Accuracy(now, gain_of_doubling((first + second) / 2, of_all, share=1.0))


@dataclass(frozen=True)
class _Regression:
    """A logistic regression on standardized features."""

    weight: Floats  # (K, D)
    bias: Floats  # (K,); -inf of a class that no image is of

    @classmethod
    def fit(cls, features: Features, labelled: Ints, num_classes: int) -> _Regression | None:
        """Fit it to the images that have a class, (N,) of 0 and above; None: these are of fewer than two."""
        classes, labels = np.unique(labelled[labelled >= 0], return_inverse=True)
        if len(classes) < 2:
            return None
        centre, spread = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)  # (D,)
        spread[spread <= 1e-6 * np.abs(centre) + 1e-12] = 1.0  # a constant feature tells nothing, and must not divide
        z = (features[labelled >= 0] - centre) / spread  # (L, D)
        basis = np.linalg.qr(z.T)[0] if len(z) < z.shape[1] else np.eye(z.shape[1])  # (D, min(L, D)); W lies in it
        ((W, b),) = CLASSIFICATION.linear_heads(z @ basis, labels, [_L2], np.ones(len(z)))
        weight, bias = np.zeros((num_classes, len(centre))), np.full(num_classes, -np.inf)
        weight[classes] = W @ basis.T / spread
        bias[classes] = b - weight[classes] @ centre
        return cls(weight, bias)

    def logits(self, features: Features) -> Floats:
        """Return logits (N, K)."""
        return features @ self.weight.T + self.bias

    def probabilities(self, features: Features) -> Floats:
        """Return probabilities (N, K)."""
        return np.exp(log_softmax(self.logits(features)))


def _squared_distances(a: Features, b: Features) -> Features:
    """Return those between unit vectors, (M, D) and (N, D) to (M, N)."""
    return np.maximum(2 - 2 * a @ b.T, 0)
