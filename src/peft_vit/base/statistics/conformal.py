"""Calibrated probabilities, and what holds the truth as often as asked: sets of classes or labels, and intervals.

Held out is an image of which the model that predicts it was not trained. With folds each image is, once a repetition.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_NARROWED = 12  # times by five: to 1e-8 of a temperature
_PLACES, _AS_MANY = 17, 10  # at which a scale of errors is told, and images that speak for one scale everywhere
_TINY = 1e-300
TEMPERATURES = (0.05, 20.0)  # where every image is right, or wrong, likelihood alone would go on without end


def probabilities(logits: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """Return softmax(logits / temperature), (N, classes)."""
    z = np.asarray(logits, dtype=np.float64) / temperature
    shares = np.exp(z - z.max(1, keepdims=True))  # without scipy, which no training process loads
    return np.asarray(shares / shares.sum(1, keepdims=True))


class TemperaturePrior(NamedTuple):
    """What is known of a temperature before its images are seen: its logarithm is normally distributed."""

    median: float
    spread: float  # standard deviation of the logarithm
    most_images: float = math.inf  # that count: where a model differs from those that predicted them, fewer tell enough


def fit_temperature(
    logits: ArrayLike, labels: ArrayLike, prior: TemperaturePrior | None = None, images: ArrayLike | None = None
) -> float:
    """Return the most probable temperature within TEMPERATURES.

    It has the least sum of the images' negative log-likelihood and ``(ln T - ln median)^2 / (2 spread^2)`` of the
    prior, which also a few images that are all right do not drive to an end. Without a prior likelihood decides alone
    (Guo et al. 2017, arXiv 1706.04599, section 4.2). Both have one minimum, the likelihood being concave in 1 / T.
    Which class is most probable does not change.

    Args:
        logits: (N, classes), held out.
        labels: (N,) true classes.
        prior: of the temperature; None: the images decide alone.
        images: (N,) which image each row is of, so that one with several counts once; None: each of another.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    z = z - z.max(1, keepdims=True)
    own = z[np.arange(len(y)), y]  # (N,)
    weight, different = row_weights(len(y), images)  # (N,)
    known = TemperaturePrior(1.0, math.inf) if prior is None else prior
    weight = weight * min(1.0, known.most_images / max(1, different))

    def loss(log_t: float) -> float:
        t = math.exp(log_t)
        nll = np.log(np.exp(z / t).sum(1)) - own / t  # (N,)
        return float(weight @ nll + (log_t - math.log(known.median)) ** 2 / (2 * known.spread**2))

    low, high = map(math.log, TEMPERATURES)
    for _ in range(_NARROWED):  # ten points a time, without scipy's search, which would load 50 MB
        points = np.linspace(low, high, 11)
        best = int(np.argmin([loss(float(point)) for point in points]))
        low, high = float(points[max(0, best - 1)]), float(points[min(10, best + 1)])
    return math.exp((low + high) / 2)


def conformal_quantile(scores: ArrayLike, coverage: float, images: ArrayLike | None = None) -> float:
    """Return the score up to which a class belongs to a set, so that sets hold the true class as often as asked.

    With one score an image it is the ceil((n + 1) coverage)-th smallest of n: a further image, exchangeable with these,
    has a score up to it with at least that probability. Infinity where n is too small for the coverage. An image with
    several scores, one a repetition of folds, counts once: each score weighs 1 / (how many the image has). Sources:
    Vovk, Gammerman & Shafer, Algorithmic Learning in a Random World (2005); Lei et al. 2018, arXiv 1604.04173.

    Args:
        scores: (m,), large where the true class fits badly.
        coverage: between 0 and 1.
        images: (m,) which image each score is of; none: each of another.
    """
    s = np.asarray(scores, dtype=np.float64)
    weight, count = row_weights(s.size, images)
    order = np.argsort(s, kind="stable")
    below = np.cumsum(weight[order])  # images with a score up to it
    rank = math.ceil((count + 1) * coverage - 1e-9)  # 1e-9: 0.9 * 10 is 9 here too
    if rank > count:
        return math.inf
    return float(s[order][np.searchsorted(below, rank - 1e-9)])


def prediction_sets(probability: ArrayLike, quantile: float) -> NDArray[np.bool_]:
    """Return which classes belong to each image's set, (N, classes): 1 - p up to the quantile, and the most probable.

    These are the smallest sets on average with their coverage, if the probabilities are true; the most probable class
    is always in, so that no set is empty. Source: Sadinle, Lei & Wasserman, JASA 114 (2019), arXiv 1609.00451.
    """
    p = np.asarray(probability, dtype=np.float64)
    inside = 1 - p <= quantile
    inside[np.arange(len(p)), p.argmax(1)] = True
    return inside


def class_scores(probability: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Return 1 - (the probability of the true class), (N,), of probabilities (N, classes)."""
    p, y = np.asarray(probability), np.asarray(labels)
    return np.asarray(1 - p[np.arange(len(y)), y])


def recall_threshold(
    probability: ArrayLike, labels: ArrayLike, coverage: float, images: ArrayLike | None = None
) -> float:
    """Return the largest probability from which on labels hold, on average, such a share of an image's labels.

    With R(t) the mean, over n images that have a label, of the share of an image's labels whose probability is below t,
    it is the largest t with n / (n + 1) R(t) + 1 / (n + 1) <= 1 - coverage. A further image, exchangeable with these,
    then misses at most 1 - coverage of its labels in expectation. Images without a label miss nothing whatever t is, so
    they are left out: with them the promise would be kept at the cost of the others. Minus infinity where n is too
    small for the coverage. Source: Angelopoulos et al. 2022, arXiv 2208.02814, theorem 1.

    Args:
        probability: (m, K), held out.
        labels: (m, K), 1 where the image has the label; anything else, as NaN for what is not known, counts as not.
        coverage: between 0 and 1.
        images: (m,) which image each row is of; None: each of another.
    """
    p, there = np.asarray(probability, dtype=np.float64), np.asarray(labels) == 1
    own = there.any(1)
    weight, count = row_weights(own.sum(), None if images is None else np.asarray(images)[own])
    share = np.broadcast_to((weight / there[own].sum(1))[:, None], there[own].shape)[
        there[own]
    ]  # (labels that are there,)
    scores = p[own][there[own]]
    order = np.argsort(scores, kind="stable")
    levels, first = np.unique(scores[order], return_index=True)  # rising
    missed = np.concatenate([[0.0], np.cumsum(share[order])])[first]  # n R(t) at each level
    kept = levels[missed + 1 <= (1 - coverage) * (count + 1) + 1e-9]
    return float(kept[-1]) if kept.size else -math.inf


class ErrorScale(NamedTuple):
    """How large errors are as a rule, by what is predicted: linear between its predictions, constant beyond."""

    at: tuple[float, ...]  # predictions, rising
    sizes: tuple[float, ...]  # mean absolute errors there

    def of(self, predicted: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return it for predictions (N,)."""
        return np.asarray(np.interp(predicted, self.at, self.sizes))


def error_scale(
    predicted: ArrayLike, truth: ArrayLike, images: ArrayLike | None = None
) -> tuple[ErrorScale, NDArray[np.float64]]:
    """Return how large errors are by what is predicted, and each error over that scale as the other images tell it.

    The scale at y is ``(sum_i K((y - y_i) / h) |e_i| + m mean |e|) / (sum_i K((y - y_i) / h) + m)``, with a Gaussian K
    of half a standard deviation of predictions, and m of _AS_MANY images that speak for one scale everywhere: where few
    images lie, intervals are as wide as for all. Each error is divided by the scale without its own image, as a further
    image's would be, so that `conformal_quantile` of the quotients makes intervals ``y +- q scale(y)`` that hold as
    often as asked. Source of normalized residuals: Lei et al. 2018, arXiv 1604.04173, section 5.2; of leaving out one's
    own: Johansson et al., Machine Learning 97 (2014), p. 155.

    Args:
        predicted: (m,), held out.
        truth: (m,).
        images: (m,) which image each row is of; None: each of another.

    Returns:
        The scale, and quotients (m,), not negative.
    """
    p, errors = np.asarray(predicted, dtype=np.float64), np.abs(np.asarray(predicted) - np.asarray(truth))
    which = np.arange(len(p)) if images is None else np.asarray(images)
    weight, count = row_weights(len(p), which)
    _, place = np.unique(which, return_inverse=True)
    width = max(float(p.std()) / 2, _TINY)
    at = np.linspace(p.min(), p.max(), _PLACES if np.ptp(p) > 0 else 1)  # (P,)
    near = weight[:, None] * np.exp(-(((at - p[:, None]) / width) ** 2) / 2)  # (m, P)

    def by_image(values: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.zeros((count, values.shape[1]))
        np.add.at(sums, place, values)
        return sums

    def scale(near: Any, near_sizes: Any, images: Any, sizes: Any) -> NDArray[np.float64]:
        mean = sizes / np.maximum(images, _TINY)
        return np.asarray(np.maximum((near_sizes + _AS_MANY * mean) / (near + _AS_MANY), _TINY))

    columns = (near, near * errors[:, None], weight[:, None], (weight * errors)[:, None])
    parts = [by_image(values) for values in columns]  # (images, P), (images, P), (images, 1), (images, 1)
    whole = [part.sum(0) for part in parts]
    others = scale(*(total - part for total, part in zip(whole, parts, strict=True)))  # (images, P)
    own = np.array([np.interp(y, at, row) for y, row in zip(p, others[place], strict=True)])  # (m,)
    return ErrorScale(tuple(at.tolist()), tuple(scale(*whole).tolist())), errors / own


def row_weights(rows: int, images: ArrayLike | None = None) -> tuple[NDArray[np.float64], int]:
    """Return weights of rows (m,) such that each image has 1, and how many images they are of.

    Args:
        rows: m.
        images: (m,) which image each row is of, as where folds are repeated; None: each of another.
    """
    if images is None:
        return np.ones(rows), rows
    _, place, times = np.unique(np.asarray(images), return_inverse=True, return_counts=True)
    return 1 / times[place], len(times)
