"""Kills drivers of fake studies in forked processes; a script, so that the forks hold neither torch nor threads.

Each mode prints what it has done, and fails if a study that was killed does not end as an undisturbed one.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fake_study import FakeExecutor, check_complete, fake_config, fake_drive, fake_plan

from peft_vit.base.errors import UserError
from peft_vit.runs.records.progress import study_status
from peft_vit.runs.records.scan import read_records

CALLS = ("write", "fsync", "replace", "ftruncate", "open", "mkdir", "unlink", "rmdir")
STUDY = fake_config(experiments=("a",), seeds=(0, 1))
KILLED = 9


def drive(out: Path, executor: FakeExecutor) -> None:
    """Drive the study; what is done already is not done again."""
    planned = fake_plan(STUDY, out).runs
    fake_drive(STUDY, out, executor)
    assert executor.submitted == [run.spec.name for run in planned if not run.done]


class Written:
    """A file that is open for writing, whose every write is a call of `os.write`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, content: bytes) -> None:
        while content:
            content = content[os.write(self._descriptor, content) :]

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def fileno(self) -> int:
        return self._descriptor


def write_through_calls() -> None:
    """Have files written by calls that can be watched: Python's own file objects make theirs unseen."""
    fdopen: Any = os.fdopen

    def replacement(descriptor: int, mode: str) -> Any:
        return Written(descriptor) if mode == "wb" else fdopen(descriptor, mode)

    setattr(os, "fdopen", replacement)  # noqa: B010 - mypy would want all of its overloads


def in_child(action: Callable[[], object]) -> int:
    """Do something in a forked process; return its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            action()
            code = 0
        except UserError as error:
            os.write(2, f"{error}\n".encode())
            code = 2
        except KeyboardInterrupt:
            code = 130
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(count: int) -> None:
    """Make this process end like a killed one at its count-th call of the system; a write is first half done."""
    write_through_calls()
    left = count

    def dying(call: Any, name: str) -> Any:
        def replacement(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                if name == "write":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                os._exit(KILLED)
            return call(*arguments, **named)

        return replacement

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name), name))


def crash_everywhere(folder: Path) -> None:
    """Kill a driver at its first call of the system, at its second, and so on; each time it is then let finish."""
    for count in range(1, 10_000):
        out = folder / str(count)

        def disturbed(count: int = count, out: Path = out) -> None:
            die_at(count)
            drive(out, FakeExecutor(checkpoints_in=out))

        code = in_child(disturbed)
        assert code in (0, KILLED), code
        if (out / "fake").exists():
            counted = study_status(out / "fake") if any((out / "fake").iterdir()) else None
            assert counted is None or counted.owner is None
        assert in_child(partial(drive, out, FakeExecutor(checkpoints_in=out))) == 0
        check_complete(STUDY, out)
        if code == 0:
            print(f"{count - 1} crash points")
            return


def fill_disk(room: int) -> None:
    """Let writes to files fail as on a full disk after so many bytes, the last one half way."""

    def filling(call: Any) -> Any:
        def write(descriptor: int, data: bytes) -> int:
            nonlocal room
            if descriptor < 3:
                return int(call(descriptor, data))
            fits, room = min(room, len(data)), max(0, room - len(data))
            if fits == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(call(descriptor, data[:fits]))

        return write

    def flushing(call: Any) -> Any:
        def fsync(descriptor: int) -> None:
            nonlocal room
            if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
                room -= 20
                if room < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            call(descriptor)

        return fsync

    write_through_calls()
    os.write, os.fsync = filling(os.write), flushing(os.fsync)


def full_disk(folder: Path) -> None:
    """Fill the disk at every byte or so; the driver says so in one line, and with room again it goes on."""
    refused = 0
    for room in range(0, 12_000, 97):
        out = folder / str(room)

        def disturbed(room: int = room, out: Path = out) -> None:
            fill_disk(room)
            drive(out, FakeExecutor(checkpoints_in=out))

        code = in_child(disturbed)
        assert code in (0, 2), code
        refused += code == 2
        assert in_child(partial(drive, out, FakeExecutor(checkpoints_in=out))) == 0
        check_complete(STUDY, out)
    print(f"{refused} full disks")


def pair(out: Path) -> None:
    """Start two drivers on one fresh directory at the same moment: one works, the other leaves at once, naming it."""
    go, start = os.pipe()
    for _ in range(2):
        if os.fork() == 0:
            os.close(start)
            os.read(go, 1)  # until the parent closes its end
            code = 0
            try:
                drive(out, FakeExecutor(steps=1, step_s=1.0))
            except UserError as error:
                code = 2 if "another command works on this study, process " in str(error) else 3
            finally:
                os._exit(code)
    os.close(go)
    os.close(start)
    codes = [os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]) for _ in range(2)]
    assert codes == [2, 0], codes
    check_complete(STUDY, out)
    assert all(record.attempts == 1 for record in read_records(out))
    print("one winner")


if __name__ == "__main__":
    mode, where = sys.argv[1:]
    globals()[mode](Path(where))
