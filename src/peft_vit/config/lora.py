"""What can be asked of LoRA (arXiv 2106.09685) with ranks that stay: the sections `lora` and `lora.ranks`.

How a rule scores and what it gives is told, and computed, in `allocation.starting_ranks`.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from peft_vit.config.adalora import BudgetUnit
from peft_vit.settings import AdapterConfig, Frozen, is_given

ORDERED_RULES = ("random", "first_blocks", "last_blocks")  # give each site its ranks until the budget is spent


class StartingRanksConfig(Frozen):
    """A budget of ranks, below one a site if need be, and the rule by which sites get them."""

    rule: Literal["gradient", "stable_rank", "even", "random", "first_blocks", "last_blocks"] = Field(
        description="how sites share the budget"
    )
    budget: int = Field(ge=1, description="over all sites, in the unit")
    unit: BudgetUnit = Field(default="ranks", description="what the budget counts")
    maximum_rank: int | None = Field(default=None, ge=1, description="of a site, for rules that score")
    site_rank: int = Field(default=1, ge=1, description="that random, first_blocks, last_blocks give to a site")
    calibration_images: int = Field(default=64, ge=1, description="training images that gradients are of")

    @property
    def scores_sites(self) -> bool:
        """Return whether the rule scores the sites; the others read nothing of them but their shapes."""
        return self.rule in ("gradient", "stable_rank")

    @property
    def reads_images(self) -> bool:
        """Return whether the rule needs training images."""
        return self.rule == "gradient"

    @model_validator(mode="after")
    def _settings_have_an_effect(self, info: ValidationInfo) -> Self:
        read = {
            "maximum_rank": self.scores_sites,
            "site_rank": self.rule in ORDERED_RULES,
            "calibration_images": self.reads_images,
        }
        for field, is_read in read.items():
            if not is_read and getattr(self, field) is not None and is_given(self, field, info):
                raise ValueError(f"{field} has no effect with rule: {self.rule}; remove it")
        return self


# Of `peft-vit train --budget`: what the screening of seven rules chose.
RULE_OF_A_BUDGET = "stable_rank"


class LoraConfig(AdapterConfig):
    """LoRA (arXiv 2106.09685) at one rank, at ranks that a rule chooses, or going on from an adapter of PEFT."""

    rank: int | None = Field(default=None, ge=1, description="of every update")
    start: str | None = Field(
        default=None, min_length=1, description="in place of rank: folder of a PEFT LoRA adapter to go on from"
    )

    ranks: StartingRanksConfig | None = Field(
        default=None, description="in place of rank: a budget over all sites, and the rule that spends it"
    )

    @model_validator(mode="after")
    def _rank_or_start(self, info: ValidationInfo) -> Self:
        if sum(one is not None for one in (self.rank, self.start, self.ranks)) != 1:
            raise ValueError("give exactly one of rank, start and ranks")
        for field in ("scale", "targets"):
            if self.start is not None and is_given(self, field, info):
                raise ValueError(f"{field} has no effect with start: the adapter has its own; remove it")
        return self
