"""Ranks of a LoRA that are chosen once, before the first step: the section `lora.ranks`, and a line for each rule.

How a rule scores and what it gives is told, and computed, in `allocation.starting_ranks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from peft_vit.methods.adalora import BudgetUnit
from peft_vit.settings import Frozen, is_given

# What a rule reads: the frozen weights, the loss's gradients on training images, or nothing.
Reads = Literal["weights", "gradients", "nothing"]
STARTING_RULES: dict[str, Reads] = {
    "gradient": "gradients",
    "stable_rank": "weights",
    "even": "nothing",
    "random": "nothing",
    "first_blocks": "nothing",
    "last_blocks": "nothing",
}
ORDERED_RULES = ("random", "first_blocks", "last_blocks")  # give each site its ranks until the budget is spent

if TYPE_CHECKING:
    StartingRule = str
else:
    StartingRule = Literal[tuple(STARTING_RULES)]


class StartingRanksConfig(Frozen):
    """A budget of ranks, below one a site if need be, and the rule by which sites get them."""

    rule: StartingRule = Field(description="how sites share the budget")
    budget: int = Field(ge=1, description="over all sites, in the unit")
    unit: BudgetUnit = Field(default="ranks", description="what the budget counts")
    maximum_rank: int | None = Field(default=None, ge=1, description="of a site, for rules that score")
    site_rank: int = Field(default=1, ge=1, description="that random, first_blocks, last_blocks give to a site")
    calibration_images: int = Field(default=64, ge=1, description="training images that gradients are of")

    @property
    def reads(self) -> Reads:
        """Return what the rule reads."""
        return STARTING_RULES[self.rule]

    @property
    def reads_images(self) -> bool:
        """Return whether the rule needs training images."""
        return self.reads == "gradients"

    @model_validator(mode="after")
    def _settings_have_an_effect(self, info: ValidationInfo) -> Self:
        read = {
            "maximum_rank": self.reads != "nothing",
            "site_rank": self.rule in ORDERED_RULES,
            "calibration_images": self.reads_images,
        }
        for field, is_read in read.items():
            if not is_read and getattr(self, field) is not None and is_given(self, field, info):
                raise ValueError(f"{field} has no effect with rule: {self.rule}; remove it")
        return self
