"""What can be derived from records, made anew: the ledger where it can't be read, and the table of runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_vit.analysis.history import check_pyarrow, parquet_bytes
from peft_vit.records import RECORD_FILE, RunRecord, outcome_digest, read_record, write_atomically
from peft_vit.records.ledger import LEDGER_FILE, read_ledger
from peft_vit.safe_io import folder_below
from peft_vit.studies.ledger import no_room, rewrite_ledger
from peft_vit.studies.lock import study_lock
from peft_vit.studies.status import StudyStatus, find_studies, study_runs, study_status
from peft_vit.studies.store import StudyStore

RUNS_FILE = "runs.parquet"
_WHOLE = (
    "seed",
    "attempts",
    "steps",
    "chosen_step",
    "peak_memory_bytes",
    "own_memory_bytes",
    "parameters_initial",
    "parameters_final",
    "parameters_peak",
    "frozen_bytes",
    "trainable_bytes",
    "optimizer_bytes",
    "adapter_file_bytes",
    "ranks",
)
_MEASURES = ("accuracy", "balanced_accuracy", "auroc", "nll", "ece")
_REAL = ("seconds", "seconds_per_step", "bits_per_weight", *(f"validation_{m}" for m in _MEASURES))
_TYPES = dict.fromkeys(_WHOLE, "Int64") | dict.fromkeys((*_REAL, *(f"test_{m}" for m in _MEASURES)), "float64")
COLUMNS = (
    "study",
    "smoke",
    "experiment",
    "method",
    "seed",
    "state",
    "attempts",
    "failure",
    "error",
    "started_at",
    "seconds",
    "seconds_per_step",
    "steps",
    "chosen_step",
    *(f"validation_{m}" for m in _MEASURES),
    *(f"test_{m}" for m in _MEASURES),
    "parameters_initial",
    "parameters_final",
    "parameters_peak",
    "frozen_bytes",
    "trainable_bytes",
    "optimizer_bytes",
    "adapter_file_bytes",
    "peak_memory_bytes",
    "own_memory_bytes",
    "ranks",
    "bits_per_weight",
    "spec_digest",
    "outcome_digest",
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
            yield from _mended_ledger(folder)
            store = StudyStore(lock, study_runs(folder))
            store.close()
            yield from store.notices
            file = folder / RUNS_FILE
            check_pyarrow(file)
            rows = run_rows(study_status(folder))
            try:
                write_atomically(file, parquet_bytes(rows, COLUMNS, _TYPES))
            except OSError as error:
                raise no_room(file, error) from None
            yield f"{file}: {len(rows)} runs"


def _mended_ledger(folder: Path) -> Iterator[str]:
    content = read_ledger(folder / LEDGER_FILE)
    if content.unreadable:
        rewrite_ledger(folder, content.rows)
        yield f"{folder / LEDGER_FILE}: {len(content.unreadable)} unreadable lines are gone, {len(content.rows)} stay"


def run_rows(status: StudyStatus) -> list[dict[str, Any]]:
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
    row: dict[str, Any] = {
        "smoke": record.spec.smoke,
        "method": record.spec.experiment.method,
        "failure": record.failure,
        "error": record.error,
        "started_at": record.started_at,
        "seconds": record.seconds,
        "seconds_per_step": record.seconds_per_step,
        "steps": len(record.steps),
        "chosen_step": record.chosen_step,
        "peak_memory_bytes": record.peak_memory_bytes,
        "own_memory_bytes": record.own_memory_bytes,
        "spec_digest": record.spec_digest,
        "outcome_digest": outcome_digest(record),
        "adapter_sha256": record.adapter_sha256,
        "optimizer_sha256": record.optimizer_sha256,
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
