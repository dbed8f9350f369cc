"""LoRA (arXiv 2106.09685) with ranks that stay: equal ones, those that a rule chooses, or a PEFT adapter's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from peft_vit.adapters import attach_adapters
from peft_vit.adapters.peft_format import import_peft, read_peft
from peft_vit.allocation import check_starting_ranks
from peft_vit.backbones import BackboneShape, find_sites, fused_sites
from peft_vit.config import RULE_OF_A_BUDGET, ExperimentConfig, LoraConfig
from peft_vit.errors import UserError
from peft_vit.methods.method import DEFAULT_RANK, Method, PrepareContext, Wishes, check_images, check_rank_at, sites_of
from peft_vit.training import Hook, StartingRanks


def _prepare(model: nn.Module, experiment: ExperimentConfig, context: PrepareContext) -> list[Hook]:
    settings = experiment.need(LoraConfig)
    if settings.start is not None:
        import_peft(model, Path(settings.start), seed=context.seed, fresh_head=True)
        return []
    sites = find_sites(model, settings.targets)
    # A rule sees the head that training starts from, so its ranks come later.
    attach_adapters(model, sites, settings.rank or 0, scale=settings.scale, seed=context.seed)
    return [] if settings.ranks is None else [StartingRanks(settings.ranks, sites, seed=context.seed)]


def _check(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    settings = experiment.need(LoraConfig)
    if settings.rank is not None:
        check_rank_at("lora.rank", sites_of("lora", settings, shape), settings.rank)
    if settings.ranks is not None:
        sites, rule = sites_of("lora", settings, shape), settings.ranks
        check_rank_at("lora.ranks.site_rank", sites, rule.site_rank)
        check_starting_ranks(rule, sites)
        if rule.reads_images:
            check_images("lora.ranks.calibration_images", rule.calibration_images, train_images)
    if settings.start is not None:
        try:
            read_peft(Path(settings.start), fused_sites(shape.sites), dict.fromkeys(shape.head, ()), any_head=True)
        except UserError as error:
            raise UserError(str(error), field="lora.start") from None


def _defaults(wishes: Wishes) -> dict[str, dict[str, Any]]:
    if wishes.budget is not None:
        return {"lora": {"ranks": {"rule": RULE_OF_A_BUDGET, "budget": wishes.budget, "unit": wishes.budget_unit}}}
    return {"lora": {"rank": wishes.rank or DEFAULT_RANK}}


LORA = Method(
    prepare=_prepare,
    check=_check,
    defaults=_defaults,
    learning_rate=5e-4,
    few_ranks_learning_rate=1.5e-3,  # 3e-3 had the best mean in that screening, at 9 ranks and at 36
)
