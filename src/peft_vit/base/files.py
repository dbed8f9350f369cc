"""Files and folders that may come from anybody: read without waiting and up to a size, written without leaving.

A name in somebody's archive or results may be a pipe that never ends, a link that leads out, or a bomb.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path, PurePath

from peft_vit.base.errors import UserError, os_fault

_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,12})")
LARGEST_BYTES = 1 << 28  # of an image, a table or a record; far more than any real one
_TRIES, _PAUSE_S = 20, 0.05  # of a name that another program on Windows holds


def flags_here(*names: str) -> int:
    """Return those flags of `os.open` that this system has."""
    return sum(getattr(os, name, 0) for name in names)


def open_regular(file: str | Path) -> BufferedReader:
    """Open a file for reading, without waiting for it; links are followed.

    Raises:
        OSError: if it can't be read, is not a regular file (a pipe could wait for ever), or if its name is impossible;
            `strerror` says why.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | flags_here("O_NONBLOCK", "O_BINARY"))
    except ValueError:  # a NUL in its name
        raise OSError(errno.EINVAL, "impossible name", str(file)) from None
    try:
        require_regular(os.fstat(descriptor), file)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_bytes(file: str | Path, limit_bytes: int | None = LARGEST_BYTES) -> bytes:
    """Return a file's content.

    Args:
        file: its path; links are followed.
        limit_bytes: what it may hold at most; None: anything, for weights.

    Raises:
        OSError: as `open_regular`, and if it is larger; `strerror` says why.
    """
    with open_regular(file) as handle:
        if limit_bytes is not None and os.fstat(handle.fileno()).st_size > limit_bytes:
            raise OSError(errno.EFBIG, f"larger than {limit_bytes} bytes", str(file))
        return handle.read()


def sha256_of(file: str | Path) -> str:
    """Return the SHA-256 of a file's content as hex; raises OSError as `open_regular`."""
    with open_regular(file) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def require_regular(status: os.stat_result, file: str | Path) -> None:
    """Raise OSError if a file's status is not that of a regular file."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "a pipe, socket or device, not a regular file", str(file))


def folder_below(root: Path, relative: str) -> Path:
    """Return a folder below `root` that files may be written to; it need not exist.

    Raises:
        UserError: if a part of the path leads out, or is a link: what it leads to is not `root`'s.
    """
    path = PurePath(relative)
    if not path.parts or ".." in path.parts or "\0" in relative or path.anchor:
        raise UserError(f"{relative!r} leads out of it; nothing is written there", file=root)
    folder = root
    for part in path.parts:
        folder = folder / part
        if os.path.islink(folder):
            raise UserError("is a link, and results go into real folders only; put the folder itself here", file=folder)
    return folder


def refuse_existing(
    output: Path, *, is_folder: bool = False, overwrite: bool = False, marks: tuple[str, ...] = ()
) -> None:
    """Refuse to write where something is: a file, or a folder that holds anything.

    Args:
        output: the file or the folder that is to be written.
        is_folder: which of the two.
        overwrite: all the same, but no file instead of a folder or the other way round.
        marks: files of which a folder has to hold one, or it is not overwritten: somebody's own would be gone.

    Raises:
        UserError: if it is refused.
    """
    if not os.path.lexists(output):
        return
    fault = ""
    if os.path.isdir(output) != is_folder:
        fault = f"is a {'file' if is_folder else 'folder'}, which a {'folder' if is_folder else 'file'} can't replace"
    elif is_folder and not os.listdir(output):
        return
    elif not overwrite:
        fault = f"{'holds files' if is_folder else 'exists'} already; give another name, or --overwrite"
    elif marks and not any(os.path.lexists(output / mark) for mark in marks):
        fault = "holds files that no export has written, which --overwrite leaves alone"
    if fault:
        raise UserError(fault if "; " in fault else f"{fault}; give another name", file=output, field="--output")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a new folder that takes the target's name, and the place of what was there, once everything is written.

    If it can't take its place, what was there comes back.

    Raises:
        OSError: if it can't be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as place:
        made = Path(place, "new")
        made.mkdir()
        yield made
        before = Path(f"{place}.before")  # beside it: what is in it will be removed
        try:
            if os.path.lexists(target):
                take_name(target, before)
            take_name(made, target)
        except BaseException:  # Ctrl-C, too
            if os.path.lexists(before) and not os.path.lexists(target):
                before.rename(target)
            raise
        if os.path.lexists(before):
            before.rename(Path(place, "before"))


def flush(path: Path) -> None:
    """Flush a file to disk, or a folder's list of names, without which a new file may be lost with the power.

    Windows flushes no folders.
    """
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes what can be written
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems flush no folders
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder that may be there, with its parents, and flush them to disk."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        flush(place.parent)


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never half of it; flush it to disk."""
    make_folder(file.parent)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        take_name(temporary, file)
        flush(file.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def take_name(made: str | Path, target: Path) -> None:
    """Rename a file, also over another one, or a folder; a second's tries where another program may read it (Windows).

    Raises:
        OSError: if it can't be.
    """
    for _ in range(_TRIES if os.name == "nt" else 0):
        with suppress(PermissionError):
            os.replace(made, target)
            return
        time.sleep(_PAUSE_S)
    os.replace(made, target)


def write_whole(file: Path, content: bytes) -> None:
    """Replace a file as `write_atomically`; what has no room is reported in one line."""
    try:
        write_atomically(file, content)
    except OSError as error:
        reason = f"can't be written ({error.strerror}); nothing that was written is lost: make room, make it writable, "
        raise UserError(f"{reason}or close it elsewhere, and the same command continues", file=file) from None


def remove_any(path: Path) -> None:
    """Remove a folder, or whatever is in its place: of a link only the link, and a pipe is not waited for.

    What of a folder can't be removed stays: at worst some disk is in use.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def into_empty(folder: Path, field: str | None = None) -> Iterator[None]:
    """Make a folder to write into.

    Raises:
        UserError: if it holds files, or can't be written to.
    """
    with os_fault("can't be written to", folder, remedy="choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError("holds files already; choose another folder", file=folder, field=field)
        yield


def checkpoint_folders(run_folder: Path) -> dict[int, Path]:
    """Return the folders of the checkpoints that an interrupted run has left, by step; whole ones or not."""
    named = {path: _CHECKPOINT.fullmatch(path.name) for path in run_folder.glob("checkpoint-*")}
    return {int(match[1]): path for path, match in named.items() if match is not None}
