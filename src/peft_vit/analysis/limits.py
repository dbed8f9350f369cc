"""What a configuration may cost: limits as a person writes them, and times of exported models."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal, TypeGuard

from peft_vit.analysis.studies import Run, Study, grouped
from peft_vit.config import parse_bytes
from peft_vit.errors import UserError
from peft_vit.records import BenchRow

Measure = Literal["bytes", "params", "latency"]
Option = Literal["--max-bytes", "--max-params", "--max-seconds", "--max-latency-ms"]
# What was asked, in bytes, parameters and seconds. Bytes and parameters are counted, so the largest run has to keep
# them, whatever ranks a seed has led to. Times are measured, so the mean over seeds has to.
Limits = Mapping[Option, float]

SAME_SIZE = 0.01  # share of the smaller one by which sizes may differ and still count as equal
_COUNT = re.compile(r"((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?) ?([kKMG]?)", re.ASCII)
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_limits(
    max_bytes: str | None = None,
    max_params: str | None = None,
    max_seconds: float | None = None,
    max_latency_ms: float | None = None,
) -> dict[Option, float]:
    """Return the limits that were given: bytes as in 20MB, parameters as in 300k or 3e5.

    Raises:
        UserError: for what is no number above 0, or no size; names the option.
    """
    limits: dict[Option, float] = {}
    if max_bytes is not None:
        limits["--max-bytes"] = parse_bytes(max_bytes, "--max-bytes")
    if max_params is not None:
        match = _COUNT.fullmatch(max_params.strip(" "))
        limits["--max-params"] = float(match[1]) * _UNITS[match[2]] if match else math.nan
        if not 0 < limits["--max-params"] < math.inf:
            expected = "expected a number above 0, such as 300000, 3e5 or 300k (units: k, K, M, G)"
            raise UserError(f"{expected}, got {max_params!r}", field="--max-params")
    times: tuple[tuple[Option, float | None, str, int], ...] = (
        ("--max-seconds", max_seconds, "seconds", 1),
        ("--max-latency-ms", max_latency_ms, "milliseconds", 1000),
    )
    for option, value, unit, in_a_second in times:
        if value is not None:
            if not 0 < value < math.inf:
                raise UserError(f"expected {unit} above 0, got {value}", field=option)
            limits[option] = value / in_a_second
    return limits


def is_time(value: float | None) -> TypeGuard[float]:
    """Return whether a time was recorded: a clock that was set back, or a broken record, measures nothing."""
    return value is not None and 0 < value < math.inf


def smallest_latency_batch(runs: Sequence[Run]) -> int | None:
    """Return the smallest batch size whose latency every run has recorded that has recorded any; None if none has."""
    recorded = [set(run.record.latency_s) for run in runs if run.record.latency_s]
    return min(set.intersection(*recorded), default=None) if recorded else None


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
    of_run = grouped((row.run, row) for row in rows if row.run in finished)
    if not of_run:
        names = sorted({row.run for row in rows if row.run is not None})
        reason = (
            f"its models are of {', '.join(names[:3])}{', ...' if names[3:] else ''}" if names else "it names no run"
        )
        raise UserError(f"holds no model of a finished run of {study.label}: {reason}", file=file, field="--bench")
    if len(processors := sorted({row.processor for own in of_run.values() for row in own})) > 1:
        raise UserError(f"was timed on several processors ({', '.join(processors)})", file=file, field="--bench")
    batches = set.intersection(*({row.batch for row in own} for own in of_run.values()))
    if not batches:
        raise UserError("has no batch size at which every run was timed", file=file, field="--bench")
    batch = min(batches)
    fastest = grouped(
        (experiment, min((row for row in of_run[run] if row.batch == batch), key=lambda row: row.median_s))
        for run, experiment in finished.items()
        if run in of_run
    )
    return ExportedLatency(file, batch, processors[0], {name: tuple(own) for name, own in fastest.items()})
