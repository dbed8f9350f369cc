"""What has become of a study's runs, read from its ledger without torch and without disturbing who works on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from peft_vit.errors import UserError, printable
from peft_vit.records import ADAPTER_FILE, RECORD_FILE, checkpoint_folders
from peft_vit.records.ledger import LEDGER_FILE, Row, last_rows, read_ledger, unfinished_state, unreadable_lines
from peft_vit.records.owner import Owner, owner_of
from peft_vit.records.study_file import STUDY_FILE, read_study_file
from peft_vit.studies.store import last_known

State = Literal["done", "failed", "pending", "running", "skipped"]


@dataclass(frozen=True)
class RunStatus:
    """What has become of a run; `note` says why, or how far it is."""

    run: str
    state: State
    attempts: int
    note: str = ""


@dataclass(frozen=True)
class StudyStatus:
    """All planned runs of a study, each in exactly one state; `owner` works on it, `notices` stand above."""

    folder: Path
    runs: tuple[RunStatus, ...]
    owner: Owner | None
    notices: tuple[str, ...]


def find_studies(directory: Path) -> list[Path]:
    """Return the folders of studies in a results directory, which may be a study's folder itself.

    Raises:
        UserError: if there is none.
    """
    if not os.path.isdir(directory):  # unlike Path.is_dir, also False for an impossible name
        problem = "is no directory" if os.path.lexists(directory) else "does not exist"
        raise UserError(f"{problem}; give what --output was", file=directory)
    if _is_study(directory):
        return [directory]
    folders = [folder for folder in sorted(directory.iterdir()) if folder.is_dir() and _is_study(folder)]
    if not folders:
        raise UserError("holds no study; run one first, e.g. `peft-vit run CONFIG`", file=directory)
    return folders


def _is_study(folder: Path) -> bool:
    return any((folder / name).exists() for name in (STUDY_FILE, LEDGER_FILE)) or any(_recorded(folder))


def _recorded(folder: Path) -> Iterator[str]:
    """Yield the runs that have a record, planned or not."""
    for file in folder.glob(f"*/seed_*/{RECORD_FILE}"):
        yield file.parent.relative_to(folder).as_posix()


def study_runs(folder: Path) -> tuple[str, ...]:
    """Return the planned runs of a study; of one that an earlier version made, those that have records."""
    content = read_study_file(folder)
    return tuple(sorted(_recorded(folder))) if content is None else content.runs


def study_status(folder: Path) -> StudyStatus:
    """Read what has become of a study's runs.

    Raises:
        UserError: if its study.json is damaged, or its ledger can't be read.
    """
    owner = owner_of(folder)  # first: who ends meanwhile has left nothing under way
    ledger = read_ledger(folder / LEDGER_FILE)
    content = read_study_file(folder)
    recorded = sorted(_recorded(folder))
    notices = []
    if content is None:
        notices.append("made by an earlier version: its records are all that is known; `peft-vit run` takes them over")
    if ledger.unreadable:
        notices.append(f"{LEDGER_FILE}: {unreadable_lines(ledger)}")
    planned = tuple(recorded) if content is None else content.runs
    if foreign := sorted(set(recorded) - set(planned)):
        notices.append(f"{len(foreign)} records are of runs that the study does not have, such as {foreign[0]}")
    skipped = set() if content is None else set(content.skipped)
    last = last_rows(ledger.rows)
    total_steps = {row.run: row.total_steps for row in ledger.rows if row.total_steps is not None}
    runs = tuple(_status(folder, run, last.get(run), total_steps.get(run), owner, run in skipped) for run in planned)
    return StudyStatus(folder, runs, owner, tuple(notices))


def _status(
    folder: Path, run: str, last: Row | None, total_steps: int | None, owner: Owner | None, skipped: bool
) -> RunStatus:
    try:
        last = last_known(last, folder, run)
    except UserError as error:
        return RunStatus(run, "pending", 0, str(error))
    attempts = 0 if last is None else last.attempt
    if last is not None and last.event == "done":
        return RunStatus(run, "done", attempts)
    state = unfinished_state(last, owner, skipped=skipped)
    if last is not None and state == "failed":
        return RunStatus(run, state, attempts, last.error or "no error was recorded")
    steps = checkpoint_folders(folder / run) if last is not None else {}
    of_total = "" if total_steps is None else f" of {total_steps}"
    if last is not None and state == "running":
        reached = f", checkpoint at step {max(steps)}{of_total}" if steps else ""
        return RunStatus(run, state, attempts, f"{last.worker}, since {last.at}{reached}")
    goes_on = f"goes on from step {max(steps)}{of_total}" if steps else ""
    if state == "skipped":
        return RunStatus(run, state, attempts, goes_on)
    why = {"failed": f"to be tried again after: {last.error}", "lost": "its files are gone"} if last is not None else {}
    notes = [why.get(last.event, ""), goes_on] if last is not None else [_without_adapter(folder / run)]
    return RunStatus(run, "pending", attempts, "; ".join(filter(None, notes)))


def _without_adapter(folder: Path) -> str:
    """Say why a run that ended counts as not done, though a report counts its record."""
    alone = (folder / RECORD_FILE).exists() and not (folder / ADAPTER_FILE).exists()
    return f"its record is here, its {ADAPTER_FILE} is not" if alone else ""


def status_lines(status: StudyStatus) -> Iterator[str]:
    """Yield the sum of all states, and what there is to say of single runs, in lines that do nothing to a terminal."""
    yield from map(printable, _lines(status))


def _lines(status: StudyStatus) -> Iterator[str]:
    counts = Counter(run.state for run in status.runs)
    total = " + ".join(f"{counts[state]} {state}" for state in get_args(State))
    yield f"{status.folder.name}: {len(status.runs)} planned = {total}"
    if status.owner is not None:
        yield f"  worked on by {status.owner}"
    for notice in status.notices:
        yield f"  {notice}"
    for state in ("failed", "running", "pending", "skipped"):
        for run in status.runs:
            if run.state == state and run.note:
                again = f", attempt {run.attempts}" if run.attempts > 1 else ""
                yield f"  {state:<8} {run.run}{again}: {run.note}"
