"""What a model weighs: parameters, bytes of live storages, and the process's largest resident memory."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from peft_vit.adapters import adapted_modules


def trainable_parameters(model: nn.Module) -> int:
    """Count the values that the optimiser may change, on the live model."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def head_parameters(model: nn.Module) -> int:
    """Count the values of the classification head."""
    head: nn.Module = model.get_classifier()  # type: ignore[operator]
    return sum(parameter.numel() for parameter in head.parameters())


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages behind tensors."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def frozen_bytes(model: nn.Module) -> int:
    """Return the bytes of everything that is kept but not trained, packed weights with their scales included."""
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    for _, module in adapted_modules(model):
        if module.quantized is not None:
            frozen += module.quantized.tensors().values()
    return storage_bytes(frozen)


def trainable_bytes(model: nn.Module) -> int:
    """Return the bytes of the trainable parameters."""
    return storage_bytes(p for p in model.parameters() if p.requires_grad)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the optimiser's state."""
    return storage_bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def reset_peak_memory() -> None:
    """Give freed memory back and start a new peak, where the system can (Linux); elsewhere the peak only grows."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        except OSError:
            return


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process since `reset_peak_memory`, or since its start."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def available_memory_bytes() -> int:
    """Return the memory that a new process could take without swapping."""
    return int(psutil.virtual_memory().available)
