"""What can be derived from records, made anew: the ledger where it can't be read, and the table of runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_vit.analysis.history import parquet_bytes
from peft_vit.extras import require_extra
from peft_vit.records import RECORD_FILE, RUN_COLUMNS, read_record, run_row
from peft_vit.records.ledger import LEDGER_FILE, encode, read_ledger
from peft_vit.safe_io import folder_below
from peft_vit.studies.ledger import write_whole
from peft_vit.studies.lock import study_lock
from peft_vit.studies.status import StudyStatus, find_studies, study_runs, study_status
from peft_vit.studies.store import StudyStore

RUNS_FILE = "runs.parquet"


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
            types = {name: kind for name, kind in RUN_COLUMNS.items() if kind is not None}
            write_whole(file, parquet_bytes(rows, tuple(RUN_COLUMNS), types))
            yield f"{file}: {len(rows)} runs"


def _run_rows(status: StudyStatus) -> list[dict[str, Any]]:
    """Return one row a run with RUN_COLUMNS as keys; what a run without a record does not have is None."""
    rows = []
    for run in status.runs:
        experiment, _, seed = run.run.partition("/seed_")
        file = status.folder / run.run / RECORD_FILE
        measured = run_row(read_record(file)) if file.exists() else {}
        known = {
            "study": status.folder.name,
            "experiment": experiment,
            "seed": int(seed),
            "state": run.state,
            "attempts": run.attempts,
        }
        rows.append(dict.fromkeys(RUN_COLUMNS) | measured | known)
    return rows
