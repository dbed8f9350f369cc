"""Ranks that move between sites, on quantized weights: the sections `adalora` and `qa_lora` together."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_vit.backbones import BackboneShape
from peft_vit.config import ExperimentConfig, Frozen
from peft_vit.methods import adalora, qa_lora
from peft_vit.methods.method import Method, Preparation, Wishes
from peft_vit.training import Hook


def _prepare(model: nn.Module, experiment: ExperimentConfig, preparation: Preparation) -> list[Hook]:
    # Ranks first, since in `before_step` they are scored by what the trainer then scales.
    return [*adalora.prepare(model, experiment, preparation), qa_lora.trainer(model, experiment, preparation)]


def _check(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    qa_lora.check_packing(experiment, shape, total_steps, train_images, rank=0)
    adalora.check(experiment, shape, total_steps, train_images)


def _shorten(experiment: ExperimentConfig, total_steps: int, steps: int, every: int) -> dict[str, Frozen]:
    ranks = adalora.shorten(experiment, total_steps, steps, every)
    return {**ranks, **qa_lora.shorten(experiment, total_steps, steps, every)}


def _defaults(wishes: Wishes) -> dict[str, dict[str, Any]]:
    return {**adalora.defaults(wishes), "qa_lora": qa_lora.packed_by_default(wishes.shape)}


QA_ADALORA = Method(
    prepare=_prepare,
    check=_check,
    shorten=_shorten,
    defaults=_defaults,
    why_not_peft=("its adapter belongs to the quantized weights; PEFT would add it to the float ones, another model"),
)
