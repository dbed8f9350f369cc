"""What a configuration may cost: limits as a person writes them, and what the runs of an experiment cost."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal, TypeGuard

from peft_vit.analysis.studies import Run, Study
from peft_vit.errors import UserError
from peft_vit.records import BenchRow

Measure = Literal["bytes", "params", "latency"]
SAME_SIZE = 0.01  # share of the smaller one by which sizes may differ and still count as equal

_NUMBER = re.compile(r"(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?) ?(?P<unit>[A-Za-z]*)", re.ASCII)
COUNT_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_count(text: str, option: str) -> float:
    """Return a count from ``300000``, ``3e5``, ``300k`` or ``0.3M``.

    Raises:
        UserError: for anything else, or what is not above 0; names the option.
    """
    match = _NUMBER.fullmatch(text.strip(" "))
    count = float(match["number"]) * COUNT_UNITS[match["unit"]] if match and match["unit"] in COUNT_UNITS else math.nan
    if not 0 < count < math.inf:
        expected = "expected a number above 0, such as 300000, 3e5 or 300k"
        known = ", ".join(unit for unit in COUNT_UNITS if unit)
        raise UserError(f"{expected} (units: {known}), got {text!r}", field=option)
    return count


def check_positive(value: float | None, option: str, unit: str) -> float | None:
    """Return a limit that was given as a number.

    Raises:
        UserError: if it is not finite or not above 0; names the option.
    """
    if value is not None and not 0 < value < math.inf:
        raise UserError(f"expected {unit} above 0, got {value}", field=option)
    return value


def milliseconds(value: float | None, option: str) -> float | None:
    """Return seconds of a limit that was given in milliseconds; raises as `check_positive`."""
    checked = check_positive(value, option, "milliseconds")
    return None if checked is None else checked / 1000


@dataclass(frozen=True)
class ExportedLatency:
    """What a file of `peft-vit bench` says of a study, at the smallest batch size that it has for every model."""

    file: Path
    batch: int
    processor: str
    rows: dict[str, tuple[BenchRow, ...]]  # experiment -> the fastest model of each of its runs that was timed

    def of(self, runs: Sequence[Run]) -> float | None:
        """Return the mean over an experiment's runs, in seconds; None if none of them was timed."""
        rows = self.rows.get(runs[0].experiment.name, ())
        return fmean(row.median_s for row in rows) if rows else None


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


@dataclass(frozen=True)
class Cost:
    """What the finished runs of one experiment cost."""

    stored_bytes: float  # frozen weights as they are kept, and the adapter file; mean over seeds
    largest_bytes: int  # the same of the largest run
    parameters: float  # trainable at the end, head included; mean over seeds
    largest_parameters: int  # of the largest run
    seconds_per_step: float | None  # mean over seeds of the runs' medians; None if a run lacks it
    # mean over seeds of the runs' median forward pass, or over those whose exported model was timed; None: not known
    latency_s: float | None

    def by(self, measure: Measure) -> float | None:
        """Return what experiments are ordered by."""
        return {"bytes": self.stored_bytes, "params": self.parameters, "latency": self.latency_s}[measure]


def cost_of(runs: Sequence[Run], latency_batch: int | None, exported: ExportedLatency | None = None) -> Cost:
    """Return the cost of one experiment's finished runs.

    Args:
        runs: at least one.
        latency_batch: of what latency was recorded; None: it is not asked for.
        exported: latency of exported models, to be taken instead.
    """
    stored = [run.bytes.frozen_bytes + run.bytes.adapter_file_bytes for run in runs]
    parameters = [run.parameters.final for run in runs]
    latencies = [None if latency_batch is None else run.record.latency_s.get(latency_batch) for run in runs]
    return Cost(
        stored_bytes=fmean(stored),
        largest_bytes=max(stored),
        parameters=fmean(parameters),
        largest_parameters=max(parameters),
        seconds_per_step=_mean([run.record.seconds_per_step for run in runs]),
        latency_s=_mean(latencies) if exported is None else exported.of(runs),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if is_time(value)]
    return fmean(known) if known and len(known) == len(values) else None


def is_time(value: float | None) -> TypeGuard[float]:
    """Return whether a time was recorded: a clock that was set back, or a broken record, measures nothing."""
    return value is not None and 0 < value < math.inf


def smallest_latency_batch(runs: Sequence[Run]) -> int | None:
    """Return the smallest batch size whose latency every run has recorded that has recorded any; None if none has."""
    recorded = [set(run.record.latency_s) for run in runs if run.record.latency_s]
    return min(set.intersection(*recorded), default=None) if recorded else None


Option = Literal["--max-bytes", "--max-params", "--max-seconds", "--max-latency-ms"]


@dataclass(frozen=True)
class Fault:
    """A limit beside what an experiment costs in its unit (bytes, parameters, seconds); None: not recorded."""

    option: Option
    limit: float
    value: float | None


@dataclass(frozen=True)
class Limits:
    """What a configuration may cost at most; None: no limit.

    Bytes and parameters are counted, so the largest run has to keep them, whatever ranks a seed has led to. Times are
    measured, so the mean over seeds has to.
    """

    stored_bytes: float | None = None
    parameters: float | None = None
    seconds_per_step: float | None = None
    latency_s: float | None = None

    def given(self, cost: Cost) -> tuple[Fault, ...]:
        """Return every limit that was given, beside what a cost says of it."""
        beside: tuple[tuple[Option, float | None, float | None], ...] = (
            ("--max-bytes", self.stored_bytes, cost.largest_bytes),
            ("--max-params", self.parameters, cost.largest_parameters),
            ("--max-seconds", self.seconds_per_step, cost.seconds_per_step),
            ("--max-latency-ms", self.latency_s, cost.latency_s),
        )
        return tuple(Fault(option, limit, value) for option, limit, value in beside if limit is not None)

    def faults(self, cost: Cost) -> tuple[Fault, ...]:
        """Return the limits that a cost does not keep, or of which nothing was recorded."""
        return tuple(one for one in self.given(cost) if one.value is None or one.value > one.limit)
