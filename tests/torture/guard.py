"""Tells what a process does beyond its place: programs that it starts, addresses that it asks, files that it writes.

It also tells what is unpickled.

Python reports these as audit events (docs.python.org/3/library/audit_events.html), whoever causes them, so nothing that
a file talks the package into goes unseen. A hook can't be taken out again: use it in processes made for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_STARTS = {
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.system",
    "pty.spawn",
    "subprocess.Popen",
    "os.exec",
    "os.spawn",
}
_ASKS = {"socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request"}
_CHANGED = ("os.chmod", "os.chown", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
# Events and which of their arguments are files that change.
_CHANGES = dict.fromkeys(_CHANGED, (0,)) | {"os.link": (1,), "os.symlink": (1,), "os.rename": (0, 1)}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What Python and its libraries start and write by themselves, whatever file is read.
_PROGRAMS = {"fc-list", "git", "ldconfig", "uname"}
_PLACES = ("/dev/null", "/dev/shm/")
_OWN_STATE = "/proc/self/clear_refs"  # where the package sets its peak memory back


def install(allowed: Sequence[Path], report: Callable[[str], None]) -> None:
    """Report, from now on, whatever this process does outside of some folders.

    Args:
        allowed: folders that may be written to.
        report: told each of it as one line.
    """
    watched = {*_ASKS, "pickle.find_class"}
    roots = tuple(os.path.realpath(root) + os.sep for root in allowed)
    busy = False

    def is_outside(path: object) -> bool:
        if isinstance(path, int) or path is None or path == _OWN_STATE:  # a descriptor: opening it was judged
            return False
        place = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        return not f"{place}{os.sep}".startswith(roots) and not place.startswith(_PLACES)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal busy
        if busy or (event != "open" and event not in _STARTS and event not in watched and event not in _CHANGES):
            return
        busy = True
        try:
            if event == "open":
                path, _, flags = arguments
                bad = isinstance(flags, int) and bool(flags & _WRITING) and is_outside(path)
            elif event in _CHANGES:
                bad = any(is_outside(arguments[index]) for index in _CHANGES[event])
            else:
                bad = event in watched or os.path.basename(str(arguments[0] if arguments else "")) not in _PROGRAMS
            if bad:
                report(f"{event} {arguments!r}"[:500])
        finally:
            busy = False

    sys.addaudithook(hook)
