"""What a task says, for training, evaluation, splits, `tune` and pages alike.

Outputs are what the head returns, (N, K); labels are what a task says they are, N of them. Nothing here needs torch,
so that reports can be made without it; a loss takes it from the tensors' own library when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from peft_vit.records import Metrics, Predictions
from peft_vit.statistics import Interval

if TYPE_CHECKING:
    from torch import Tensor

Labels: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class DecidingMetric:
    """A measure by which validation chooses, models are compared, and a person is told how good one is.

    Attributes:
        name: what `training.metric` calls it, and its field of `Metrics`.
        words: what people call it.
        interval: of labels and what was predicted of them: its value, and where it may lie with other test images.
        gain: of labels and what was predicted of them before and after: the value after minus the one before, likewise.
        suffix: said behind a value where one may take it for another metric.
        sign: 1 if the higher value is the better one, -1 if the lower one is.
        equal_classes: each class counts as much as any other, however many images it has.
    """

    name: str
    words: str
    interval: Callable[[Labels, Labels], Interval]
    gain: Callable[[Labels, Labels, Labels], Interval]
    suffix: str = ""
    sign: Literal[1, -1] = 1
    equal_classes: bool = False

    def of(self, metrics: Metrics) -> float:
        """Return its value."""
        return float(getattr(metrics, self.name))

    def quality(self, metrics: Metrics) -> tuple[float, float]:
        """Return what is larger of the better predictions: its value, and of equal ones the lower loss."""
        return self.sign * self.of(metrics), -metrics.nll

    def text(self, value: float) -> str:
        """Return a value as a terminal shows it."""
        return f"{value:.1%}{self.suffix}"


class Task(Protocol):
    """What is learned."""

    @property
    def name(self) -> str:
        """What records call it."""

    @property
    def metrics(self) -> Mapping[str, DecidingMetric]:
        """Which may decide, by name."""

    def metric(self, name: str) -> DecidingMetric:
        """Return the metric of a name.

        Raises:
            UserError: if it is `auto`, which images decide.
        """

    def deciding(self, counts: NDArray[np.int64]) -> DecidingMetric:
        """Return the metric that `auto` is, with so many images of each class (K,)."""

    def head_width(self, names: Sequence[str]) -> int:
        """Return how many outputs the head has, for the names of what is predicted."""

    def counts(self, labels: Labels, width: int) -> NDArray[np.int64]:
        """Return how many images are of each class, (K,)."""

    def strata(self, labels: Labels) -> NDArray[np.int64]:
        """Return what splits and folds hold in equal shares, (N,)."""

    def loss_weights(self, counts: NDArray[np.int64]) -> Floats:
        """Return the weight of each output in the loss, (K,), so that all classes count the same."""

    def loss(self, outputs: Tensor, labels: Tensor, weights: Tensor | None, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean loss of training."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each image without weights, (N,)."""

    def measure(self, outputs: NDArray[np.floating], labels: Labels) -> Metrics:
        """Return every measure of a split."""

    def predictions(
        self, outputs: NDArray[np.float32], labels: Labels, positions: NDArray[np.int64], *, keep_logits: bool = False
    ) -> Predictions:
        """Return what is predicted of each image of a split."""

    def image_weights(self, labels: Labels, weights: Floats) -> Floats:
        """Return the weight of each image in a linear fit, (N,), with weights of the loss (K,)."""

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

    def temperature(self, outputs: Tensor, labels: Tensor) -> float:
        """Return what outputs are to be divided by for the lowest loss on held-out images."""

    def training_temperature(self, outputs: Tensor, labels: Tensor) -> float:
        """Return what outputs are divided by beyond that while training, a power of two."""
