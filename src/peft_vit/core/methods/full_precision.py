"""Methods on float weights: the linear probe, full fine-tuning, LoRA (arXiv 2106.09685), AdaLoRA (arXiv 2303.10512).

LoRA's ranks stay: equal ones, those that a rule chooses, or a PEFT adapter's; AdaLoRA's move between sites under a
budget. How a probe is fitted is described in `training.linear_probe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import attach_adapters, freeze_backbone, store_in_bits
from peft_vit.core.adapters.adapter_file import load_trained, read_adapter_file
from peft_vit.core.adapters.peft_format import attach_named, import_peft, named_head_parameters, read_peft
from peft_vit.core.allocation import (
    AdaLoRAController,
    bounds_for,
    check_starting_ranks,
    costs_for,
    largest_ranks,
    schedule_for,
)
from peft_vit.core.allocation.starting_ranks import PLAIN, Adapters
from peft_vit.core.backbones import BackboneShape, Site, find_sites, fused_sites
from peft_vit.core.config import RULE_OF_A_BUDGET, AdaLoraConfig, ExperimentConfig, Frozen, LoraConfig, QaLoraConfig
from peft_vit.core.config.methods import StoredAdapterConfig
from peft_vit.core.methods.method import DEFAULT_RANK, Method, PrepareContext, Sections, TrainOptions, sites_of
from peft_vit.core.training import AllocationHook, Hook, StartingRanks, check_ranks

_DECIDED_AFTER, _MEAN_RANK = 16, 4  # of AdaLoRA as `train` takes it


def _freeze(model: nn.Module, experiment: ExperimentConfig, context: PrepareContext) -> list[Hook]:
    freeze_backbone(model)
    return []


LINEAR = Method(prepare=_freeze, forward_passes=1, bytes_per_weight=4)
FULL = Method(
    learning_rate=2e-5,
    forward_passes=3,
    bytes_per_weight=16,
    why_not_peft="full fine-tuning changes every weight, so there is no adapter to export",
)


def _prepare_lora(model: nn.Module, experiment: ExperimentConfig, context: PrepareContext) -> list[Hook]:
    settings = experiment.need(LoraConfig)
    if settings.start is not None:
        _start_from(model, Path(settings.start), seed=context.seed)
        return []
    sites = find_sites(model, settings.targets)
    attach_adapters(model, sites, settings.rank or 0, scale=settings.scale, seed=context.seed)
    return stored_adapters(model, settings, Adapters("lora", 1, settings.adapter_bits), sites)


def _start_from(model: nn.Module, start: Path, *, seed: int) -> None:
    """Attach the adapters of a run's file, whose head comes later, or of a folder of PEFT, with its head if it fits."""
    if not start.is_file():
        import_peft(model, start, seed=seed, fresh_head=True)
        return
    attach_named(model, read_adapter_file(start).scales, seed=seed)
    load_trained(model, start, keep=named_head_parameters(model))


def stored_adapters(
    model: nn.Module, settings: StoredAdapterConfig, adapters: Adapters, sites: Sequence[Site]
) -> list[Hook]:
    """Store a model's adapters in `adapter_bits`, and return the hook that chooses their ranks, if a rule does."""
    store_in_bits(model, settings.adapter_bits, while_training=settings.adapter_rounding != "after")
    if settings.ranks is None:
        return []
    return [StartingRanks(settings.ranks, sites, adapters)]


def _check_lora(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    settings = experiment.need(LoraConfig)
    if settings.rank is not None:
        check_ranks(sites_of("lora", settings, shape), settings.rank, field="lora.rank")
    check_ranks_of(settings, Adapters("lora", 1, settings.adapter_bits), shape)
    if settings.start is not None:
        try:
            if (start := Path(settings.start)).is_file():
                read_adapter_file(start)
            else:
                read_peft(start, fused_sites(shape.sites), dict.fromkeys(shape.head, ()), any_head=True)
        except UserError as error:
            raise UserError(str(error), field="lora.start") from None


def check_ranks_of(settings: StoredAdapterConfig, adapters: Adapters, shape: BackboneShape) -> None:
    """Refuse a budget of ranks that does not fit the sites, and a rule that is not run any more.

    Raises:
        UserError: with the setting, below the experiment.
    """
    if settings.ranks is not None:
        check_starting_ranks(settings.ranks, sites_of(adapters.section, settings, shape), adapters)


def _lora_defaults(options: TrainOptions) -> Sections:
    if options.adapter_bytes is not None:
        return {"lora": stored_in(options.adapter_bytes, PLAIN, options.shape.sites)}
    if options.budget is not None:
        return {"lora": {"ranks": {"rule": RULE_OF_A_BUDGET, "budget": options.budget, "unit": options.budget_unit}}}
    return {"lora": {"rank": options.rank or DEFAULT_RANK}}


def stored_in(total_bytes: int, adapters: Adapters, sites: Sequence[Site]) -> dict[str, Any]:
    """Return the settings by which updates take so many bytes in their files: ranks `even`, before bits.

    The bits are the fewest with which they buy at most rank DEFAULT_RANK everywhere: ranks of one bit are worth more
    than the bits of fewer ranks (arXiv 2307.16867, docs/what_we_found.md).
    Bytes that all ranks together do not take are left.

    Raises:
        UserError: if they buy no rank of one bit.
    """
    costs = {bits: adapters._replace(bits=bits).costs("bytes", sites) for bits in (1, 2, 4, 8, 16)}
    if total_bytes < (least := int(costs[1].min())):
        reason = f"expected at least {least} B, which one rank of the smallest matrix takes in one bit"
        raise UserError(f"{reason}, got {total_bytes} B", field="--adapter-bytes")
    largest = largest_ranks(sites, adapters.pool)
    usual = np.minimum(DEFAULT_RANK, largest)
    bits = next((bits for bits, cost in costs.items() if total_bytes <= int(cost @ usual)), 16)
    most = int(costs[bits] @ largest) - 1  # with all ranks nothing would be chosen
    return {"adapter_bits": bits, "ranks": {"rule": "even", "budget": min(total_bytes, most), "unit": "bytes"}}


LORA = Method(
    prepare=_prepare_lora,
    check=_check_lora,
    defaults=_lora_defaults,
    learning_rate=5e-4,
    few_ranks_learning_rate=1.5e-3,  # 3e-3 had the best mean in that screening, at 9 ranks and at 36
)


def settings_of(experiment: ExperimentConfig) -> tuple[AdaLoraConfig, int]:
    """Return the settings of adaptive ranks, and the inputs that adapters pool.

    On packed weights scale and targets are those of `qa_lora`.
    """
    settings, packing = experiment.need(AdaLoraConfig), experiment.section(QaLoraConfig)
    if packing is None:
        return settings, 1
    return settings.model_copy(update={"scale": packing.scale, "targets": packing.targets}), packing.pool


def prepare_adalora(model: nn.Module, experiment: ExperimentConfig, context: PrepareContext) -> list[Hook]:
    """Attach adapters, and return the hook that moves their ranks; on packed weights the trainer checks for effect."""
    (settings, pool), steps, seed = settings_of(experiment), context.total_steps, context.seed
    alone = experiment.section(QaLoraConfig) is None
    return [AllocationHook(AdaLoRAController(model, settings, steps, seed=seed, pool=pool, check=alone))]


def check_adalora(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    """Refuse a budget that does not fit the sites, or a schedule that does not fit the steps.

    Raises:
        UserError: with the setting, below the experiment.
    """
    settings, pool = settings_of(experiment)
    sites = sites_of("adalora", settings, shape)
    costs = costs_for(settings, sites, pool)
    bounds = bounds_for(settings, largest_ranks(sites, pool), costs)
    schedule_for(settings, total_steps, bounds, costs)


def shorten_adalora(experiment: ExperimentConfig, total_steps: int, steps: int, every: int) -> dict[str, Frozen]:
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


def adalora_defaults(options: TrainOptions) -> Sections:
    """Return mean rank 4 unless something else is asked, decided early, by magnitude.

    It is what was found to keep up with LoRA at its learning rate.
    """
    options.check_steps()
    early = max(1, min(_DECIDED_AFTER, options.steps // 12))
    budget = "total_byte_budget" if options.budget_unit == "bytes" else "total_rank_budget"
    section = {
        budget: options.budget or _MEAN_RANK * len(options.shape.sites),
        "allocation_strategy": "global",
        "importance_metric": "magnitude",
        "update_frequency": early,
        "warmup_steps": early,
        "final_steps": options.steps - 2 * early,
    }
    return {"adalora": section}


ADALORA = Method(
    prepare=prepare_adalora, check=check_adalora, shorten=shorten_adalora, defaults=adalora_defaults, learning_rate=5e-4
)
