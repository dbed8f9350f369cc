"""What a model weighs, in float and in packed layers, and the memory of a run and of its process."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from safetensors.torch import save
from torch import Tensor, nn

from peft_vit.base.statistics.descriptive import grouped
from peft_vit.core.adapters import adapted_modules, packed_weights, site_adapters
from peft_vit.core.backbones import Backbone
from peft_vit.core.records import FloatPart, LayerSize, ModelSize


def trainable_parameters(model: nn.Module) -> int:
    """Count the values that the optimiser may change, on the live model."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def head_parameters(model: nn.Module) -> int:
    """Count the values of the classification head."""
    return sum(parameter.numel() for parameter in Backbone(model).head.parameters())


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages behind tensors."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def frozen_bytes(model: nn.Module) -> int:
    """Return the bytes of everything that is kept but not trained, packed weights with their scales included."""
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    for weight in packed_weights(model).values():
        frozen += weight.tensors().values()
    return storage_bytes(frozen)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the optimiser's state."""
    return storage_bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def model_size(model: nn.Module) -> ModelSize:
    """Count a low-bit model live and as a file, without adapters, with float copies that layers have beside codes."""
    adapters = {id(p) for adapter in site_adapters(model).values() for p in adapter.parameters()}
    buffers = dict(model.named_buffers())
    named = dict(model.named_parameters()) | buffers
    floats = {name: tensor for name, tensor in named.items() if id(tensor) not in adapters}
    by_part = grouped((_part(model, name, tensor), tensor) for name, tensor in floats.items())
    layers, merging_bytes, stored = {}, 0, dict(floats)
    for name, module in adapted_modules(model):
        if (weight := module.quantized) is None:
            continue
        tensors = weight.tensors()
        stored |= {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}
        layers[name] = LayerSize(
            weights=math.prod(weight.shape),
            codes_bytes=weight.codes.nbytes,
            scales_bytes=weight.scales.nbytes,
            offsets_bytes=tensors["offsets"].nbytes if "offsets" in tensors else 0,
        )
        if weight.offsets is None and any(adapter.pool > 1 and adapter.rank for _, adapter in module.adapters()):
            merging_bytes += weight.scales.nbytes
    computed = buffers.keys() - model.state_dict().keys()  # rotary embeddings, say
    in_file = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items() if name not in computed}
    num_floats = sum(tensor.numel() for name, tensor in floats.items() if name.removesuffix(".weight") not in layers)
    return ModelSize(
        weights=num_floats + sum(size.weights for size in layers.values()),
        layers=layers,
        float_bytes={part: storage_bytes(tensors) for part, tensors in by_part.items()},
        merging_bytes=merging_bytes,
        live_bytes=storage_bytes(stored.values()),
        file_bytes=len(save(in_file)),
    )


def _part(model: nn.Module, name: str, tensor: Tensor) -> FloatPart:
    """Return which part of the model a float tensor belongs to."""
    words = name.split(".")
    if any(tensor is parameter for parameter in Backbone(model).head.parameters()):
        return "head"
    if "patch_embed" in words:
        return "patch embedding"
    if "pos_embed" in words:
        return "position embedding"
    if isinstance(model.get_submodule(".".join(words[:-1])), nn.LayerNorm):
        return "norms"
    if words[-1].endswith("bias"):
        return "biases"
    return "matrices" if words[-1] == "weight" and tensor.ndim == 2 else "other"


def release_memory() -> None:
    """Give memory that is free, but kept for later, back to the system, where it takes it (Linux)."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory() -> None:
    """Give freed memory back and start a new peak, where the system can (Linux); elsewhere the peak only grows."""
    release_memory()
    if sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_bytes(b"5")  # resets VmHWM, see proc(5)


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process since `reset_peak_memory`, or since its start."""
    if (peak := _memory().get("VmHWM")) is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory_of(process: int) -> int:
    """Return the largest resident memory of another process since its start or reset; 0 where the system hides it."""
    return _memory(process).get("VmHWM", 0)


class MemoryWatch:
    """Watches a run's memory, in a process that may have done other runs before; begins with the object.

    A process keeps something of what it did: libraries with their tables, pages of files, buffers of kernels. So a
    run's own memory is counted from what was there when it began, and without pages of files: the system can take those
    back, and a worker's first run maps those of the libraries for all.
    """

    def __init__(self) -> None:
        reset_peak_memory()
        self._before = _memory().get("RssAnon")
        self._preparing = 0

    def prepared(self) -> None:
        """Take note that training is about to begin; what reading and quantizing left behind is given back."""
        self._preparing = peak_memory_bytes()
        reset_peak_memory()

    @property
    def peak_bytes(self) -> int:
        """Return the largest resident memory of the process so far, whatever it is made of."""
        return max(self._preparing, peak_memory_bytes())

    @property
    def own_bytes(self) -> int | None:
        """Return what the run has added to the process at most, since training began; the model is part of it.

        None where the system doesn't tell (anything but Linux).
        """
        now = _memory()
        if self._before is None or "RssAnon" not in now:
            return None
        return max(0, now["VmHWM"] - now["RssFile"] - now["RssShmem"] - self._before)


def _memory(process: int | None = None) -> dict[str, int]:
    """Return what Linux says of a process's resident memory in bytes, see proc(5); of Windows its peak, or nothing."""
    if sys.platform == "win32":
        with suppress(psutil.Error):
            return {"VmHWM": psutil.Process(process).memory_info().peak_wset}
    try:
        lines = Path(f"/proc/{'self' if process is None else process}/status").read_text("utf-8").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith(("VmHWM:", "Rss")))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}


def available_memory_bytes() -> int:
    """Return the memory that a new process could take without swapping."""
    return int(psutil.virtual_memory().available)
