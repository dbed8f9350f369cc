"""What is measured once after training, on training images alone."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import nn

from peft_vit.allocation import check_fisher
from peft_vit.config import TrainingConfig
from peft_vit.data import Data, LabelledImages
from peft_vit.records import FisherCheck
from peft_vit.training import AllocationHook, Setting, StepHook, class_weights

_IMAGES = 32


def calibrate_fisher(
    hooks: Sequence[StepHook], model: nn.Module, data: Data, config: TrainingConfig, setting: Setting, seed: int
) -> tuple[FisherCheck | None, dict[str, float]]:
    """Compare the score `fisher` with the empirical Fisher, if ranks were decided by it.

    The images are the first 32 of the training split in an order of their own, as they are, without flips.

    Returns:
        The comparison, None for any other metric; and its seconds by purpose.
    """
    if not any(
        isinstance(one, AllocationHook) and one.controller.config.importance_metric == "fisher" for one in hooks
    ):
        return None, {}
    started = time.perf_counter()
    rows = data.train.order(seed, 0)[:_IMAGES]  # epochs count from 1
    chosen = LabelledImages(data.train.pixels[rows], data.train.labels[rows])
    images, labels = next(chosen.ordered_batches(len(rows), setting.mean, setting.std))
    weights = class_weights(data.train.labels, len(data.class_names)) if config.class_weights else None
    check = check_fisher(
        model, images.to(setting.device), labels.to(setting.device),
        class_weights=None if weights is None else weights.to(setting.device),
    )  # fmt: skip
    return check, {"fisher_check": time.perf_counter() - started}
