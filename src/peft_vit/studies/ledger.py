"""What happened to the runs of a study, one JSON object a line, flushed to disk.

The scheduler that holds the study's lock is the only writer. A line that a crash or a full disk cut short is dropped
when the ledger is opened again; whatever it said stands in the run's record or happens again.
"""

from __future__ import annotations

import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path

from peft_vit.errors import UserError
from peft_vit.records import RunSpec, flush, write_atomically
from peft_vit.records.ledger import LEDGER_FILE, Row, encode, read_ledger
from peft_vit.records.owner import LOCK_FILE


def run_name(spec: RunSpec) -> str:
    """Return a run's name within its study."""
    return f"{spec.experiment.name}/seed_{spec.seed}"


def now() -> str:
    """Return the time for a row."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Ledger:
    """A study's ledger, open for the one process that holds the study's lock.

    It is locked as well: somebody may remove the study's lock file, and with it what keeps a second process away.

    Attributes:
        rows: all rows so far.

    Raises:
        UserError: as in `read_ledger`, if another process writes to it, and if the disk has no room for a line.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LEDGER_FILE
        self._descriptor = -1
        try:
            self._open()
            content = read_ledger(self.file)
            if os.fstat(self._descriptor).st_size > content.whole_bytes:
                os.ftruncate(self._descriptor, content.whole_bytes)
            flush(folder)
        except OSError as error:
            self.close()
            raise no_room(self.file, error) from None
        except BaseException:
            self.close()
            raise
        self.rows = list(content.rows)

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
            raise no_room(self.file, error) from None
        self.rows.append(row)

    def close(self) -> None:
        """Give the file back; nothing can be appended any more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def write_whole(file: Path, content: bytes) -> None:
    """Replace a file of a study, as `write_atomically`; what has no room is told in one line."""
    try:
        write_atomically(file, content)
    except OSError as error:
        raise no_room(file, error) from None


def no_room(file: Path, error: OSError) -> UserError:
    """Return what to say when a study can't be written to."""
    problem = f"can't be written ({error.strerror}); nothing that was written is lost: make room, or make it writable"
    return UserError(f"{problem}, and the same command goes on", file=file)
