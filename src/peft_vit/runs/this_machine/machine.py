"""The machine that a run is on and the code that it runs: device, precision, versions, source, hashes.

A CPU computes in bf16 with the instructions AVX512_BF16 or AMX (Intel 64 and IA-32 Architectures Software Developer's
Manual, volume 1); without them oneDNN, which computes PyTorch's products, emulates it, which costs more than it saves
(oneDNN developer guide, "Data Types"): a product in bf16 took 2.8 ms where fp32 took 10.4 and emulated bf16 62.
ONEDNN_MAX_CPU_ISA keeps it from newer instructions (the same, "CPU Dispatcher Control"). GPUs of NVIDIA compute in bf16
from compute capability 8.0, Ampere, on (CUDA C++ Programming Guide).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peft_vit.base.errors import UserError
from peft_vit.core.config import Library, Precision, PrecisionSetting

_PACKAGES = ("peft-vit", "torch", "torchvision", "timm", "numpy", "safetensors", "scikit-learn")
_CPUINFO = Path("/proc/cpuinfo")
_PROCESSOR_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # of Linux's control groups, version 2
_INSTRUCTIONS = {"avx512_bf16": "AVX512_BF16", "amx_bf16": "AMX"}  # as Linux spells them, and as people do
# Of those that speed up products of matrices.
_FASTER = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")
# Limits of oneDNN, by rising instructions, that leave out bf16 products; AVX2_VNNI_2 only converts from and to bf16.
_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


@dataclass(frozen=True)
class Bf16Support:
    """Whether a device computes in bf16; `reason` is a clause that says why, or why not."""

    native: bool
    reason: str


@dataclass(frozen=True)
class ChosenPrecision:
    """The precision of a study's runs.

    Attributes:
        chosen: what every run has.
        support: of bf16 on this machine's device.
        note: a line that says what `auto` became and why; None if the configuration named the precision.
    """

    chosen: Precision
    support: Bf16Support
    note: str | None

    @property
    def emulated(self) -> bool:
        """Return whether runs here take bf16 although the device is not known to compute in it."""
        return self.chosen == "bf16" and not self.support.native


def resolve_device(name: str) -> torch.device:
    """Return the device of a configuration; auto takes cuda, then mps, then cpu.

    Raises:
        UserError: if the named device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, present in there.items() if present)
    if not there[name]:
        raise UserError(f"{name} is not available on this machine; use auto or cpu", field="device")
    return torch.device(name)


def check_devices(count: int, device: str) -> None:
    """Refuse more processes at a time than there are GPUs, or processors where a configuration's device is a CPU.

    Raises:
        UserError: naming the setting.
    """
    kind = resolve_device(device).type
    there = torch.cuda.device_count() if kind == "cuda" else cpu_count()
    if count > max(1, there):
        what = "GPUs" if kind == "cuda" else "processors"
        reason = f"{count} are more than the {there} {what} of this machine"
        raise UserError(f"{reason}; lower it, or start the command by torchrun on several machines", field="devices")


def choose_precision(
    requested: PrecisionSetting, begun: PrecisionSetting | None, device: torch.device
) -> ChosenPrecision:
    """Return the precision of a study's runs.

    Args:
        requested: by the configuration.
        begun: with what the study was begun, maybe on another machine; auto continues with it. None: it is new.
        device: of the runs.
    """
    support = bf16_support(device)
    if requested != "auto":
        return ChosenPrecision(requested, support, None)
    here: Precision = "bf16" if support.native else "fp32"
    chosen: Precision = here if begun is None or begun == "auto" else begun
    if chosen == here:
        return ChosenPrecision(here, support, f"precision: auto is {here}: {support.reason}")
    note = f"precision: {chosen}, as the study was begun, though auto would be {here} here: {support.reason}"
    return ChosenPrecision(chosen, support, note)


def bf16_support(device: torch.device) -> Bf16Support:
    """Return whether a device computes in bf16; mps counts as no, since nothing of this package was tried there."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Bf16Support(True, f"{name} computes in bf16")
        return Bf16Support(False, f"{name} only emulates bf16, GPUs compute in it from Ampere on")
    if device.type != "cpu":
        return Bf16Support(False, f"bf16 is untried on {device.type}")
    native = [name for flag, name in _INSTRUCTIONS.items() if flag in _cpu_info("flags").split()]
    if not native:
        return Bf16Support(False, "this CPU has neither AVX512_BF16 nor AMX instructions")
    has = f"this CPU has {' and '.join(native)} instructions"
    limit = _onednn_limit()
    if limit.upper() in _WITHOUT_BF16:
        return Bf16Support(False, f"{has}, but ONEDNN_MAX_CPU_ISA={limit} leaves them out")
    return Bf16Support(True, has)


def instruction_limits() -> list[str]:
    """Return which instructions products are computed with here, beside the processor: PyTorch's, and oneDNN's limit.

    ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA keep them from others that the processor has, and sums round otherwise.
    """
    return [torch.backends.cpu.get_cpu_capability(), _onednn_limit().upper()]


def _onednn_limit() -> str:
    return os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")  # the second is its old name


def instruction_sets() -> list[str]:
    """Return which of the instructions for products of matrices this processor has, as Linux spells them."""
    return [flag for flag in _FASTER if flag in _cpu_info("flags").split()]


def _cpu_info(key: str) -> str:
    """Return what Linux says of the first processor; nothing elsewhere."""
    try:
        line = re.search(rf"^{key}\s*:(.*)$", _CPUINFO.read_text("utf-8"), re.MULTILINE)
    except OSError:
        return ""
    return "" if line is None else line[1].strip()


def package_versions(library: Library = "timm") -> dict[str, str]:
    """Return the installed version of each package that a result depends on; PEFT's where it is installed.

    Args:
        library: whose model it is. Of a run on timm's, transformers' version would only keep it from being pooled.
    """
    optional = ("peft",) if importlib.util.find_spec("peft") is not None else ()
    return {name: _version(name) for name in dict.fromkeys((*_PACKAGES, library, *optional))}


_version = functools.cache(metadata.version)  # which reads a file


def git_state(source: Path = Path(__file__)) -> tuple[str | None, bool | None]:
    """Return the commit of the source tree and whether it has changes; None where the source is in no repository.

    Installed inside somebody else's repository, say in its .venv, the package is not one of that repository's files.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=source.parent, capture_output=True, encoding="utf-8", check=True, timeout=10)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None


# As it was when this process first asked: a commit made since is not the code that runs.
loaded_git_state = functools.cache(git_state)


@functools.cache
def processor_name() -> str:
    """Return the processor's model name."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_count() -> int:
    """Return the number of processors that this process may use, also of a container that limits their time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # "200000 100000": microseconds in each period; "max 100000": no limit
        quota, period = map(int, _PROCESSOR_LIMIT.read_text("utf-8").split())
        count = min(count, -(-quota // period))
    return count


def hash_arrays(arrays: Iterable[np.ndarray | Tensor]) -> str:
    """Return the SHA-256 over shapes and values."""
    digest = hashlib.sha256()
    for array in arrays:
        values = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
        digest.update(f"{values.dtype}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
