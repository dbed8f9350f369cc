"""What is measured once, before or after training, on training images alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from peft_vit.backbones import Weights, load_run_backbone
from peft_vit.config import BackboneConfig, ExperimentConfig, QaLoraConfig
from peft_vit.data import Data
from peft_vit.records import RunSpec, StepRow
from peft_vit.training import ChosenBits, RuntimeConfig, allocate_bits, class_weights


def calibration_batch(data: Data, setting: RuntimeConfig, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the first training images in an order of their own, without flips, and their labels, on the device."""
    rows = data.train.order(seed, 0)[:count]  # epochs count from 1
    images, labels = next(data.train.chosen(rows).ordered_batches(len(rows), setting.mean, setting.std))
    return images.to(setting.device), labels.to(setting.device)


def choose_bits(
    model: nn.Module, experiment: ExperimentConfig, data: Data, setting: RuntimeConfig, seed: int
) -> tuple[ChosenBits | None, dict[str, float]]:
    """Choose the bits of each layer of a plain model, if the method leaves them to `adaptive_bits`.

    Returns:
        What was chosen, None without `adaptive_bits`; and its seconds by purpose.
    """
    config = experiment.section(QaLoraConfig)
    if config is None or config.adaptive_bits is None:
        return None, {}
    started = time.perf_counter()
    images, labels = calibration_batch(data, setting, seed, config.adaptive_bits.calibration_images)
    chosen = allocate_bits(model, config, images, labels, seed=seed)
    return chosen, {"bit_allocation": time.perf_counter() - started}


@dataclass(frozen=True)
class OfTraining:
    """What a run lets its hooks use once training is over, see `training.AfterTraining`."""

    spec: RunSpec
    data: Data
    setting: RuntimeConfig
    read: Callable[[BackboneConfig], Weights]
    steps: Sequence[StepRow]

    @property
    def class_weights(self) -> Tensor | None:
        """Return the loss's weights (classes,), None if all are 1."""
        if not self.spec.experiment.training.class_weights:
            return None
        return class_weights(self.data.train.labels, len(self.data.class_names)).to(self.setting.device)

    def calibration_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the first training images in an order of their own, and their labels, on the device."""
        return calibration_batch(self.data, self.setting, self.spec.seed, count)

    def float_weights(self) -> Mapping[str, Tensor]:
        """Return the weights as the backbone was loaded: those of the run may have been dropped."""
        return load_run_backbone(self.spec, len(self.data.class_names), self.read).model.state_dict()
