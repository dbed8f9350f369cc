"""What is measured once, before or after training, on training images alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from peft_vit.allocation import check_fisher
from peft_vit.backbones import Weights, load_run_backbone, read_weights
from peft_vit.config import BackboneConfig, ExperimentConfig, TrainingConfig
from peft_vit.data import Data
from peft_vit.records import FisherCheck, RunSpec
from peft_vit.training import AllocationHook, ChosenBits, QALoRATrainer, Setting, StepHook, allocate_bits, class_weights

_IMAGES = 32  # of a calibration batch


def calibration_batch(data: Data, setting: Setting, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the first training images in an order of their own, without flips, and their labels, on the device."""
    rows = data.train.order(seed, 0)[:count]  # epochs count from 1
    images, labels = next(data.train.chosen(rows).ordered_batches(len(rows), setting.mean, setting.std))
    return images.to(setting.device), labels.to(setting.device)


def choose_bits(
    model: nn.Module, experiment: ExperimentConfig, data: Data, setting: Setting, seed: int
) -> tuple[ChosenBits | None, dict[str, float]]:
    """Choose the bits of each layer of a plain model, if the method leaves them to `adaptive_bits`.

    Returns:
        What was chosen, None without `adaptive_bits`; and its seconds by purpose.
    """
    config = experiment.qa_lora
    if config is None or config.adaptive_bits is None:
        return None, {}
    started = time.perf_counter()
    images, labels = calibration_batch(data, setting, seed, config.adaptive_bits.calibration_images)
    chosen = allocate_bits(model, config, images, labels, seed=seed)
    return chosen, {"bit_allocation": time.perf_counter() - started}


def measure_balance(
    trainer: QALoRATrainer,
    model: nn.Module,
    data: Data,
    spec: RunSpec,
    setting: Setting,
    read: Callable[[BackboneConfig], Weights] = read_weights,
) -> dict[str, float]:
    """Measure the balance of quantization and adaptation; the trainer keeps it.

    The float weights are gone by then: they are taken from where the backbone's came from.

    Args:
        trainer: of the run.
        model: as it was trained.
        data: of the run.
        spec: of the run.
        setting: of the run.
        read: gets the backbone's weights, see `load_backbone`.

    Returns:
        Its seconds by purpose.
    """
    started = time.perf_counter()
    floats = load_run_backbone(spec, len(data.class_names), read).model.state_dict()
    images, _ = calibration_batch(data, setting, spec.seed, _IMAGES)
    trainer.validate_quantization_adaptation_balance(model, reference=floats, images=images)
    return {"balance": time.perf_counter() - started}


def calibrate_fisher(
    hooks: Sequence[StepHook], model: nn.Module, data: Data, config: TrainingConfig, setting: Setting, seed: int
) -> tuple[FisherCheck | None, dict[str, float]]:
    """Compare the score `fisher` with the empirical Fisher, if ranks were decided by it.

    Returns:
        The comparison, None for any other metric; and its seconds by purpose.
    """
    if not any(
        isinstance(one, AllocationHook) and one.controller.config.importance_metric == "fisher" for one in hooks
    ):
        return None, {}
    started = time.perf_counter()
    images, labels = calibration_batch(data, setting, seed, _IMAGES)
    weights = class_weights(data.train.labels, len(data.class_names)) if config.class_weights else None
    check = check_fisher(model, images, labels, class_weights=None if weights is None else weights.to(setting.device))
    return check, {"fisher_check": time.perf_counter() - started}
