"""Numbers: each image has one, or several.

Labels are (N, K), in their units. The head learns them standardized over the training images, t = (y - mean) / sd, so
that its outputs are of one size whatever the unit; every measure is of numbers in their units again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import ErrorScale, TemperaturePrior, conformal_quantile, error_scale, row_weights
from peft_vit.core.config import LossName
from peft_vit.core.records import Decision, Metrics
from peft_vit.core.tasks.metric import DecidingMetric, Flags, Floats, Ints, Labels, Outputs, bootstrapped, unweighted
from peft_vit.core.tasks.task import (
    CONVERGED,
    Coverage,
    LinearHeads,
    NamedLabels,
    Task,
    coverage_thresholds,
    measured_coverage,
)

if TYPE_CHECKING:
    from torch import Tensor

_BINS, _IN_A_BIN = 10, 5  # of equal counts that splits hold in equal shares, and images in one at least
_LARGEST = 1e30  # number: float32 holds it, and float64 its square


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if abs(value) < _LARGEST else None


def scales_of(decision: Decision) -> tuple[ErrorScale, ...]:
    """Return that of each number; half widths without one, as the first records have them, are in its unit."""
    return tuple(map(ErrorScale, decision.scale_at, decision.scale)) or (ErrorScale((0.0,), (1.0,)),) * len(
        decision.center
    )


def _scale(labels: Labels) -> Any:
    """Return the scale of errors: 1 of a single number, else standard deviations, which bring numbers to one unit."""
    return 1.0 if labels.shape[1] == 1 else np.maximum(labels.std(0), 1e-12)


def mean_absolute_error(labels: Labels, predicted: Labels, weights: Floats) -> Floats:
    """Return the mean size of errors, see `_scale`, (B,)."""
    errors = (np.abs(predicted - labels) / _scale(labels)).mean(1)  # (N,)
    return weights @ errors / weights.sum(1)


def root_mean_squared_error(labels: Labels, predicted: Labels, weights: Floats) -> Floats:
    """Return the root of the mean of their squares, (B,)."""
    errors = (((predicted - labels) / _scale(labels)) ** 2).mean(1)
    return np.sqrt(weights @ errors / weights.sum(1))


def r_squared(labels: Labels, predicted: Labels, weights: Floats) -> Floats:
    """Return 1 - (sum of squared errors) / (that of the mean), the mean over numbers, (B,)."""
    share = weights / weights.sum(1, keepdims=True)  # (B, N)
    spread = share @ labels**2 - (share @ labels) ** 2  # (B, K)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (1 - share @ (predicted - labels) ** 2 / spread).mean(1)


def _ranks(values: Floats, weights: Floats) -> Floats:
    """Return the place of each of N values among images that weigh so much, (B, N); equal ones have the same."""
    _, place = np.unique(values, return_inverse=True)  # (N,)
    level = np.zeros((len(weights), place.max() + 1))  # (B, different values)
    np.add.at(level.T, place, weights.T)
    return (np.cumsum(level, 1) - level / 2)[:, place]


def _spearman(labels: Labels, predicted: Labels, weights: Floats) -> Floats:
    """Return the correlation of ranks, the mean over numbers, (B,); 0 of a constant."""
    share = weights / weights.sum(1, keepdims=True)  # (B, N)

    def of_number(y: Floats, p: Floats) -> Floats:
        a, b = (ranks - (share * ranks).sum(1, keepdims=True) for ranks in (_ranks(y, share), _ranks(p, share)))
        spread = np.sqrt((share * a**2).sum(1) * (share * b**2).sum(1))
        return np.divide((share * a * b).sum(1), spread, out=np.zeros(len(share)), where=spread > 0)

    return np.mean([of_number(y, p) for y, p in zip(labels.T, predicted.T, strict=True)], axis=0)


_ERROR: dict[str, Any] = {"sign": -1, "is_share": False, "has_unit": True}
METRICS: Mapping[str, DecidingMetric] = {
    metric.name: metric
    for metric in (
        bootstrapped("mae", "mean absolute error", mean_absolute_error, suffix=" mean error", **_ERROR),
        bootstrapped("rmse", "root mean squared error", root_mean_squared_error, suffix=" RMSE", **_ERROR),
        bootstrapped("r2", "R²", r_squared, is_share=False, suffix=" R²"),
        bootstrapped("spearman", "Spearman's correlation", _spearman, is_share=False, suffix=" Spearman's"),
    )
}


@dataclass(frozen=True)
class _Regression(Task):
    """See `Task`.

    Attributes:
        center: of each number over the training images, its mean, (K,).
        spread: its standard deviation, (K,).
    """

    center: tuple[float, ...] = (0.0,)
    spread: tuple[float, ...] = (1.0,)

    name = "regression"
    column = "numbers"
    weighs = False
    mixes = ("mixup",)  # half of a picture beside half of another has neither's number, nor one between
    outputs = "numbers"
    several = "{0:,} images with a number for {2} (regression)"
    metrics = METRICS
    loss_names = ("huber", "mse", "quantile")

    def recognizes(self, cells: Mapping[str, Sequence[str]]) -> bool:
        """Return whether all cells are numbers; whole ones in a column `label` are classes."""
        numbers = [_number(cell) for column in cells.values() for cell in column]
        if None in numbers:
            return False
        return set(cells) != {"label"} or any(not float(number or 0).is_integer() for number in numbers)

    def fault(self, cells: Mapping[str, str]) -> str | None:
        """Refuse what is not a number."""
        wrong = [(column, cell) for column, cell in cells.items() if _number(cell) is None]
        return "expected a number in column {}, got {!r}".format(*wrong[0]) if wrong else None

    def read(self, texts: Sequence[str], columns: Sequence[str]) -> NamedLabels:
        """Return the columns' names, and the numbers."""
        return tuple(columns), np.array([[float(cell) for cell in text.split("|")] for text in texts])

    def refuse_one_answer(self, names: Sequence[str], labels: Labels, image: str) -> None:
        """Refuse a number that all images share."""
        for name, values in zip(names, labels.T, strict=True):
            if np.ptp(values) == 0:
                raise UserError(f"'{name}' is {values[0]:g} for every {image}, so there is nothing to learn")

    def synthetic_labels(self, classes: Ints) -> NamedLabels:
        """Return the class as a number."""
        return ("number",), classes[:, None].astype(float)

    def strata(self, labels: Labels) -> Labels:
        """Return up to ten bins of equal counts; of several numbers which bins of each, (N, K bins)."""
        bins = max(1, min(_BINS, len(labels) // _IN_A_BIN))
        ranks = np.argsort(np.argsort(labels, axis=0, kind="stable"), axis=0)  # (N, K)
        places = ranks * bins // max(1, len(labels))
        if places.shape[1] == 1:
            return places[:, 0]
        return (places[:, :, None] == np.arange(bins)).reshape(len(labels), -1)

    def fitted(self, labels: Labels) -> Self:
        """Return the task with mean and standard deviation of the training images."""
        spread = labels.std(0)
        return type(self)(tuple(labels.mean(0).tolist()), tuple(np.where(spread > 0, spread, 1.0).tolist()))

    def restored(self, decision: Decision | None) -> Self:
        """Return the task with the decision's mean and standard deviation."""
        return self if decision is None else type(self)(decision.center, decision.spread)

    def aligned(self, outputs: Outputs, learned: Task) -> Outputs:
        """Return the same numbers, standardized with this task's mean and standard deviation."""
        return (learned.predicted(outputs) - self.center) / self.spread

    def _errors(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return output - t, (N, K)."""
        center, spread = (outputs.new_tensor(values) for values in (self.center, self.spread))
        return outputs - (labels.to(outputs.dtype) - center) / spread

    def loss(
        self,
        outputs: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        label_smoothing: float = 0.0,
        name: LossName | None = None,
    ) -> Tensor:
        """Return the loss of errors e = output - t, summed over numbers, the mean over images.

        huber: e^2 / 2 up to |e| = 1, and |e| - 1/2 beyond. mse: e^2 / 2. quantile: |e| / 2, the pinball loss at 1/2,
        which the median makes least.
        """
        size = self._errors(outputs, labels).abs()
        if name == "mse":
            each = size**2 / 2
        elif name == "quantile":
            each = size / 2
        else:
            each = size.clamp(max=1) ** 2 / 2 + (size - 1).clamp(min=0)
        return each.sum(1).mean()

    def temperature(self, outputs: Tensor, labels: Tensor) -> float:
        """Return 1: they are numbers."""
        return 1.0

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of e^2 / 2 over numbers, (N,), which a linear head makes least."""
        return (self._errors(outputs, labels) ** 2).sum(1) / 2

    def linear_heads(
        self, z: Floats, labels: Labels, strengths: Sequence[float], weights: Floats, tolerance: float = CONVERGED
    ) -> LinearHeads:
        """Yield ridge regressions, in closed form from one singular value decomposition.

        With shares r_i^2 = w_i / sum w, and r (z - mean) = U S V', W' = V S / (S^2 + l2) U' r (t - mean).
        """
        mean, shift, S, V, projected, *_ = self._decomposed(z, labels, weights)
        for l2 in strengths:
            W = ((S / (S**2 + l2))[:, None] * projected).T @ V  # (K, D)
            yield W, shift - W @ mean

    def _decomposed(self, z: Floats, labels: Labels, weights: Floats) -> tuple[Floats, ...]:
        """Return both means, S, V (rank, D), U' r t (rank, K), U (N, rank), r (N, 1), and t less its mean (N, K)."""
        share = weights / weights.sum()  # (N,)
        targets = (labels - self.center) / self.spread  # (N, K)
        mean, shift = share @ z, share @ targets  # (D,), (K,)
        root, centred = np.sqrt(share)[:, None], targets - shift
        U, S, V = np.linalg.svd(root * (z - mean), full_matrices=False)
        return mean, shift, S, V, U.T @ (root * centred), U, root, centred

    def held_out_outputs(
        self, z: Floats, labels: Labels, groups: Ints, strengths: Sequence[float], weights: Floats
    ) -> list[Floats]:
        """Return outputs of ridge regressions fitted without each image's group, in closed form.

        H = r r' + U S^2 / (S^2 + l2) U' takes r t to r times what the regression of all images says, and e are its
        errors. Those on a group G without which it is fitted, with the same l2 on W, are (I - H_GG)^-1 (r e)_G / r: of
        one image e_i / (1 - h_ii) (Golub, Heath and Wahba, Technometrics 21, 1979, p. 215). Features and numbers stay
        standardized by all images.

        Args:
            z: features (N, D).
            labels: numbers (N, K), all of them known.
            groups: (N,); images of equal ones are left out together, and an image of one of its own alone.
            strengths: l2, S of them.
            weights: w_i (N,), all above 0.

        Returns:
            S outputs (N, K).
        """
        _, shift, S, _, projected, U, root, centred = self._decomposed(z, labels, weights)
        shrunk = S**2 / (S**2 + np.array(strengths)[:, None])  # (S, rank)
        errors = root * centred - U @ (shrunk[:, :, None] * projected)  # (S, N, K)
        places = np.unique(groups, return_inverse=True)[1]  # (N,)
        ends = np.cumsum(np.bincount(places))
        for rows in np.split(np.argsort(places, kind="stable"), ends[:-1]):
            hat = root[rows] @ root[rows].T + (U[rows] * shrunk[:, None]) @ U[rows].T  # (S, G, G)
            errors[:, rows] = np.linalg.solve(np.eye(len(rows)) - hat, errors[:, rows])  # (S, G, K)
        return list(shift + centred - errors / root)

    def measure(self, outputs: Outputs, labels: Labels, decision: Decision | None = None) -> Metrics:
        """Return every measure of a split, in the numbers' units; of several numbers errors in standard deviations."""
        predicted = self.predicted(outputs)
        errors, r2 = (predicted - labels) / self.spread, unweighted(r_squared, labels, predicted)
        return Metrics(
            n=len(labels),
            nll=float((errors**2).sum(1).mean() / 2),
            more={
                "mae": unweighted(mean_absolute_error, labels, predicted),
                "rmse": unweighted(root_mean_squared_error, labels, predicted),
                "r2": r2 if math.isfinite(r2) else 0.0,
                "spearman": unweighted(_spearman, labels, predicted),
            },
        )

    def predicted(self, outputs: Outputs, decision: Decision | None = None) -> Labels:
        """Return the numbers, (N, K)."""
        center, spread = (self.center, self.spread) if decision is None else (decision.center, decision.spread)
        return np.array(center) + spread * outputs.astype(np.float64)

    def same(
        self, before: Outputs, after: Outputs, decision: Decision | None = None, decision_after: Decision | None = None
    ) -> Flags:
        """Return of which images numbers agree to a hundredth of a standard deviation."""
        return np.all(np.abs(before - after) <= 0.01, axis=1)

    def right(self, outputs: Outputs, labels: Labels) -> Flags:
        """Return of which images numbers are within half a standard deviation."""
        return (2 * np.abs(self.predicted(outputs) - labels) <= self.spread).all(1)

    def constant(self, labels: Labels) -> Labels:
        """Return the median, which has the least mean error."""
        return np.broadcast_to(np.median(labels, axis=0), labels.shape)

    def decide(self, outputs: Outputs, labels: Labels, prior: TemperaturePrior, images: Ints | None = None) -> Decision:
        """Return mean and spread, and half widths of intervals by coverage and by predicted number."""
        decision = Decision(images=row_weights(len(labels), images)[1], center=self.center, spread=self.spread)
        if not len(labels):
            return decision
        scaled = [error_scale(p, y, images) for p, y in zip(self.predicted(outputs).T, labels.T, strict=True)]
        coverages, half_widths = coverage_thresholds(
            lambda c: tuple(conformal_quantile(q, c, images) for _, q in scaled)
        )
        widths = {"coverages": coverages, "half_widths": half_widths}
        scale = {"scale_at": tuple(s.at for s, _ in scaled), "scale": tuple(s.sizes for s, _ in scaled)}
        return decision.model_copy(update=widths | scale)

    def covered(self, decision: Decision, outputs: Outputs, labels: Labels) -> Coverage:
        """Return how often intervals hold the number, over all numbers, and their mean width, see `promise`."""
        predicted = self.predicted(outputs, decision)
        unit = decision.spread if len(decision.spread) > 1 else 1.0

        def held_and_size(coverage: float) -> tuple[float, float]:
            width = half_widths(decision, predicted, coverage)  # (N, K)
            return (np.abs(predicted - labels) <= width).mean(), 2 * (width / unit).mean()

        return measured_coverage(decision, held_and_size)


def half_widths(decision: Decision, predicted: Labels, coverage: float) -> Labels:
    """Return how far intervals reach to both sides of numbers, (N, K)."""
    sizes = np.stack([scale.of(p) for p, scale in zip(predicted.T, scales_of(decision), strict=True)], axis=1)
    return sizes * decision.threshold(coverage)


REGRESSION: Task = _Regression()
