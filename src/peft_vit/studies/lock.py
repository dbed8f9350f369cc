"""One process a study: an advisory lock that the kernel releases when its owner dies, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from peft_vit.errors import UserError
from peft_vit.records import make_folder
from peft_vit.records.owner import LOCK_FILE, Owner, read_owner

_PATIENCE_S = 0.5  # `owner_of` holds a lock for an instant, which must not turn a study away


@dataclass(frozen=True)
class StudyLock:
    """Proof that this process, and no other, may write to a study's folder."""

    folder: Path


@contextmanager
def study_lock(folder: Path) -> Iterator[StudyLock]:
    """Hold a study's lock; a folder that was made for it and holds nothing at the end goes away again.

    Args:
        folder: the study's; it and its parents are made if need be.

    Raises:
        UserError: if another process holds the lock, naming it, or if nothing can be written to the folder.
    """
    missing: list[Path] = []
    try:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        descriptor = _acquire(folder)
    except OSError as error:
        _remove_empty(missing)
        problem = f"can't be written to ({error.strerror}); make it writable or choose another --output"
        raise UserError(problem, file=folder) from None
    try:
        with _folder_held(folder):
            yield StudyLock(folder)
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)  # before others can hold it; they look for it again then
        _remove_empty(missing)
        os.close(descriptor)


@contextmanager
def _folder_held(folder: Path) -> Iterator[None]:
    """Lock the folder as well: somebody may remove the lock's file, and with it what keeps a second process away."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        problem = f"another command works on this study, whose {LOCK_FILE} was removed; wait for its end, or stop it"
        raise UserError(problem, file=folder) from None
    except OSError:  # NFS locks no folders
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _acquire(folder: Path) -> int:
    file = folder / LOCK_FILE
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            make_folder(folder)
            # Not inherited: a worker that outlives this process must not keep its lock.
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # the owner has just removed the folder that it made
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):  # it was just removed
                if os.path.samestat(os.fstat(descriptor), os.stat(file, follow_symlinks=False)):
                    _sign(descriptor)  # the one that others will find
                    return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                owner = read_owner(descriptor)
                os.close(descriptor)
                problem = f"another command works on this study, {owner}; wait for its end, or stop it"
                raise UserError(problem, file=folder) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.02)


def _sign(descriptor: int) -> None:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    since = datetime.now(UTC).isoformat(timespec="seconds")
    content = json.dumps(asdict(Owner(os.getpid(), socket.gethostname(), since, command))).encode() + b"\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # somebody else has put something there, or it was never made
            folder.rmdir()
