"""The importance metrics by which ranks can be given out: a line each in `METRICS`.

What scores a triplet by its parameters and gradients, or a site by its frozen weight, is told, and computed, in
`allocation.importance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class ImportanceMetric:
    """What a score needs.

    Attributes:
        reads_gradient: whether it is smoothed over the steps' gradients.
        probe_power: power of the gradient by which a site without rank is scored in its units, see
            `allocation.gradient_probes`; None: it is not probed.
        reads_weight: whether it scores a site by its frozen weight, once, in place of triplets.
    """

    reads_gradient: bool = False
    probe_power: int | None = None
    reads_weight: bool = False


METRICS: dict[str, ImportanceMetric] = {
    "magnitude": ImportanceMetric(probe_power=1),
    "gradient_norm": ImportanceMetric(reads_gradient=True, probe_power=1),
    "fisher": ImportanceMetric(reads_gradient=True, probe_power=2),
    "sensitivity": ImportanceMetric(reads_gradient=True, probe_power=2),
    "random": ImportanceMetric(),
    "uniform": ImportanceMetric(),
    "stable_rank": ImportanceMetric(reads_weight=True),
}
GRADIENT_METRICS = tuple(name for name, metric in METRICS.items() if metric.reads_gradient)

if TYPE_CHECKING:
    Metric = str
else:
    Metric = Literal[tuple(METRICS)]
