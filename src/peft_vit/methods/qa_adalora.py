"""Ranks that move between sites, on quantized weights: the sections `adalora` and `qa_lora` together."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_vit.backbones import BackboneShape
from peft_vit.config import AdaLoraConfig, ExperimentConfig, Frozen, QaLoraConfig
from peft_vit.methods import adalora, qa_lora
from peft_vit.methods.method import Method, Preparation, Wishes
from peft_vit.training import Hook


def pooled(experiment: ExperimentConfig) -> tuple[AdaLoraConfig, int]:
    """Return the settings of adaptive ranks with scale and targets of `qa_lora`, and the inputs that adapters pool."""
    settings, packing = experiment.need(AdaLoraConfig), experiment.need(QaLoraConfig)
    return settings.model_copy(update={"scale": packing.scale, "targets": packing.targets}), packing.pool


def _prepare(model: nn.Module, experiment: ExperimentConfig, preparation: Preparation) -> list[Hook]:
    settings, pool = pooled(experiment)
    # First, since in `before_step` it scores what the trainer then scales.
    allocation = adalora.controller_hook(model, settings, preparation, pool=pool, check=False)  # the trainer does
    return [allocation, qa_lora.trainer(model, experiment, preparation)]


def _check(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    qa_lora.check_packing(experiment, shape, total_steps, train_images, rank=0)
    adalora.check_course(*pooled(experiment), shape, total_steps)


def _shorten(experiment: ExperimentConfig, total_steps: int, steps: int, every: int) -> dict[str, Frozen]:
    settings = adalora.shortened(experiment.need(AdaLoraConfig), total_steps, steps, every)
    return {"adalora": settings, **qa_lora.shorten(experiment, total_steps, steps, every)}


def _defaults(wishes: Wishes) -> dict[str, dict[str, Any]]:
    return {**adalora.defaults(wishes), "qa_lora": qa_lora.packed_by_default(wishes.shape)}


QA_ADALORA = Method(
    prepare=_prepare,
    check=_check,
    shorten=_shorten,
    defaults=_defaults,
    size_options=("budget",),
    why_not_peft=("its adapter belongs to the quantized weights; PEFT would add it to the float ones, another model"),
)
