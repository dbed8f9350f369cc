"""What follows from a record: the digest of its outcome, rows of tables of runs, ranks and scores; rows as CSV."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from peft_vit.core.records import RunRecord

# What the digest leaves out: of an attempt, its machine and its pace, ...
_LEFT_OUT: dict[str, Any] = dict.fromkeys(
    (
        "schema_version",
        "spec",  # spec_digest stands for it
        "error",
        "failure",
        "traceback",
        "started_at",
        "seconds",
        "attempts",
        "warnings",
        "provenance",
        "seconds_per_step",
        "overhead_s",
        "peak_memory_bytes",
        "own_memory_bytes",
        "latency_s",
        "registration",
        # ... and what follows from the rest, or came after the first digests, which kept results hold.
        "left_out",
        "head_fit",
        "probe_test",
        "calibrated",
        "decision",
        "unlike",
        "features_sha256",
        "tested_calibration",
    ),
    True,
)
_LEFT_OUT |= {"sites": {"__all__": {"role"}}, "steps": {"__all__": {"seconds"}}}

_MEASURES = ("accuracy", "balanced_accuracy", "auroc", "nll", "ece")
# The columns of a table of runs, with the types of those that may be empty.
RUN_COLUMNS: Mapping[str, str | None] = {
    "study": None,
    "smoke": None,
    "experiment": None,
    "method": None,
    "seed": "Int64",
    "state": None,
    "attempts": "Int64",
    "failure": None,
    "error": None,
    "started_at": None,
    "seconds": "float64",
    "seconds_per_step": "float64",
    "steps": "Int64",
    "chosen_step": "Int64",
    **{f"{split}_{measure}": "float64" for split in ("validation", "test") for measure in _MEASURES},
    "parameters_initial": "Int64",
    "parameters_final": "Int64",
    "parameters_peak": "Int64",
    "frozen_bytes": "Int64",
    "trainable_bytes": "Int64",
    "optimizer_bytes": "Int64",
    "adapter_file_bytes": "Int64",
    "peak_memory_bytes": "Int64",
    "own_memory_bytes": "Int64",
    "ranks": "Int64",
    "bits_per_weight": "float64",
    "spec_digest": None,
    "outcome_digest": None,
    "adapter_sha256": None,
    "optimizer_sha256": None,
}


def outcome_digest(record: RunRecord) -> str:
    """Return the SHA-256 of everything that must not depend on interruptions, on the time or on the pace.

    Equal for a run and its repetition on the same machine, with the same torch and as many threads, however often it
    was killed in between.
    """
    values = record.model_dump(mode="json", exclude=_LEFT_OUT)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def run_row(record: RunRecord) -> dict[str, Any]:
    """Return a run's row in a table with RUN_COLUMNS; what it does not have is None."""
    spec, experiment = record.spec, record.spec.experiment
    row = {name: getattr(record, name, None) for name in RUN_COLUMNS}
    row |= {"study": spec.study, "smoke": spec.smoke, "experiment": experiment.name, "method": experiment.method}
    row |= {"seed": spec.seed, "state": record.status, "steps": len(record.steps)}
    row["outcome_digest"] = outcome_digest(record)
    for split, metrics in (("validation", record.validation), ("test", record.test)):
        if metrics is not None:
            row |= {f"{split}_{measure}": getattr(metrics, measure) for measure in _MEASURES}
    if record.parameters is not None:
        row |= {f"parameters_{when}": getattr(record.parameters, when) for when in ("initial", "final", "peak")}
    if record.bytes is not None:
        row |= record.bytes.model_dump()
    if record.rank_history:
        row["ranks"] = sum(record.rank_history[-1].ranks.values())
    if record.quantization is not None:
        row["bits_per_weight"] = record.quantization.bits_per_weight
    return row


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Return rows as CSV: some columns in any case, then those that occur, in the order in which they do."""
    text = io.StringIO()
    names = dict.fromkeys([*columns, *(key for row in rows for key in row)])
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
