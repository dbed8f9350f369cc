"""What this installation and this machine are, on one screen: to be read, and to be pasted into an issue."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from peft_vit.base.errors import printable
from peft_vit.base.extras import EXTRAS, missing_packages
from peft_vit.base.packages import cache_dir

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "huggingface_hub", "safetensors")
_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
_GB = 1e9


@dataclass(frozen=True)
class Entry:
    """One thing that was looked at; `is_fault`: nothing can be trained before it is repaired."""

    name: str
    text: str
    is_fault: bool = False

    def __str__(self) -> str:
        return printable(f"{self.name:<13} {self.text}")


def examine() -> Iterator[Entry]:
    """Look at versions, machine, cache and extras; what is unknown is a line that says so."""
    yield Entry("peft-vit", f"{metadata.version('peft-vit')}, {Path(__file__).parent}")
    yield Entry("Python", f"{platform.python_version()}, {sys.executable}")
    yield _packages()
    yield Entry("system", platform.platform())
    yield from _machine()
    yield _cache()
    missing = {name: missing_packages(name) for name in EXTRAS}
    yield Entry("extras", ", ".join(name for name in EXTRAS if not missing[name]) or "none")
    for name, packages in missing.items():
        if packages:
            yield Entry("", f"{name} needs {', '.join(packages)}; run: pip install 'peft-vit[{name}]'")


def _packages() -> Entry:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    text = ", ".join(f"{name} {version or 'is missing'}" for name, version in versions.items())
    is_fault = None in versions.values()
    return Entry("packages", f"{text}; run: pip install peft-vit" if is_fault else text, is_fault)


def _machine() -> Iterator[Entry]:
    try:
        import psutil
        import torch

        from peft_vit.runs.this_machine.machine import (
            bf16_support,
            cpu_count,
            instruction_sets,
            processor_name,
            resolve_device,
        )

        device = resolve_device("auto")
        of_gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
        memory = psutil.virtual_memory()
        yield Entry("device", f"auto is {device}{of_gpu}; {bf16_support(device).reason}")
        yield Entry("processor", f"{processor_name()}, {cpu_count()} usable of {os.cpu_count()}")
        kernels = torch.backends.cpu.get_cpu_capability()
        yield Entry("instructions", f"{', '.join(instruction_sets()) or 'unknown'}; PyTorch's kernels: {kernels}")
        limits = ", ".join(f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ)
        yield Entry("threads", f"{torch.get_num_threads()} in PyTorch; {limits or 'no limit is set'}")
        yield Entry("memory", f"{memory.total / _GB:.1f} GB, {memory.available / _GB:.1f} GB available")
    except Exception as error:  # a broken library can fail in any way, and this is where one looks then
        yield Entry("machine", f"unknown: {type(error).__name__}: {error}", is_fault=True)


def _cache() -> Entry:
    folder = cache_dir()
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    size = sum(file.stat().st_size for file in files)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    writable = "" if os.access(there, os.W_OK) else ", not writable: set PEFT_VIT_CACHE to a folder that is"
    free = shutil.disk_usage(there).free
    return Entry("cache", f"{folder}, {size / _GB:.2f} GB in {len(files)} files, {free / _GB:.0f} GB free{writable}")
