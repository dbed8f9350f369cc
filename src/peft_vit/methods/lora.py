"""LoRA with the same rank at every site (arXiv 2106.09685), from nothing or from an adapter of the PEFT library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, ValidationInfo, model_validator

from peft_vit.errors import UserError
from peft_vit.methods.method import Method, Preparation, Wishes, check_rank_at, sites_of
from peft_vit.settings import AdapterConfig, is_given

if TYPE_CHECKING:
    from torch import nn

    from peft_vit.backbones import BackboneShape
    from peft_vit.config import ExperimentConfig
    from peft_vit.training import Hook

DEFAULT_RANK = 8  # of `peft-vit train`


class LoraConfig(AdapterConfig):
    """Fixed-rank LoRA (arXiv 2106.09685), from nothing at a rank, or going on from an adapter of the PEFT library."""

    rank: int | None = Field(default=None, ge=1)
    start: str | None = Field(
        default=None, min_length=1, description="in place of rank: folder of a PEFT LoRA adapter to go on from"
    )

    @model_validator(mode="after")
    def _rank_or_start(self, info: ValidationInfo) -> Self:
        if (self.rank is None) == (self.start is None):
            raise ValueError("give exactly one of rank and start")
        for field in ("scale", "targets"):
            if self.start is not None and is_given(self, field, info):
                raise ValueError(f"{field} has no effect with start: the adapter has its own; remove it")
        return self


def _prepare(model: nn.Module, experiment: ExperimentConfig, preparation: Preparation) -> list[Hook]:
    from peft_vit.adapters import attach_adapters
    from peft_vit.adapters.peft_format import import_peft
    from peft_vit.backbones import find_sites

    settings = experiment.need(LoraConfig)
    if settings.start is not None:
        import_peft(model, Path(settings.start), seed=preparation.seed, fresh_head=True)
        return []
    assert settings.rank is not None
    sites = find_sites(model, settings.targets)
    attach_adapters(model, sites, settings.rank, scale=settings.scale, seed=preparation.seed)
    return []


def _check(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    from peft_vit.adapters.peft_files import read_peft
    from peft_vit.backbones import fused_sites

    settings = experiment.need(LoraConfig)
    if settings.rank is not None:
        check_rank_at("lora.rank", sites_of("lora", settings, shape), settings.rank)
    if settings.start is not None:
        try:
            read_peft(Path(settings.start), fused_sites(shape.sites), dict.fromkeys(shape.head, ()), any_head=True)
        except UserError as error:
            raise UserError(str(error), field="lora.start") from None


def _defaults(wishes: Wishes) -> dict[str, dict[str, Any]]:
    return {"lora": {"rank": wishes.rank or DEFAULT_RANK}}


LORA = Method(
    name="lora",
    title="LoRA, fixed rank",
    color="#0072b2",
    trains="adapters",
    settings={"lora": LoraConfig},
    prepare=_prepare,
    check=_check,
    defaults=_defaults,
    learning_rate=5e-4,
    size_option="rank",
)
