"""Finished runs as one table, a row a run: what `recommend` reads of one study, and `compare` of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from peft_vit.base.statistics import Interval, mean_interval
from peft_vit.base.statistics.estimates import Estimate, Question, decide
from peft_vit.lab.analysis.comparison import compare
from peft_vit.lab.analysis.studies import Run, Study

Cost = Literal["stored_bytes", "parameters", "seconds_per_step", "latency_s"]
_BETTER = Question()


@dataclass(frozen=True)
class Row:
    """A finished run: what it reached, and what it cost."""

    run: Run
    value: float  # on test images, a share of which more is better; see `Scores`
    validation: float | None  # likewise on validation images; None without any
    stored_bytes: float  # everything frozen, and the adapter file
    parameters: float  # trainable ones in the end
    seconds_per_step: float | None  # None here and below: not recorded
    latency_s: float | None


@dataclass(frozen=True)
class Cell:
    """The rows of one experiment in one study, by seed."""

    study: str  # its label
    name: str  # the experiment's
    rows: tuple[Row, ...]
    estimate: Estimate | None = None  # against another of the study; None: not compared

    @property
    def value(self) -> Interval:
        """Return the mean on test images with its interval."""
        return mean_interval([row.value for row in self.rows])

    def mean(self, of: Cost | Literal["validation"], over: Callable[[Sequence[float]], float] = fmean) -> float | None:
        """Return the mean of a column, or what else is to be made of it; None if a run lacks it."""
        values = [getattr(row, of) for row in self.rows]
        return None if None in values else over(values)


def frame(studies: Mapping[str, Study]) -> tuple[Cell, ...]:
    """Return the table of studies by label, in their order.

    Latency is that of the smallest batch size that all runs of a study have that have any.
    """
    cells = []
    for label, study in studies.items():
        sizes = [set(run.record.latency_s) for run in study.runs if run.record.latency_s]
        batch = min(set.intersection(*sizes), default=0) if sizes else 0
        for name in (experiment.name for experiment in study.experiments if study.of(experiment.name)):
            rows = [
                Row(
                    run=run,
                    value=run.score,
                    validation=None if run.validation is None else run.scores.of(run.validation),
                    stored_bytes=run.bytes.frozen_bytes + run.bytes.adapter_file_bytes,
                    parameters=run.parameters.final,
                    seconds_per_step=run.record.seconds_per_step or None,  # 0 is that of a clock that was set back
                    latency_s=run.record.latency_s.get(batch),
                )
                for run in study.of(name)
            ]
            cells.append(Cell(label, name, tuple(rows)))
    return tuple(cells)


def compared(cells: Sequence[Cell], base: Cell, untested: str, question: Question = _BETTER) -> list[Cell]:
    """Return experiments with their differences to another of the study, paired by seed and decided as one family.

    One without a pair counts in the family, too. `untested` as in `decide`.
    """
    runs = [[row.run for row in cell.rows] for cell in (base, *cells)]
    pairs = [compare(own, runs[0], cell.name, base.name) for cell, own in zip(cells, runs[1:], strict=True)]
    decided = decide([replace(pair, question=question) for pair in pairs], untested, size=len(pairs))
    return [replace(cell, estimate=estimate) for cell, estimate in zip(cells, decided, strict=True)]
