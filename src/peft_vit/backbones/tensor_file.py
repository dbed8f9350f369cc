"""The tensors of a safetensors file, each read when it is asked for, so that they need not fit in memory together."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from peft_vit.errors import UserError
from peft_vit.safe_io import open_regular

_SMALLEST_MAPPED_BYTES = 1 << 20  # a mapping takes an open file; biases are copied


class TensorFile(Mapping[str, Tensor]):
    """Tensors by name, as the file holds them; nothing of them is kept here.

    A large float32 tensor is mapped into memory: what is read of it counts as memory until the tensor is freed, and
    writing to it does not change the file. Any other is a copy.

    Args:
        file: a safetensors file. While this is in use, it may not change.
        prefix: that all its names begin with, to be left out.

    Raises:
        safetensors.SafetensorError: if it is none, or not whole.
        UserError: when a tensor is asked for, if the file has changed since, or is gone.
    """

    def __init__(self, file: Path, prefix: str = "") -> None:
        self.file = file
        self._state = self._state_now()
        with safe_open(file, "pt"):
            pass  # it is whole
        with open_regular(file) as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        header.pop("__metadata__", None)
        self._start = 8 + size  # of the tensors' bytes
        self._entries = {name.removeprefix(prefix): (name, entry) for name, entry in header.items()}

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor on the CPU."""
        stored, entry = self._entries[name]
        try:
            changed = self._state_now() != self._state
        except OSError as error:
            raise UserError(f"can't be read any more ({error.strerror}); put it back", file=self.file) from None
        if changed:
            raise UserError("has changed since it was first read; leave it as it is during a study", file=self.file)
        start, end = (self._start + offset for offset in entry["data_offsets"])
        if entry["dtype"] != "F32" or start % 4 or end - start < _SMALLEST_MAPPED_BYTES:
            with safe_open(self.file, "pt") as opened:
                tensor: Tensor = opened.get_tensor(stored)
            return tensor.clone()
        before = start % mmap.ALLOCATIONGRANULARITY  # bytes of the first page that are another tensor's
        with open_regular(self.file) as file:  # what is mapped lives as long as the tensor
            mapped = mmap.mmap(file.fileno(), end - start + before, access=mmap.ACCESS_COPY, offset=start - before)
        return torch.frombuffer(mapped, dtype=torch.float32, offset=before).view(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self._entries)

    def _state_now(self) -> tuple[int, ...]:
        found = os.stat(self.file)
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
