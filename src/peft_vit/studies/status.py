"""What has become of a study's runs, read without torch and without disturbing who works on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from peft_vit.errors import UserError, printable
from peft_vit.records import RECORD_FILE
from peft_vit.records.owner import Owner, owner_of
from peft_vit.records.progress import RunStatus, State, run_status
from peft_vit.records.study_file import STUDY_FILE, read_study_file


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
    return (folder / STUDY_FILE).exists() or any(_recorded(folder))


def _recorded(folder: Path) -> Iterator[str]:
    """Yield the runs that have a record, planned or not."""
    for file in folder.glob(f"*/seed_*/{RECORD_FILE}"):
        yield file.parent.relative_to(folder).as_posix()


def study_status(folder: Path) -> StudyStatus:
    """Read what has become of a study's runs.

    Raises:
        UserError: if its study.json is damaged.
    """
    owner = owner_of(folder)  # first: who ends meanwhile has left nothing under way
    content = read_study_file(folder)
    recorded = sorted(_recorded(folder))
    notices = []
    if content is None:
        notices.append("made by an earlier version: its records are all that is known; `peft-vit run` takes them over")
    planned = tuple(recorded) if content is None else content.runs
    if foreign := sorted(set(recorded) - set(planned)):
        notices.append(f"{len(foreign)} records are of runs that the study does not have, such as {foreign[0]}")
    skipped = set() if content is None else set(content.skipped)
    runs = tuple(run_status(folder, run, owner, skipped=run in skipped) for run in planned)
    return StudyStatus(folder, runs, owner, tuple(notices))


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
