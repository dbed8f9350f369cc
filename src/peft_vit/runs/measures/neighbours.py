"""The distance of an image to those of training, computed with the model, and the file of their features.

The file, `features.safetensors` beside a run's record or in an exported folder, holds the arrays of
`statistics.Neighbours`: mean and spread, (D,) float32, and codes, (n, D) int8.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor, nn

from peft_vit.base.errors import UserError, os_fault
from peft_vit.base.files import read_bytes
from peft_vit.base.statistics import Neighbours
from peft_vit.base.statistics.neighbours import STEPS
from peft_vit.core.backbones import Backbone

_TYPES = {"mean": (np.float32, 1), "spread": (np.float32, 1), "codes": (np.int8, 2)}  # and dimensions


class WithDistance(nn.Module):
    """A model that also says how far its images are from known ones: `Neighbours.distances`, in torch."""

    def __init__(self, model: nn.Module, known: Neighbours) -> None:
        super().__init__()
        self.model = model
        self.mean, self.spread, self.codes = (nn.Buffer(torch.from_numpy(part)) for part in parts_of(known).values())
        self.squares = nn.Buffer((self.codes.float() / STEPS).square().sum(1))  # (n,)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map normalised images (B, 3, S, S) to logits (B, classes) and distances (B,)."""
        logits, middle = Backbone.within(self.model).logits_and_middle(images)
        z = (middle.float() - self.mean) / self.spread  # (B, D)
        squared = z.square().sum(1, keepdim=True) + self.squares - 2 * z @ (self.codes.float() / STEPS).T  # (B, n)
        return logits, (squared.amin(1).clamp(min=0) / z.shape[1]).sqrt()


def parts_of(known: Neighbours) -> dict[str, np.ndarray]:
    """Return the arrays by the names that files give them."""
    return {name: getattr(known, name) for name in _TYPES}


def neighbours_bytes(known: Neighbours) -> bytes:
    """Return the content of a file."""
    return save(parts_of(known))


def neighbours_from(parts: dict[str, np.ndarray], file: Path) -> Neighbours:
    """Return features out of arrays by name.

    Raises:
        UserError: if an array is missing, or of another type or shape, or no number.
    """
    fitting = parts.keys() == _TYPES.keys() and all(
        (parts[name].dtype, parts[name].ndim) == kind for name, kind in _TYPES.items()
    )
    if not fitting or len({part.shape[-1] for part in parts.values()}) > 1 or not len(parts["codes"]):
        raise UserError("holds no features of known images; export or rerun the run", file=file)
    if not (np.isfinite(parts["mean"]).all() and (parts["spread"] > 0).all()):
        raise UserError("holds features that are not numbers; export or rerun the run", file=file)
    return Neighbours(**parts)


def read_neighbours(file: Path) -> Neighbours:
    """Read a file.

    Raises:
        UserError: if it can't be read, or is damaged.
    """
    with os_fault("can't be read", file, remedy="export or rerun the run"):
        content = read_bytes(file, None)
    try:
        parts = load(content)
    except SafetensorError as error:
        raise UserError(f"is not a readable safetensors file ({error}); export or rerun the run", file=file) from None
    return neighbours_from(parts, file)
