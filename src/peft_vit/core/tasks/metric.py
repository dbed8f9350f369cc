"""Measures by which validation chooses, models are compared, and a person reads how good one is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from peft_vit.base.statistics import Interval, bootstrap_interval, rule_of_three
from peft_vit.core.records import Decision, Metrics

_AT_ONCE = 1_000_000  # weights held at a time
_GAIN, GAIN_SD, _GAIN_STEPS = 0.05, 0.03, 60  # what training adds at last, its spread, steps for two thirds of it
Labels: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]
Outputs: TypeAlias = NDArray[np.floating]  # of a head, (N, K)


@dataclass(frozen=True)
class DecidingMetric:
    """A measure by which validation chooses, models are compared, and a person reads how good one is.

    Attributes:
        name: config name (`training.metric`), and field of `Metrics`.
        words: name in messages and reports.
        interval: (labels, predicted[, thresholds (K,) or (N, K)]) -> value with its confidence interval over images.
        gain: (labels, baseline, predicted[, thresholds of both]) -> paired difference with its interval.
        by_image: (labels, predicted[, thresholds]) -> contributions (N,), whose mean is the value; for balanced
            accuracy the mean with equal class weights.
        suffix: printed after a value to tell metrics apart.
        sign: 1 if higher is better, -1 if lower is.
        equal_classes: classes have equal weight.
        is_share: within [0, 1], printed in percent.
        counts_images: a share of images: contributions are 0 or 1.
        has_unit: in the unit of the labels.
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

    def of(self, metrics: Metrics) -> float:
        """Return its value."""
        return metrics.value(self.name)

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
        """Return a sort key that rises with quality: the signed value, then minus the NLL."""
        return self.sign * self.of(metrics), -metrics.nll

    def worth(self, metrics: Metrics, *, before: Metrics, expected: float, images: float) -> bool:
        """Return whether to keep a trained model: few images do not outweigh the expected gain.

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
            slack = min(expected * error**2 / GAIN_SD**2, 2 * error)
        return (self.sign * (value - self.of(before)) + slack, -metrics.nll) > (0.0, -before.nll)

    def text(self, value: float) -> str:
        """Return a value as a terminal shows it."""
        return self.plain(value) + self.suffix

    def plain(self, value: float) -> str:
        """Return a value without the suffix."""
        return f"{value:.1%}" if self.is_share else f"{value:.3g}"


def expected_gain(steps: int) -> float:
    """Return the expected gain of a number of training steps over a regression on frozen features, a share.

    About 5 points at last: on test images of five sets with 20 to 450 labels a class `train` had 1.5 to 8.2 more than
    its probe, 5.3 on average (benchmarks/results/few_labels.csv). Most of it comes in 100 steps, as on ELPV, digits
    and Fashion-MNIST at 50 labels a class from 48 to 498 steps.
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
        words: as in `DecidingMetric`.
        statistic: of labels (N, K), what was predicted (N, K), and weights of images (B, N): its values (B,).
        at_thresholds: it reads 1 for what is reported, from a label's threshold on, by default 1/2.
        cases: of labels (N, K): of each part that it is the mean of, how many independent cases speak for it.
        more: other attributes.
    """

    is_share = more.get("is_share", True)

    def decided(predicted: Labels, thresholds: Sequence[float]) -> Floats:
        p = np.asarray(predicted, dtype=float)
        return (p >= (thresholds if len(thresholds) else 0.5)).astype(float) if at_thresholds else p

    def interval(labels: Labels, predicted: Labels, thresholds: Sequence[float] = ()) -> Interval:
        y, p = np.asarray(labels, dtype=float), decided(predicted, thresholds)  # what is not known is None in records
        unseen = float(np.mean([rule_of_three(count) for count in cases(y)])) if is_share else None
        return bootstrap_interval(len(y), lambda weights: statistic(y, p, weights), unseen=unseen)

    def gain(
        labels: Labels, before: Labels, after: Labels, was: Sequence[float] = (), now: Sequence[float] = ()
    ) -> Interval:
        y, p, q = np.asarray(labels, dtype=float), decided(before, was), decided(after, now)
        unseen = rule_of_three(len(y)) if is_share else None  # images on which the two may differ in what counts

        def difference(weights: Floats) -> Floats:
            return statistic(y, q, weights) - statistic(y, p, weights)

        return bootstrap_interval(len(y), difference, unseen=unseen, bounds=(-1.0, 1.0))

    def by_image(labels: Labels, predicted: Labels, thresholds: Sequence[float] = ()) -> Floats:
        y, p = np.asarray(labels, dtype=float), decided(predicted, thresholds)
        return pseudo_values(len(y), lambda weights: statistic(y, p, weights))

    return DecidingMetric(name, words, interval, gain, by_image, **more)


def unweighted(statistic: Callable[[Labels, Labels, Floats], Floats], labels: Labels, predicted: Labels) -> float:
    """Return a statistic of `bootstrapped` where all images, N, weigh the same."""
    return float(statistic(labels, predicted, np.ones((1, len(labels))))[0])


def pseudo_values(images: int, statistic: Callable[[Floats], Floats]) -> Floats:
    """Return N T - (N - 1) T_i for each of N images, where T_i is a statistic T without image i: jackknife, (N,).

    Of a mean they are its terms. Of other statistics their mean has less bias than T, and their variance over N is
    about that of T. Source: Tukey, Annals of Mathematical Statistics 29 (1958), p. 614.

    Args:
        images: N.
        statistic: of weights (B, N): its values (B,).
    """
    total, without = float(statistic(np.ones((1, images)))[0]), np.empty(images)
    block = max(1, _AT_ONCE // images)
    for start in range(0, images, block):
        left_out = 1 - np.eye(images)[start : start + block]  # (B, N)
        without[start : start + block] = statistic(left_out)
    return images * total - (images - 1) * np.nan_to_num(without, nan=total)


def cumulative_weights(scores: Floats, positive: Flags, weights: Floats) -> tuple[Floats, Floats]:
    """Return the weight of positive and of all images whose score is among the highest, (B, different scores)."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of equal scores the last
    drawn = weights[:, order]  # (B, N)
    return np.cumsum(drawn * positive[order], 1)[:, ends], np.cumsum(drawn, 1)[:, ends]


def area_under_roc(scores: Floats, positive: Flags, weights: Floats) -> Floats:
    """Return the share of pairs of a positive and another image in which the positive one scores higher, (B,).

    Equal scores count half. That is the area under the receiver operating characteristic (Hanley and McNeil, Radiology
    143, 1982, p. 29); NaN where there is no such pair.

    Args:
        scores: (N,), finite.
        positive: (N,).
        weights: of images, (B, N).
    """
    hits, drawn = cumulative_weights(scores, positive, weights)
    false = drawn - hits
    above = false[:, -1:] - (false + np.concatenate([np.zeros((len(false), 1)), false[:, :-1]], 1)) / 2
    with np.errstate(invalid="ignore"):
        return (np.diff(hits, prepend=0.0) * above).sum(1) / (hits[:, -1] * false[:, -1])
