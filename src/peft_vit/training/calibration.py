"""Training images to measure on, beside those of the steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from peft_vit.data import Data
from peft_vit.training.runtime import RuntimeConfig


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
