"""A study's folder in the hands of its scheduler: results, which decide what is done, and the attempts until then.

A result is written in the order adapter, record, removal of the rest. Whoever is killed in between has lost nothing:
what is left over beside a result is removed when the study is opened again.
"""

from __future__ import annotations

import shutil
from typing import Any

from peft_vit.records import (
    ADAPTER_FILE,
    RECORD_FILE,
    REGISTRATION_FILE,
    RunRecord,
    checkpoint_folders,
    write_result,
    write_whole,
)
from peft_vit.records.progress import PROGRESS_FILE, Attempt, Known, look_at, now
from peft_vit.safe_io import folder_below
from peft_vit.studies.lock import StudyLock

# What a run needs until it is done, and what files and checkpoints are called while they are written, see
# `write_checkpoint` and `write_atomically`.
_TEMPORARY = (
    ".checkpoint-",
    *(f".{name}." for name in (RECORD_FILE, ADAPTER_FILE, PROGRESS_FILE)),
    REGISTRATION_FILE,
    PROGRESS_FILE,
)


class StudyStore:
    """The one writer of a study's results.

    Attributes:
        folder: the study's.
        notices: what a person should know about what was found in it.

    Args:
        lock: of its folder.
        runs: that are planned.

    Raises:
        UserError: as of `look_at`.
    """

    def __init__(self, lock: StudyLock, runs: tuple[str, ...]) -> None:
        self.folder = lock.folder
        self._known = {run: look_at(self.folder, run) for run in runs}
        self.notices = [f"{run}: {known.fault}" for run, known in self._known.items() if known.fault]
        for run, known in self._known.items():
            if known.is_done:
                self._clean_up(run)

    def known(self, run: str) -> Known:
        """Return what has become of a run."""
        return self._known[run]

    def started(self, run: str, worker: str, total_steps: int) -> None:
        """Write that an attempt begins."""
        number = self._known[run].attempts + 1
        begun = Attempt(number=number, state="running", started_at=now(), worker=worker, total_steps=total_steps)
        self._write(run, begun)

    def interrupted(self, run: str) -> None:
        """Write that an attempt was stopped."""
        self._write(run, self._attempt(run).model_copy(update={"state": "interrupted"}))

    def ended(self, record: RunRecord, adapter: bytes | None = None, *, retried: bool = False) -> RunRecord:
        """Write what came of an attempt: of the last one its result, whose checkpoints go if it is done.

        Args:
            record: what happened.
            adapter: content of the adapter file; None if the run failed.
            retried: it failed, and is attempted again.

        Returns:
            The record with the number of attempts.
        """
        run = record.spec.name
        attempt = self._attempt(run)
        update: dict[str, Any] = {"attempts": attempt.number}
        for name in ("error", "traceback"):
            text = getattr(record, name)
            if text is not None:  # it may quote a file's name, which may be any bytes
                update[name] = text.encode(errors="backslashreplace").decode()
        record = record.model_copy(update=update)
        if retried:
            self._write(run, attempt.model_copy(update={"state": "failed", "error": record.error}))
            return record
        write_result(self.folder.parent, record, adapter)
        self._known[run] = look_at(self.folder, run)
        if record.status == "done":
            self._clean_up(run)
        return record

    def _attempt(self, run: str) -> Attempt:
        """Return the attempt that is under way, or the next one where its start was not told."""
        known = self._known[run]
        if known.attempt is not None and known.attempt.state == "running":
            return known.attempt
        return Attempt(number=known.attempts + 1, state="running", started_at=now())

    def _write(self, run: str, attempt: Attempt) -> None:
        write_whole(folder_below(self.folder, run) / PROGRESS_FILE, attempt.model_dump_json().encode())
        self._known[run] = look_at(self.folder, run)

    def _clean_up(self, run: str) -> None:
        """Remove what a finished run needs no more, and files that a killed process was about to put in place."""
        folder = self.folder / run
        left_over = [path for path in folder.iterdir() if path.name.startswith(_TEMPORARY)]
        for path in (*checkpoint_folders(folder).values(), *left_over):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)  # at worst some disk stays in use
            else:
                path.unlink(missing_ok=True)
