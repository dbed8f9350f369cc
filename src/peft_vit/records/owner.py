"""Who works on a study at present, as its lock says; the lock itself is taken by what runs studies.

The lock is the kernel's: a killed process holds none, and asking writes nothing, also where nothing can be written. So
it is no `filelock`, which is asked by taking it, and makes the file.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

LOCK_FILE = "lock"
_MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, as it said itself; nothing is known of one that died while it wrote."""

    pid: int | None = None
    host: str = "?"
    since: str = "?"
    command: str = "?"

    def __str__(self) -> str:
        if self.pid is None:
            return "a process that has not said its name"
        return f"process {self.pid} on {self.host} since {self.since}: {self.command}"

    def began(self, at: str) -> bool:
        """Tell whether what was begun at that time is this owner's, and not of one that died."""
        try:
            return datetime.fromisoformat(at) >= datetime.fromisoformat(self.since)
        except (ValueError, TypeError):
            return True


def owner_of(folder: Path) -> Owner | None:
    """Return who works on a study at present; None if nobody does. Writes nothing."""
    try:
        import fcntl
    except ImportError:  # studies run on POSIX systems; elsewhere are copies of them, on which nobody works
        return None
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return read_owner(descriptor)
    except OSError:  # a file system without locks, on which nobody can hold one
        return None
    finally:
        os.close(descriptor)


def read_owner(descriptor: int) -> Owner:
    """Return what the owner of an open lock file has written into it."""
    try:
        data: Any = json.loads(os.pread(descriptor, _MAX_BYTES, 0))
        pid, texts = data["pid"], [str(data[name]) for name in ("host", "since", "command")]
        return Owner(pid, *(" ".join(text.split())[:500] for text in texts)) if isinstance(pid, int) else Owner()
    except (ValueError, TypeError, KeyError, RecursionError):
        return Owner()
