"""Bits that are chosen before training, on training images alone."""

from __future__ import annotations

from torch import nn

from peft_vit.config import QaLoraConfig
from peft_vit.records import RunSpec
from peft_vit.runs.resume import Attempt
from peft_vit.training import Calibration, ChosenBits, allocate_bits


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
