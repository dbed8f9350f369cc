"""A task that is not in the package: of what each image is made, in shares that add up to 1, such as sand and water.

A test puts it into a copy of the package as `core/tasks/shares.py`, and `shares_shown.py` beside what is
shown of others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peft_vit.base.statistics import TemperaturePrior
from peft_vit.core.records import Decision, Metrics
from peft_vit.core.tasks.classification import log_softmax
from peft_vit.core.tasks.metric import DecidingMetric, Floats, Labels, bootstrapped
from peft_vit.core.tasks.task import CONVERGED, Task

if TYPE_CHECKING:
    from torch import Tensor


def _right_share(labels: Labels, predicted: Labels, weights: Floats) -> Floats:
    """Return the share of an image that is said rightly, the mean over images that weigh so much, (B,)."""
    overlap = np.minimum(labels, predicted).sum(1)  # (N,)
    return np.asarray(weights @ overlap / weights.sum(1))


class _Shares(Task):
    """See `Task`."""

    name = "shares"  # type: ignore[assignment]  # which the test adds to what configurations may say
    metrics: Mapping[str, DecidingMetric] = {"overlap": bootstrapped("overlap", "mean overlap", _right_share)}
    loss_names = ("cross_entropy",)
    weighs = False
    several = "{0} images with shares of {2}"
    outputs = "shares"

    def recognizes(self, cells: Mapping[str, Sequence[str]]) -> bool:
        """Return whether every row adds up to 1."""
        return all(self.fault(dict(zip(cells, row, strict=True))) is None for row in zip(*cells.values(), strict=True))

    def fault(self, cells: Mapping[str, str]) -> str | None:
        """Refuse what does not."""
        try:
            total = sum(map(float, cells.values()))
        except ValueError:
            return "expected shares"
        return None if abs(total - 1) < 1e-6 else f"expected shares that add up to 1, got {total:g}"

    def read(self, texts: Sequence[str], columns: Sequence[str]) -> tuple[tuple[str, ...], Labels]:
        """Return the columns' names, and shares (N, K)."""
        return tuple(columns), np.array([[float(cell) for cell in text.split("|")] for text in texts])

    def synthetic_labels(self, classes: NDArray[np.int64]) -> tuple[tuple[str, ...], Labels]:
        """Return all of an image for its class."""
        return tuple(f"class_{k}" for k in range(classes.max() + 1)), np.eye(classes.max() + 1)[classes]

    def members(self, labels: Labels, place: int) -> NDArray[np.bool_]:
        """Return where a share is the largest, (N,)."""
        return np.asarray(labels.argmax(1) == place)

    def label_ids(self, labels: Labels) -> NDArray[np.int64]:
        """Return that copies may differ."""
        return np.zeros(len(labels), dtype=np.int64)

    def strata(self, labels: Labels) -> NDArray[np.int64]:
        """Return the largest share."""
        return labels.argmax(1)

    def loss(
        self,
        outputs: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        label_smoothing: float = 0.0,
        name: str | None = None,
    ) -> Tensor:
        """Return the cross entropy of shares."""
        return self.losses(outputs, labels).mean()

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return it for each image, (N,)."""
        return -(outputs.log_softmax(1) * labels.to(outputs.dtype)).sum(1)

    def linear_heads(
        self, z: Floats, labels: Labels, strengths: Sequence[float], weights: Floats, tolerance: float = CONVERGED
    ) -> Iterator[tuple[Floats, Floats]]:
        """Yield least squares fits of the logarithms."""
        targets = np.log(labels + 0.01)
        for l2 in strengths:
            left = z.T @ z + len(z) * l2 * np.eye(z.shape[1])
            yield np.linalg.solve(left, z.T @ (targets - targets.mean(0))).T, targets.mean(0)

    def measure(self, outputs: NDArray[np.floating], labels: Labels, decision: Decision | None = None) -> Metrics:
        """Return the mean overlap."""
        log_p = log_softmax(outputs.astype(np.float64))
        overlap = _right_share(labels, np.exp(log_p), np.ones((1, len(labels))))[0]
        return Metrics(n=len(labels), nll=float(-(log_p * labels).sum(1).mean()), more={"overlap": float(overlap)})

    def predicted(self, outputs: NDArray[np.floating], decision: Decision | None = None) -> Labels:
        """Return shares, (N, K)."""
        shares: Floats = np.exp(log_softmax(outputs.astype(np.float64)))
        return shares

    def same(self, before: NDArray[np.floating], after: NDArray[np.floating], *_: Any) -> NDArray[np.bool_]:
        """Return where shares agree to a hundredth."""
        return np.asarray((np.abs(self.predicted(before) - self.predicted(after)) < 0.01).all(1))

    def right(
        self, outputs: NDArray[np.floating], labels: Labels, decision: Decision | None = None
    ) -> NDArray[np.bool_]:
        """Return where most of an image is said rightly."""
        return np.asarray(np.minimum(self.predicted(outputs), labels).sum(1) > 0.5)

    def constant(self, labels: Labels) -> Labels:
        """Return the mean."""
        return np.broadcast_to(labels.mean(0), labels.shape)

    def decide(
        self,
        outputs: NDArray[np.floating],
        labels: Labels,
        prior: TemperaturePrior,
        images: NDArray[np.int64] | None = None,
    ) -> Decision:
        """Return that there is nothing to decide."""
        return Decision(images=len(labels))


SHARES: Task = _Shares()
