"""What is kept of something that is to go on later, in a form that files can hold."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """What a part of a run needs to go on from between two steps.

    Attributes:
        tensors: by name. They may be the living ones, so they are good until the next step.
        values: plain values, ready for JSON.
        source: the checkpoint that it was read from, for errors.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None

    @classmethod
    def of_parts(cls, **parts: State) -> State:
        """Return one state that holds several, each under its name."""
        tensors = {f"{name}/{key}": tensor for name, part in parts.items() for key, tensor in part.tensors.items()}
        return cls(tensors, {name: part.values for name, part in parts.items()})

    def part(self, name: str) -> State:
        """Return one of the states that `of_parts` was given."""
        prefix = f"{name}/"
        tensors = {key.removeprefix(prefix): one for key, one in self.tensors.items() if key.startswith(prefix)}
        return State(tensors, self.values[name], self.source)

    def sha256(self) -> str:
        """Return the SHA-256 of all names, types, shapes and values, whatever their order and the tensors' layout."""
        digest = hashlib.sha256(json.dumps(self.values, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            dense = tensor.detach().cpu().contiguous()
            flat = dense.as_strided((dense.numel(),), (1,))  # where a size is 1, any stride counts as contiguous
            digest.update(flat.view(torch.uint8).numpy().data)  # numpy knows no bfloat16
        return digest.hexdigest()
