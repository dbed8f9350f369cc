"""What is measured on training images alone: bits before training, and what hooks ask for after it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from peft_vit.config import QaLoraConfig
from peft_vit.data import Data
from peft_vit.records import RunSpec
from peft_vit.runs.resume import Attempt
from peft_vit.training import ChosenBits, RuntimeConfig, allocate_bits


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


def choose_bits(model: nn.Module, spec: RunSpec, attempt: Attempt, calibration: Calibration) -> ChosenBits | None:
    """Choose the bits of each layer of a plain model, if the method leaves them to `adaptive_bits`.

    What an earlier attempt has chosen is chosen again.
    """
    config = spec.experiment.section(QaLoraConfig)
    if config is None or config.adaptive_bits is None:
        return None
    if attempt.known.bit_allocation is not None:
        return ChosenBits.of_record(attempt.known.bit_allocation, config)
    with attempt.overhead.of("bit_allocation"):
        images, labels = calibration.batch(config.adaptive_bits.calibration_images)
        chosen = allocate_bits(model, config, images, labels, seed=spec.seed)
    attempt.known.bit_allocation = chosen.record
    return chosen
