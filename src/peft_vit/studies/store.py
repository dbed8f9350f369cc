"""A study's folder in the hands of its scheduler: results, which decide what is done, and the ledger beside them.

A result is written in the order adapter, record, ledger, removal of the checkpoints. Whoever is killed in between has
lost nothing: a record that the ledger does not know yet is entered into it when the study is opened again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from peft_vit.errors import UserError
from peft_vit.records import ADAPTER_FILE, RECORD_FILE, REGISTRATION_FILE, RunRecord, checkpoint_folders, write_result
from peft_vit.records.ledger import Row, last_rows
from peft_vit.safe_io import folder_below, read_bytes
from peft_vit.studies.ledger import Ledger, no_room, now, run_name
from peft_vit.studies.lock import StudyLock

# What checkpoints and files are called while they are written, see `write_checkpoint` and `write_atomically`.
_TEMPORARY = (".checkpoint-", *(f".{name}." for name in (RECORD_FILE, ADAPTER_FILE)), REGISTRATION_FILE)


def last_known(last: Row | None, folder: Path, run: str) -> Row | None:
    """Return what is known last of a run: its record decides what has ended, the ledger knows what came after it.

    Args:
        last: what the ledger says last of the run.
        folder: the study's.
        run: the run's name.

    Returns:
        The ledger's row, or the one that is missing in it.

    Raises:
        UserError: if the record that decides can't be read, or if a link leads out of the study's folder.
    """
    file = folder_below(folder, run) / RECORD_FILE
    adapter = file.with_name(ADAPTER_FILE).exists()
    if last is not None and last.event == "done":
        if file.exists() and adapter:
            return last
        return Row(at=now(), run=run, event="lost", attempt=last.attempt)
    if not file.exists():
        return last
    record = _glance(file, run)
    if record.event == "done" and not adapter:
        return last
    later = last is not None and (last.event in ("failed", "lost") or last.attempt > record.attempt)
    if later and record.event != "done":
        return last
    return record.model_copy(update={"attempt": max(record.attempt, 1 if last is None else last.attempt)})


def _glance(file: Path, run: str) -> Row:
    """Return what a record says of its end. Of a thousand records, reading all of each takes too long for a look."""
    try:
        data: Any = json.loads(read_bytes(file))
        return Row(
            at=now(),
            run=run,
            event=data["status"],
            attempt=data.get("attempts", 1),
            seconds=data["seconds"],
            adapter_sha256=data.get("adapter_sha256"),
            failure=data.get("failure"),
            error=data.get("error"),
            traceback=data.get("traceback"),
            found=True,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        problem = "is not a readable record; move it away and run the study again"
        raise UserError(problem, file=file) from None


def _as_utf8(text: str | None) -> str | None:
    """Return text that a record can hold: an error may quote a file's name, which may be any bytes."""
    return None if text is None else text.encode(errors="backslashreplace").decode()


class StudyStore:
    """The one writer of a study's ledger and results.

    Attributes:
        folder: the study's.
        notices: what a person should know about what was found in it.

    Args:
        lock: of its folder.
        runs: that are planned.

    Raises:
        UserError: as of `Ledger`, and if a record can't be read.
    """

    def __init__(self, lock: StudyLock, runs: tuple[str, ...]) -> None:
        self.folder = lock.folder
        self.notices: list[str] = []
        self._ledger = Ledger(lock.folder)
        self._last = last_rows(self._ledger.rows)
        try:
            for run in runs:
                self._look_at(run)
        except BaseException:
            self.close()
            raise

    def _look_at(self, run: str) -> None:
        row = last_known(self._last.get(run), self.folder, run)
        if row is not self._last.get(run):
            assert row is not None
            self._append(row)
            if row.event == "lost":
                self.notices.append(f"{run}: was done, but its record or its adapter is gone; it runs again")
        if row is not None and row.event == "done":
            self._clean_up(run)

    def last(self, run: str) -> Row | None:
        """Return what happened last to a run."""
        return self._last.get(run)

    def attempt(self, run: str) -> int:
        """Return the number of the attempt that is under way, or of the next one."""
        last = self._last.get(run)
        if last is None:
            return 1
        return last.attempt if last.event == "started" else last.attempt + 1

    def started(self, run: str, worker: str, total_steps: int) -> None:
        """Enter that an attempt begins."""
        last = self._last.get(run)
        self._enter(run, "started", 1 if last is None else last.attempt + 1, worker=worker, total_steps=total_steps)

    def interrupted(self, run: str, step: int) -> None:
        """Enter that an attempt was stopped."""
        self._enter(run, "interrupted", self.attempt(run), step=step)

    def ended(self, record: RunRecord, adapter: bytes | None = None, *, retried: bool = False) -> RunRecord:
        """Write what came of a run, unless it is attempted again, and enter it; a finished one's checkpoints go.

        Args:
            record: what happened.
            adapter: content of the adapter file; None if the run failed.
            retried: it failed, and is attempted again.

        Returns:
            The record with the number of attempts.
        """
        run = run_name(record.spec)
        said = {"error": _as_utf8(record.error), "traceback": _as_utf8(record.traceback)}
        record = record.model_copy(update={"attempts": self.attempt(run)} | said)
        if not retried:
            try:
                write_result(self.folder.parent, record, adapter)
            except OSError as error:
                raise no_room(self.folder / run, error) from None
        self._enter(
            run,
            record.status,
            record.attempts,
            seconds=record.seconds,
            adapter_sha256=record.adapter_sha256,
            failure=record.failure,
            error=record.error,
            traceback=record.traceback,
            retried=retried,
        )
        if record.status == "done":
            self._clean_up(run)
        return record

    def close(self) -> None:
        """Give the ledger back."""
        self._ledger.close()

    def _enter(
        self, run: str, event: Literal["started", "interrupted", "done", "failed"], attempt: int, **more: Any
    ) -> None:
        self._append(Row(at=now(), run=run, event=event, attempt=attempt, **more))

    def _append(self, row: Row) -> None:
        self._ledger.append(row)
        self._last[row.run] = row

    def _clean_up(self, run: str) -> None:
        """Remove what a finished run needs no more, and files that a killed process was about to put in place."""
        folder = self.folder / run
        left_over = [path for path in folder.iterdir() if path.name.startswith(_TEMPORARY)]
        for path in (*checkpoint_folders(folder).values(), *left_over):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)  # at worst some disk stays in use
            else:
                path.unlink(missing_ok=True)
