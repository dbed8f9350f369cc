"""What the sections of a configuration have in common: frozen models, and where adapters may sit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo

Kind = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]  # of a matrix, in its model's own words
Target = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.*?\[\]!\-]{1,256}$")]  # a kind, or a pattern of names
MATRICES: tuple[str, ...] = ("query", "key", "value", "out", "fc1", "fc2")  # of a plain block
# Where an adapter may sit in one: on a matrix, or on the fused query, key and value, which PEFT takes as one module.
SiteMatrix = Literal["qkv", "query", "key", "value", "out", "fc1", "fc2"]
SITE_MATRICES: tuple[str, ...] = ("qkv", *MATRICES)


class Frozen(BaseModel):
    """Values that nothing changes; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


AS_WRITTEN = "what a person wrote: a setting equal to its default was still meant to do something"


def is_given(config: BaseModel, field: str, info: ValidationInfo) -> bool:
    """Tell whether a setting was given; a record spells out every default, so there other values count."""
    if info.context == AS_WRITTEN:
        return field in config.model_fields_set
    return bool(getattr(config, field) != type(config).model_fields[field].default)


def without_repeats(problem: str) -> AfterValidator:
    """Refuse a tuple in which something stands twice."""

    def check(values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) != len(values):
            raise ValueError(problem)
        return values

    return AfterValidator(check)


class AdapterConfig(Frozen):
    """What all adapters have."""

    scale: float = Field(default=2.0, gt=0, description="alpha / rank; stays when the rank moves")
    targets: Annotated[tuple[Target, ...], without_repeats("names a matrix twice; remove one")] = Field(
        default=MATRICES,
        min_length=1,
        description="kinds of matrices, or patterns of their names, `blocks.*.attn.qkv`; the default, the six of a "
        "plain block, stands for all that the model has",
    )
