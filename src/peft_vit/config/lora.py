"""Settings of LoRA: the section `lora`."""

from __future__ import annotations

from typing import Self

from pydantic import Field, ValidationInfo, model_validator

from peft_vit.config.base import AdapterConfig, is_given


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
