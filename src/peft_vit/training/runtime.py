"""Where a model runs, and training images to measure on there, beside those of the steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peft_vit.config import Precision
from peft_vit.data import Data


@dataclass(frozen=True)
class RuntimeConfig:
    """Where a model runs, and what images go through before it."""

    device: torch.device
    precision: Precision
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Calibration:
    """The training images of a run, in an order of their own and without flips."""

    data: Data
    runtime: RuntimeConfig
    seed: int

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the first ones (count, C, H, W), at most all, and their labels (count,), on the device."""
        rows = self.data.train.order(self.seed, 0)[:count]  # epochs count from 1
        chosen = self.data.train.chosen(rows)
        images, labels = next(chosen.ordered_batches(len(rows), self.runtime.mean, self.runtime.std))
        return images.to(self.runtime.device), labels.to(self.runtime.device)

    def images(self, count: int) -> Tensor:
        """Return the first ones without their labels."""
        return self.batch(count)[0]
