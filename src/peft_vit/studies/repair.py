"""What can be derived from records, made anew: the ledger where it can't be read, and the table of runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_vit.analysis.history import parquet_bytes
from peft_vit.extras import require_extra
from peft_vit.records import RECORD_FILE, RunRecord, outcome_digest, read_record
from peft_vit.records.ledger import LEDGER_FILE, encode, read_ledger
from peft_vit.safe_io import folder_below
from peft_vit.studies.ledger import write_whole
from peft_vit.studies.lock import study_lock
from peft_vit.studies.status import StudyStatus, find_studies, study_runs, study_status
from peft_vit.studies.store import StudyStore

RUNS_FILE = "runs.parquet"
_MEASURES = ("accuracy", "balanced_accuracy", "auroc", "nll", "ece")
# The columns of the table, with the types of those that may be empty.
COLUMNS: dict[str, str | None] = {
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
_AS_RECORDED = (
    "failure",
    "error",
    "started_at",
    "seconds",
    "seconds_per_step",
    "chosen_step",
    "peak_memory_bytes",
    "own_memory_bytes",
    "spec_digest",
    "adapter_sha256",
    "optimizer_sha256",
)


def repair(directory: Path) -> Iterator[str]:
    """Make what is derived anew, study by study, and yield what was done.

    Lines of a ledger that can't be read are dropped, and what records say beyond the others is entered.

    Raises:
        UserError: if there is no study, if another command works on one, if a record can't be read, if a link
            leads out of the directory, if there is no room, or if the table can't be written for want of pyarrow.
    """
    for folder in find_studies(directory):
        if folder != directory:
            folder_below(directory, folder.name)  # no link, through which something would be written elsewhere
        with study_lock(folder) as lock:
            ledger = folder / LEDGER_FILE
            content = read_ledger(ledger)
            if content.unreadable:
                write_whole(ledger, b"".join(map(encode, content.rows)))
                yield f"{ledger}: {len(content.unreadable)} unreadable lines are gone, {len(content.rows)} stay"
            store = StudyStore(lock, study_runs(folder))
            store.close()
            yield from store.notices
            file = folder / RUNS_FILE
            require_extra("parquet", file=file)
            rows = _run_rows(study_status(folder))
            types = {name: kind for name, kind in COLUMNS.items() if kind is not None}
            write_whole(file, parquet_bytes(rows, tuple(COLUMNS), types))
            yield f"{file}: {len(rows)} runs"


def _run_rows(status: StudyStatus) -> list[dict[str, Any]]:
    """Return one row a run with COLUMNS as keys; what a run without a record does not have is None."""
    rows = []
    for run in status.runs:
        experiment, _, seed = run.run.partition("/seed_")
        file = status.folder / run.run / RECORD_FILE
        measured = _measured(read_record(file)) if file.exists() else {}
        known = {
            "study": status.folder.name,
            "experiment": experiment,
            "seed": int(seed),
            "state": run.state,
            "attempts": run.attempts,
        }
        rows.append(dict.fromkeys(COLUMNS) | measured | known)
    return rows


def _measured(record: RunRecord) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(record, name) for name in _AS_RECORDED}
    row |= {
        "smoke": record.spec.smoke,
        "method": record.spec.experiment.method,
        "steps": len(record.steps),
        "outcome_digest": outcome_digest(record),
    }
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
