"""LoRA with ranks that move between sites under a budget (AdaLoRA, arXiv 2303.10512)."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_vit.allocation import AdaLoRAController, bounds_for, costs_for, schedule_for
from peft_vit.backbones import BackboneShape
from peft_vit.config import AdaLoraConfig, ExperimentConfig, Frozen
from peft_vit.methods.method import Method, Preparation, Wishes, sites_of
from peft_vit.training import AllocationHook, Hook


def check_course(settings: AdaLoraConfig, pool: int, shape: BackboneShape, total_steps: int) -> None:
    """Refuse a budget that does not fit the sites, whose adapters sum `pool` inputs, or a schedule the steps.

    Raises:
        UserError: with the setting, below the experiment.
    """

    sites = sites_of("adalora", settings, shape)
    shapes = [(site.in_features // pool, site.out_features) for site in sites]
    costs = costs_for(settings, shapes, [site.tokens for site in sites])
    bounds = bounds_for(settings, [min(sides) for sides in shapes], costs)
    schedule_for(settings, total_steps, bounds, costs)


def controller_hook(
    model: nn.Module, settings: AdaLoraConfig, preparation: Preparation, *, pool: int = 1, check: bool = True
) -> Hook:
    """Attach adapters whose ranks move, and return what moves them; check that they have an effect."""

    steps, seed = preparation.total_steps, preparation.seed
    return AllocationHook(AdaLoRAController(model, settings, steps, seed=seed, pool=pool, check=check))


def shortened(settings: AdaLoraConfig, total_steps: int, steps: int, every: int) -> AdaLoraConfig:
    """Return the settings for fewer steps: each phase keeps its share."""
    part = steps / total_steps
    final = total_steps // 4 if settings.final_steps is None else settings.final_steps
    final = min(round(part * final), steps - 1)
    return settings.model_copy(
        update={
            "final_steps": final,
            "update_frequency": max(every, round(part * settings.update_frequency)),
            "warmup_steps": min(max(1, round(part * settings.warmup_steps)), steps - final),
        }
    )


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


def _prepare(model: nn.Module, experiment: ExperimentConfig, preparation: Preparation) -> list[Hook]:
    return [controller_hook(model, experiment.need(AdaLoraConfig), preparation)]


def _check(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    check_course(experiment.need(AdaLoraConfig), 1, shape, total_steps)


def _shorten(experiment: ExperimentConfig, total_steps: int, steps: int, every: int) -> dict[str, Frozen]:
    return {"adalora": shortened(experiment.need(AdaLoraConfig), total_steps, steps, every)}


ADALORA = Method(
    prepare=_prepare, check=_check, shorten=_shorten, defaults=defaults, learning_rate=5e-4, size_options=("budget",)
)
