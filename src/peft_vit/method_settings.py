"""Settings of the methods: one frozen model a section, checked as far as the file alone tells.

`config` puts them into a study; they stand apart only so that each file can be read at once.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

Matrix = Literal["query", "key", "value", "out", "fc1", "fc2"]
MATRICES: tuple[Matrix, ...] = ("query", "key", "value", "out", "fc1", "fc2")
# Where an adapter may sit: on a matrix, or on timm's fused query, key and value, which PEFT takes as one module.
SiteMatrix = Literal["qkv", "query", "key", "value", "out", "fc1", "fc2"]
SITE_MATRICES: tuple[SiteMatrix, ...] = ("qkv", *MATRICES)


class Frozen(BaseModel):
    """Values that nothing changes; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


AS_WRITTEN = "what a person wrote: a setting equal to its default was still meant to do something"


def is_given(config: BaseModel, field: str, info: ValidationInfo) -> bool:
    """Tell whether a setting was given; a record spells out every default, so there other values count."""
    if info.context == AS_WRITTEN:
        return field in config.model_fields_set
    return bool(getattr(config, field) != type(config).model_fields[field].default)


class AdapterConfig(Frozen):
    """What all adapters have."""

    scale: float = Field(default=2.0, gt=0, description="alpha / rank; stays when the rank moves")
    targets: tuple[Matrix, ...] = Field(default=MATRICES, min_length=1)

    @model_validator(mode="after")
    def _targets_unique(self) -> Self:
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets names a matrix twice; remove one")
        return self


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


class _PeftConfig(AdapterConfig):
    @model_validator(mode="after")
    def _fused_matrix_whole(self) -> Self:
        fused = [matrix for matrix in ("query", "key", "value") if matrix in self.targets]
        if len(fused) not in (0, 3):
            raise ValueError(
                f"targets names {' and '.join(fused)} alone, but timm's query, key and value are one module for PEFT; "
                "name all three or none"
            )
        return self


class PeftLoraConfig(_PeftConfig):
    """LoRA by the PEFT library; one rank for timm's fused query, key and value."""

    rank: int = Field(ge=1)


class PeftAdaLoraConfig(_PeftConfig):
    """AdaLoRA (arXiv 2303.10512) by the PEFT library; its names for the settings stand in the descriptions."""

    initial_rank: int = Field(default=12, ge=2, description="init_r: rank of every module until the first mask")
    target_rank: int = Field(default=8, ge=1, description="target_r: mean rank of the modules in the end")
    update_frequency: int = Field(ge=1, description="deltaT: masks are made at multiples of it")
    warmup_steps: int = Field(ge=1, description="tinit: no mask up to this step; at 0 PEFT masks before it has scores")
    final_steps: int | None = Field(default=None, ge=0, description="tfinal: steps under the last mask; a quarter")
    orthogonality_weight: float = Field(default=0.5, ge=0, description="orth_reg_weight; applied by our loop")
    beta1: float = Field(default=0.85, gt=0, lt=1, description="smoothing of the sensitivity")
    beta2: float = Field(default=0.85, gt=0, lt=1, description="smoothing of its uncertainty")

    @model_validator(mode="after")
    def _rank_falls(self) -> Self:
        if self.target_rank >= self.initial_rank:
            raise ValueError(
                f"target_rank {self.target_rank} does not lie below initial_rank {self.initial_rank}, and PEFT fails "
                "when it has nothing to mask; raise initial_rank, or use peft_lora"
            )
        return self
