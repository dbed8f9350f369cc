"""The importance metrics by which ranks can be given out: a line each in `METRICS`.

What scores a triplet by its parameters and gradients is told, and computed, in `allocation.importance`. A metric with
`of_weight` asks for neither: it scores a site by its frozen weight, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ImportanceMetric:
    """What a score needs.

    Attributes:
        reads_gradient: whether it is smoothed over the steps' gradients.
        probe_power: power of the gradient by which a site without rank is scored in its units, see
            `allocation.gradient_probes`; None: it is not probed.
        of_weight: returns the score of a site from its frozen weight (out, in); None: triplets are scored.
    """

    reads_gradient: bool = False
    probe_power: int | None = None
    of_weight: Callable[[Tensor], float] | None = None


def _stable_rank(weight: Tensor) -> float:
    """Return ||W||_F^2 / ||W||_2^2, between 1 and the rank (Rudelson and Vershynin, arXiv math/0503442); 0 of zeros."""
    from torch.linalg import matrix_norm

    largest = float(matrix_norm(weight, 2))
    return float(matrix_norm(weight)) ** 2 / largest**2 if largest else 0.0


METRICS: dict[str, ImportanceMetric] = {
    "magnitude": ImportanceMetric(probe_power=1),
    "gradient_norm": ImportanceMetric(reads_gradient=True, probe_power=1),
    "fisher": ImportanceMetric(reads_gradient=True, probe_power=2),
    "sensitivity": ImportanceMetric(reads_gradient=True, probe_power=2),
    "random": ImportanceMetric(),
    "uniform": ImportanceMetric(),
    "stable_rank": ImportanceMetric(of_weight=_stable_rank),
}
GRADIENT_METRICS = tuple(name for name, metric in METRICS.items() if metric.reads_gradient)

if TYPE_CHECKING:
    Metric = str
else:
    Metric = Literal[tuple(METRICS)]
