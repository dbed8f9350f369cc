"""What a reader needs to repeat a run: versions, source, machine, hashes."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import numpy as np
from torch import Tensor

from peft_vit.config import Library

_PACKAGES = ("peft-vit", "torch", "torchvision", "timm", "numpy", "safetensors", "scikit-learn")


def package_versions(library: Library = "timm") -> dict[str, str]:
    """Return the installed version of each package that a result depends on; PEFT's where it is installed.

    Args:
        library: whose model it is. Of a run on timm's, transformers' version would only keep it from being pooled.
    """
    optional = ("peft",) if importlib.util.find_spec("peft") is not None else ()
    return {name: metadata.version(name) for name in dict.fromkeys((*_PACKAGES, library, *optional))}


def git_state(source: Path = Path(__file__)) -> tuple[str | None, bool | None]:
    """Return the commit of the source tree and whether it has changes; None where the source is in no repository.

    Installed inside somebody else's repository, say in its .venv, the package is not one of that repository's files.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None


@functools.cache
def loaded_git_state() -> tuple[str | None, bool | None]:
    """Return `git_state` as it was when this process first asked: a commit made since is not the code that runs."""
    return git_state()


@functools.cache
def processor_name() -> str:
    """Return the processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_count() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hash_arrays(arrays: Iterable[np.ndarray | Tensor]) -> str:
    """Return the SHA-256 over shapes and values."""
    digest = hashlib.sha256()
    for array in arrays:
        values = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
        digest.update(f"{values.dtype}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
