"""Experiments of studies as one table, a row each: what `recommend` reads of one study, and `compare` of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from peft_vit.base.statistics.estimates import Estimate
from peft_vit.lab.analysis.comparison import MethodResult, method_results
from peft_vit.lab.analysis.studies import Run, Study

Cost = Literal["stored_bytes", "parameters", "seconds_per_step", "latency_s"]


@dataclass(frozen=True)
class Row:
    """One experiment in one study: what it reached, and what its runs cost."""

    study: str  # its label
    method: MethodResult
    costs: tuple[Mapping[Cost, float | None], ...]  # by run; None: not recorded
    estimate: Estimate | None = None  # against another of the study; None: not compared

    @property
    def name(self) -> str:
        """Return the experiment's name."""
        return self.method.name

    def mean(self, cost: Cost, over: Callable[[Sequence[float]], float] = fmean) -> float | None:
        """Return the mean of a cost over runs, or what else is to be made of it; None if a run lacks it."""
        recorded = [value for costs in self.costs if (value := costs[cost]) is not None]
        return over(recorded) if len(recorded) == len(self.costs) else None


def frame(studies: Mapping[str, Study]) -> tuple[Row, ...]:
    """Return the table of studies by label, in their order.

    Latency is that of the smallest batch size that all runs of a study have that have any.
    """
    rows = []
    for label, study in studies.items():
        batches = [set(run.record.latency_s) for run in study.runs if run.record.latency_s]
        batch = min(set.intersection(*batches), default=0) if batches else 0
        for method in method_results(study):
            rows.append(Row(label, method, tuple(_costs(run, batch) for run in method.runs)))
    return tuple(rows)


def _costs(run: Run, batch: int) -> dict[Cost, float | None]:
    return {
        "stored_bytes": run.bytes.stored_bytes,
        "parameters": run.parameters.final,
        "seconds_per_step": run.record.seconds_per_step or None,  # 0 is that of a clock that was set back
        "latency_s": run.record.latency_s.get(batch),
    }
