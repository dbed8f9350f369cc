"""Tuners of the PEFT library: any that takes the model (`peft`), LoRA (`peft_lora`) and AdaLoRA (`peft_adalora`).

The library is an extra, and imported only when a run needs it.
"""

from __future__ import annotations

from torch import nn

from peft_vit.base.errors import UserError
from peft_vit.base.extras import require_extra
from peft_vit.core.adapters.peft_tuner import attach_peft, attach_peft_lora, tuner_config
from peft_vit.core.backbones import BackboneShape
from peft_vit.core.config import ExperimentConfig, Frozen, PeftAdaLoraConfig, PeftConfig, PeftLoraConfig
from peft_vit.core.methods.method import DEFAULT_RANK, Method, PrepareContext, Sections, TrainOptions, sites_of
from peft_vit.core.training import Hook, PeftAdaLoraHook, check_ranks, last_update

# Time of a step by the PEFT library over that of ours, fp32, ViT-S/14 at 112 px, rank 8 on all six matrices, and
# AdaLoRA 12 -> 8 with its penalty and its allocation; PEFT 0.21.2, the allocator's defaults.
_LORA_OVER_OURS, _ADALORA_OVER_OURS = 1.42 / 1.29, 1.81 / 1.29
_CALIBRATION_IMAGES = 64  # for a start that depends on data


def _prepare_lora(model: nn.Module, experiment: ExperimentConfig, context: PrepareContext) -> list[Hook]:
    attach_peft_lora(model, experiment.need(PeftLoraConfig), seed=context.seed)
    return []


def _check_lora(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    require_extra("peft", field="method")
    settings = experiment.need(PeftLoraConfig)
    check_ranks(sites_of("peft_lora", settings, shape, modules=True), settings.rank, field="peft_lora.rank")


PEFT_LORA = Method(
    prepare=_prepare_lora,
    check=_check_lora,
    defaults=lambda options: {"peft_lora": {"rank": options.rank or DEFAULT_RANK}},
    learning_rate=5e-4,
    forward_passes=2 * _LORA_OVER_OURS,
    uses_peft=True,
)


def _prepare_adalora(model: nn.Module, experiment: ExperimentConfig, context: PrepareContext) -> list[Hook]:
    settings = experiment.need(PeftAdaLoraConfig)
    return [PeftAdaLoraHook(model, settings, context.total_steps, seed=context.seed)]


def _check_adalora(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    require_extra("peft", field="method")
    settings = experiment.need(PeftAdaLoraConfig)
    sites = sites_of("peft_adalora", settings, shape, modules=True)
    check_ranks(sites, settings.initial_rank, field="peft_adalora.initial_rank")
    last_update(settings, total_steps)


def _shorten_adalora(experiment: ExperimentConfig, total_steps: int, steps: int, every: int) -> dict[str, Frozen]:
    settings = experiment.need(PeftAdaLoraConfig)
    part = steps / total_steps
    final = min(round(part * (total_steps - last_update(settings, total_steps))), steps - 3)
    warmup = min(max(1, round(part * settings.warmup_steps)), steps - final - 2)
    short = {"final_steps": final, "update_frequency": 1, "warmup_steps": warmup}
    return {"peft_adalora": settings.model_copy(update=short)}


def _adalora_defaults(options: TrainOptions) -> Sections:
    options.check_steps()
    return {
        "peft_adalora": {"update_frequency": max(1, options.steps // 8), "warmup_steps": max(1, options.steps // 4)}
    }


PEFT_ADALORA = Method(
    prepare=_prepare_adalora,
    check=_check_adalora,
    shorten=_shorten_adalora,
    defaults=_adalora_defaults,
    learning_rate=5e-3,
    forward_passes=2 * _ADALORA_OVER_OURS,
    uses_peft=True,
)


def _prepare(model: nn.Module, experiment: ExperimentConfig, context: PrepareContext) -> list[Hook]:
    config = experiment.need(PeftConfig)
    images = None if context.calibration is None else context.calibration(_CALIBRATION_IMAGES)
    attach_peft(model, config.type, config.settings, seed=context.seed, images=images, ranks=context.module_ranks)
    return []


def _check(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    config = experiment.need(PeftConfig)
    if config.type == "adalora":
        raise UserError("moves ranks after each step; use method: peft_adalora, which does it", field="peft.type")
    tuner_config(config.type, config.settings, shape.sites)


PEFT = Method(
    prepare=_prepare,
    check=_check,
    defaults=lambda options: {"peft": {"type": "dora", "r": options.rank or DEFAULT_RANK}},
    learning_rate=5e-4,
    forward_passes=2 * _LORA_OVER_OURS,
    uses_peft=True,
)
