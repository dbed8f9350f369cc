"""Latency of a study's experiments as `peft-vit bench` has timed their exported models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_vit.analysis.studies import Run, Study
from peft_vit.errors import UserError
from peft_vit.records import BenchRow


@dataclass(frozen=True)
class ExportedLatency:
    """What a file of times says of a study, at the smallest batch size that it has for every model."""

    file: Path
    batch: int
    processor: str
    rows: dict[str, tuple[BenchRow, ...]]  # experiment -> the fastest model of each of its runs that was timed

    def of(self, runs: Sequence[Run]) -> float | None:
        """Return the mean over an experiment's runs, in seconds; None if none of them was timed."""
        rows = self.rows.get(runs[0].experiment.name, ())
        return math.fsum(row.median_s for row in rows) / len(rows) if rows else None


def exported_latency(study: Study, rows: Sequence[BenchRow], file: Path) -> ExportedLatency:
    """Take from a file of times what its models' cards say is of this study's finished runs.

    Of several models of one run, in other formats or with other numbers of threads, the fastest counts: it is what one
    would take.

    Args:
        study: whose runs they are.
        rows: what the file holds.
        file: for messages.

    Raises:
        UserError: if it names no finished run of the study, its models share no batch size, or they were timed on
            several processors.
    """
    finished = {run.record.spec.run_id: run.experiment.name for run in study.runs}
    own = [row for row in rows if row.run in finished]
    if not own:
        names = sorted({row.run for row in rows if row.run is not None})
        said = f"its models are of {', '.join(names[:3])}{', ...' if names[3:] else ''}" if names else "it names no run"
        raise UserError(f"holds no model of a finished run of {study.label}: {said}", file=file, field="--bench")
    if len(processors := sorted({row.processor for row in own})) > 1:
        raise UserError(f"was timed on several processors ({', '.join(processors)})", file=file, field="--bench")
    batches = set.intersection(*({row.batch for row in own if row.run == run} for run in {row.run for row in own}))
    if not batches:
        raise UserError("has no batch size at which every run was timed", file=file, field="--bench")
    batch = min(batches)
    fastest: dict[str | None, BenchRow] = {}
    for row in own:
        if row.batch == batch and (row.run not in fastest or row.median_s < fastest[row.run].median_s):
            fastest[row.run] = row
    found: dict[str, tuple[BenchRow, ...]] = {}
    for run, experiment in finished.items():
        if run in fastest:
            found[experiment] = (*found.get(experiment, ()), fastest[run])
    return ExportedLatency(file, batch, processors[0], found)
