"""Commands as on Windows, as far as this machine can play it, in their processes too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Other libraries do what they do: they are imported before.
_SITE = r"""
import errno, importlib.abc, os, signal, stat, sys, types, warnings
class Windows(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "peft_vit":
            sys.meta_path.remove(self)
            begin()
sys.meta_path.insert(0, Windows())

def begin():
    import asyncio, ctypes, fcntl, multiprocessing.popen_spawn_posix, numpy, psutil, subprocess, tempfile, uuid, zipfile
    {imports}
    warnings.filterwarnings("error", category=EncodingWarning, module=r"peft_vit\.")
    real = vars(os).copy()
    def held(path, folder=None):
        place = real["path"].join("" if folder is None else os.readlink(f"/proc/self/fd/{{folder}}"), path)
        opened = {{os.readlink(f"/proc/self/fd/{{name}}") for name in os.listdir("/proc/self/fd") if name != "3"
                  and os.path.lexists(f"/proc/self/fd/{{name}}")}}
        mapped = {{line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps", encoding="utf-8")}}
        if os.path.realpath(place) in opened | mapped and not os.path.isdir(place):
            raise PermissionError(errno.EACCES, "in use", path)
    def unlink(path, *, dir_fd=None):
        held(path, dir_fd)
        real["unlink"](path, dir_fd=dir_fd)
    def replace(path, other, **places):
        if os.path.isdir(other) or os.path.islink(other):
            raise PermissionError(errno.EACCES, "is there", other)
        held(path), held(other)
        real["replace"](path, other, **places)
    os.unlink = os.remove = unlink
    os.replace = os.rename = replace
    def open_file(path, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "a folder", path)
        return real["open"](path, *arguments, **options)
    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "can't be written")
        real["fsync"](descriptor)
    def locking(descriptor, mode, count):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "locked") from None
    def leave(module, names, **instead):
        left = types.ModuleType(module.__name__)
        vars(left).update({{k: v for k, v in vars(module).items() if k not in names}} | instead)
        sys.modules[module.__name__] = left
    leave(os, "O_ACCMODE O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK fork getuid killpg mkfifo pread pwrite "
          "sched_getaffinity setsid symlink uname".split(), name="nt", open=open_file, fsync=fsync)
    leave(signal, "SIGALRM SIGHUP SIGPIPE SIGUSR1 pthread_sigmask".split())
    for name in ("fcntl", "grp", "pwd", "resource", "syslog", "termios"):
        sys.modules[name] = None
    sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
"""
_CODE = """
import shlex, sys
from peft_vit.cli import main
for call in sys.argv[2:]:
    try:
        main(shlex.split(call))
    except SystemExit as ended:
        assert not ended.code, (call, ended.code)
assert not {*sys.argv[1].split()} & set(sys.modules), "imported on the way"
"""


def without_posix(folder: Path, imports: str = "") -> dict[str, str]:
    """Return an environment in which `peft_vit` finds no `fcntl` and the like.

    Text is written as a console of Windows takes it, and a file opened without an encoding is an error.

    Args:
        folder: an empty one, for what brings it about.
        imports: a line that imports other libraries first.
    """
    (folder / "sitecustomize.py").write_text(_SITE.format(imports=imports))
    encodings = {"PYTHONIOENCODING": "cp1252", "PYTHONWARNDEFAULTENCODING": "1", "PYTHONUTF8": "0"}
    places = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {**os.environ, **encodings, "PYTHONPATH": places}


def run_without_posix(folder: Path, *calls: str, imports: str = "", absent: Sequence[str] = ()) -> str:
    """Call `peft-vit` in one process, see `without_posix`, and return what it printed.

    Args:
        folder: see there.
        calls: of the command, each its arguments.
        imports: see there.
        absent: modules that it must not have imported.
    """
    command = [sys.executable, "-c", _CODE, " ".join(absent), *calls]
    ended = subprocess.run(command, check=False, capture_output=True, env=without_posix(folder, imports))
    assert not ended.returncode, ended.stderr.decode() + ended.stdout.decode("cp1252")
    return ended.stdout.decode("cp1252")
