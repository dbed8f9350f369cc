"""What happened to the runs of a study, one JSON object a line, each with its checksum and flushed to disk.

The driver that holds the study's lock is the only writer. A line that a crash or a full disk cut short is set aside
when the ledger is opened again, never appended to; whatever it said stands in the run's record or happens again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from peft_vit.errors import UserError, first_fault
from peft_vit.experiments.lock import LOCK_FILE
from peft_vit.foreign_files import read_bytes
from peft_vit.records import RunSpec, flush, write_atomically

LEDGER_FILE = "ledger.jsonl"
# Experiment and seed, which is also the run's folder below the study's: nothing that leads out of it.
RunName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_\-]{0,63}/seed_[0-9]{1,10}$")]


class Row(BaseModel):
    """Something that happened to a run. `attempt` counts its starts, from 1, over all calls of the command."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer version may say more

    at: str  # ISO 8601, UTC
    run: RunName
    event: Literal["started", "done", "failed", "interrupted", "lost"]  # lost: its files are not there any more
    attempt: int = Field(ge=1)
    worker: str | None = None  # of started
    total_steps: int | None = None  # of started
    step: int | None = None  # of interrupted: what its checkpoint holds
    seconds: float | None = None  # of done and failed
    adapter_sha256: str | None = None  # of done
    failure: str | None = None  # of failed: the kind
    error: str | None = None  # of failed: one line
    traceback: str | None = None
    retried: bool = False  # of failed: the kind passes, and attempts are left
    found: bool = False  # not seen to happen, but read from the run's record


def run_name(spec: RunSpec) -> str:
    """Return a run's name within its study."""
    return f"{spec.experiment.name}/seed_{spec.seed}"


def now() -> str:
    """Return the time for a row."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def last_rows(rows: Iterable[Row]) -> dict[str, Row]:
    """Return what happened last to each run."""
    return {row.run: row for row in rows}


@dataclass(frozen=True)
class LedgerContent:
    """A ledger as it was read.

    Attributes:
        rows: in the order in which they were written.
        sound_bytes: length of the lines of these rows.
        torn: what follows them, cut short; b"" as a rule.
    """

    rows: tuple[Row, ...]
    sound_bytes: int
    torn: bytes


def read_ledger(file: Path) -> LedgerContent:
    """Read a ledger, which may be written to at the same time; without a file there are no rows.

    Raises:
        UserError: with file and line, if a line before the last is damaged, or if the file can't be read.
    """
    lines = _lines(file)
    rows: list[Row] = []
    sound_bytes = 0
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_decode(line))
        except ValueError as error:
            if number == len(lines):
                return LedgerContent(tuple(rows), sound_bytes, line)
            problem = f"this line is damaged ({_reason(error)}); `peft-vit rebuild {file.parent}` makes the ledger anew"
            raise UserError(f"{problem} from the records", file=f"{file}:{number}") from None
        sound_bytes += len(line)
    return LedgerContent(tuple(rows), sound_bytes, b"")


def sound_rows(file: Path) -> tuple[list[Row], int]:
    """Return the rows of a damaged ledger that are as they were written, and the number of other lines."""
    rows = []
    lines = _lines(file)
    for line in lines:
        try:
            rows.append(_decode(line))
        except ValueError:
            continue
    return rows, len(lines) - len(rows)


class Ledger:
    """A study's ledger, open for the one process that holds the study's lock.

    It is locked as well: somebody may remove the study's lock file, and with it what keeps a second process away.

    Attributes:
        rows: all rows so far.
        set_aside: where a torn last line went, if there was one.

    Raises:
        UserError: as in `read_ledger`, if another process writes to it, and if the disk has no room for a line; the
            ledger is then as before.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LEDGER_FILE
        self.set_aside: Path | None = None
        self._descriptor = -1
        try:
            self._open()
            content = read_ledger(self.file)
            if content.torn:
                self.set_aside = free_name(folder / "ledger.torn")
                write_atomically(self.set_aside, content.torn)
                self._cut(content.sound_bytes)
            flush(folder)
        except OSError as error:
            self.close()
            raise no_room(self.file, error) from None
        except BaseException:
            self.close()
            raise
        self.rows = list(content.rows)
        self._bytes = content.sound_bytes

    def _open(self) -> None:
        # Not blocking, in case it is a pipe, which is refused when it is read.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        self._descriptor = os.open(self.file, flags, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"another command writes to it, whose {LOCK_FILE} was removed; wait for its end, or stop it"
            raise UserError(problem, file=self.file) from None

    def append(self, row: Row) -> None:
        """Add a row; it is on disk when this returns."""
        line = encode(row)
        try:
            written = 0
            while written < len(line):  # it is less where the disk is nearly full
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            with suppress(OSError):  # what is left of the line is then set aside when the ledger is opened again
                self._cut(self._bytes)
            raise no_room(self.file, error) from None
        self._bytes += len(line)
        self.rows.append(row)

    def close(self) -> None:
        """Give the file back; nothing can be appended any more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _cut(self, length: int) -> None:
        os.ftruncate(self._descriptor, length)
        os.fsync(self._descriptor)


def rewrite_ledger(folder: Path, rows: Iterable[Row]) -> Path | None:
    """Replace a ledger by one with these rows; return where the old one was set aside, if there was one."""
    file = folder / LEDGER_FILE
    aside = free_name(folder / "ledger.damaged") if file.exists() else None
    try:
        if aside is not None:
            write_atomically(aside, read_bytes(file))
        write_atomically(file, b"".join(map(encode, rows)))
    except OSError as error:
        raise no_room(file, error) from None
    return aside


def encode(row: Row) -> bytes:
    """Return a row's line."""
    data = row.model_dump(mode="json", exclude_defaults=True)
    return _canonical({"row": data, "sha256": _checksum(data)}) + b"\n"


def _decode(line: bytes) -> Row:
    """Return a line's row.

    Raises:
        ValueError: if it is not exactly what was written.
    """
    if not line.endswith(b"\n"):
        raise ValueError("it does not end")
    try:
        data: Any = json.loads(line)
    except RecursionError:
        raise ValueError("it is no JSON") from None
    if not isinstance(data, dict) or data.keys() != {"row", "sha256"} or data["sha256"] != _checksum(data["row"]):
        raise ValueError("its checksum is another")
    return Row.model_validate(data["row"])


def _reason(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        field, fault = first_fault(error)
        return f"{field}: {fault}"
    return "it is no JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def _checksum(row: Any) -> str:
    return hashlib.sha256(_canonical(row)).hexdigest()[:16]


def _lines(file: Path) -> list[bytes]:
    try:
        content = read_bytes(file)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror}); make it readable", file=file) from None
    *lines, rest = content.split(b"\n")
    return [line + b"\n" for line in lines] + ([rest] if rest else [])


def free_name(file: Path) -> Path:
    """Return the first of ``file-1``, ``file-2``, ... that is not there."""
    number = 1
    while file.with_name(f"{file.name}-{number}").exists():
        number += 1
    return file.with_name(f"{file.name}-{number}")


def no_room(file: Path, error: OSError) -> UserError:
    """Return what to say when a study can't be written to."""
    problem = f"can't be written ({error.strerror}); nothing that was written is lost: make room, or make it writable"
    return UserError(f"{problem}, and the same command goes on", file=file)
