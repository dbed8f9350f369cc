"""What the sections of a configuration have in common: frozen models, and where adapters may sit."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

Matrix = Literal["query", "key", "value", "out", "fc1", "fc2"]
MATRICES: tuple[Matrix, ...] = ("query", "key", "value", "out", "fc1", "fc2")
FUSED: tuple[Matrix, ...] = ("query", "key", "value")  # timm computes them as one matrix, qkv
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
