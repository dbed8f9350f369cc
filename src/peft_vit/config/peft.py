"""What can be asked of tuners of the PEFT library: the sections `peft_lora`, `peft_adalora` and `peft`."""

from __future__ import annotations

from typing import Any, Self

from pydantic import ConfigDict, Field, model_validator

from peft_vit.settings import AdapterConfig, Frozen


class PeftLoraConfig(AdapterConfig):
    """LoRA by the PEFT library; one rank for a fused query, key and value."""

    rank: int = Field(ge=1, description="of every update")


class PeftAdaLoraConfig(AdapterConfig):
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


class PeftConfig(Frozen):
    """A tuner of the PEFT library with PEFT's own settings, which PEFT's own configuration checks."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(min_length=1, description="as PEFT names it, in small letters; and dora, rslora, eva")

    @property
    def settings(self) -> dict[str, Any]:
        """Return what is handed on to PEFT."""
        return dict(self.model_extra or {})
