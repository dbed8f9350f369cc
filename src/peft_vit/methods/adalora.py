"""LoRA with ranks that move between sites under a budget (AdaLoRA, arXiv 2303.10512)."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_vit.allocation import AdaLoRAController, bounds_for, costs_for, largest_ranks, schedule_for
from peft_vit.backbones import BackboneShape
from peft_vit.config import AdaLoraConfig, ExperimentConfig, Frozen, QaLoraConfig
from peft_vit.methods.method import Method, PrepareContext, Wishes, sites_of
from peft_vit.training import AllocationHook, Hook


def settings_of(experiment: ExperimentConfig) -> tuple[AdaLoraConfig, int]:
    """Return the settings of adaptive ranks, and the inputs that adapters pool.

    On packed weights scale and targets are those of `qa_lora`.
    """
    settings, packing = experiment.need(AdaLoraConfig), experiment.section(QaLoraConfig)
    if packing is None:
        return settings, 1
    return settings.model_copy(update={"scale": packing.scale, "targets": packing.targets}), packing.pool


def prepare(model: nn.Module, experiment: ExperimentConfig, context: PrepareContext) -> list[Hook]:
    """Attach adapters whose ranks move, and return what moves them; on packed weights the trainer checks for effect."""
    (settings, pool), steps, seed = settings_of(experiment), context.total_steps, context.seed
    alone = experiment.section(QaLoraConfig) is None
    return [AllocationHook(AdaLoRAController(model, settings, steps, seed=seed, pool=pool, check=alone))]


def check(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    """Refuse a budget that does not fit the sites, or a schedule that does not fit the steps.

    Raises:
        UserError: with the setting, below the experiment.
    """
    settings, pool = settings_of(experiment)
    sites = sites_of("adalora", settings, shape)
    costs = costs_for(settings, sites, pool)
    bounds = bounds_for(settings, largest_ranks(sites, pool), costs)
    schedule_for(settings, total_steps, bounds, costs)


def shorten(experiment: ExperimentConfig, total_steps: int, steps: int, every: int) -> dict[str, Frozen]:
    """Return the section for fewer steps: each phase keeps its share."""
    settings, part = experiment.need(AdaLoraConfig), steps / total_steps
    final = total_steps // 4 if settings.final_steps is None else settings.final_steps
    final = min(round(part * final), steps - 1)
    short = {
        "final_steps": final,
        "update_frequency": max(every, round(part * settings.update_frequency)),
        "warmup_steps": min(max(1, round(part * settings.warmup_steps)), steps - final),
    }
    return {"adalora": settings.model_copy(update=short)}


_FEWEST_STEPS, _DECIDED_AFTER, _MEAN_RANK = 12, 16, 4  # of what `train` takes


def defaults(wishes: Wishes) -> dict[str, dict[str, Any]]:
    """Return mean rank 4 unless told otherwise, decided early, by magnitude.

    It is what was found to keep up with LoRA at its learning rate.
    """
    wishes.enough_steps(_FEWEST_STEPS)
    early = max(1, min(_DECIDED_AFTER, wishes.steps // 12))
    budget = "total_byte_budget" if wishes.budget_unit == "bytes" else "total_rank_budget"
    section = {
        budget: wishes.budget or _MEAN_RANK * len(wishes.shape.sites),
        "allocation_strategy": "global",
        "importance_metric": "magnitude",
        "update_frequency": early,
        "warmup_steps": early,
        "final_steps": wishes.steps - 2 * early,
    }
    return {"adalora": section}


ADALORA = Method(prepare=prepare, check=check, shorten=shorten, defaults=defaults, learning_rate=5e-4)
