"""What can be asked of LoRA on quantized weights (QA-LoRA, arXiv 2309.14717): section `qa_lora`, and the formats."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, ValidationInfo, model_validator

from peft_vit.settings import AdapterConfig, Frozen, is_given

_CALIBRATION_IMAGES = 128  # as many as GPTQ's paper takes sequences
# A format's name ends with the bits of a code.
QuantizationType = Literal["nf4", "fp4", "nf3", "int2", "int3", "int4", "int8"]
BITS_OF_TYPE: dict[QuantizationType, int] = {name: int(name[-1]) for name in get_args(QuantizationType)}


class AdaptiveBitsConfig(Frozen):
    """Bits of each layer, chosen before training from what quantizing it to each type would cost on training images."""

    average_bits: float | None = Field(
        default=None, gt=0, le=32, description="stored bits a weight over the quantized layers, scales and offsets too"
    )
    total_byte_budget: int | None = Field(
        default=None, ge=1, description="bytes of the packed weights; with ranks: true, of the float32 adapters too"
    )
    ranks: bool = Field(default=False, description="choose each site's rank under the same bytes; in place of rank")
    types: tuple[QuantizationType, ...] = Field(
        default=("int2", "int4", "int8"), min_length=2, description="that a layer may get"
    )
    sensitivity: Literal["fisher", "loss"] = Field(
        default="fisher",
        description="fisher: squared error weighted with the Fisher's diagonal, one backward pass; loss: rise of the "
        "loss, a forward pass for each type of each layer",
    )
    calibration_images: int = Field(default=64, ge=1, description="training images to measure on")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.average_bits is None) == (self.total_byte_budget is None):
            raise ValueError("give exactly one of average_bits and total_byte_budget")
        if self.ranks and self.total_byte_budget is None:
            raise ValueError("ranks: true needs total_byte_budget: adapters have bytes, but no bits a weight")
        if len(set(self.types)) != len(self.types):
            raise ValueError("types names one twice; remove it")
        if len({BITS_OF_TYPE[one] for one in self.types}) == 1:
            raise ValueError("types are all of the same bits, so a budget decides nothing; name others")
        return self


class QaLoraConfig(AdapterConfig):
    """Quantization-aware LoRA (arXiv 2309.14717), NF4/FP4 codebooks (arXiv 2305.14314), and a schedule."""

    quantization_bits: Literal[2, 3, 4, 8] | None = Field(
        default=None, description="bits of a code; not with adaptive_bits"
    )
    quantization_type: QuantizationType | None = Field(
        default=None, description="number format of the codes; not with adaptive_bits"
    )
    quantization_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="how float weights give way to quantized ones; constant: they are quantized from the start",
    )
    gradient_scaling_factor: float = Field(default=1.0, gt=0, description="factor on the adapters' gradients")
    gradient_scaling: Literal["constant", "adaptive"] = Field(
        default="constant",
        description="adaptive: each layer's factor in proportion to its relative quantization error, mean factor kept",
    )
    use_group_quantization: bool = Field(
        description="true: scales for groups of inputs, and an adapter that merges exactly (QA-LoRA); false: one "
        "scale for each output and a plain adapter (QLoRA)"
    )
    group_size: int = Field(default=32, ge=2, description="inputs that share a scale; with use_group_quantization")
    quantization_offset: bool | None = Field(
        default=None,
        description="store an offset beside each scale while training; default: where there are groups and no "
        "use_double_quant",
    )
    scale_precision: Literal["fp16", "fp32"] = Field(default="fp16", description="of scales and offsets")
    rounding: Literal["nearest", "gptq"] = Field(
        default="nearest",
        description="gptq: layer by layer, with codes that make up for each other's errors on training images "
        "(arXiv 2210.17323); see quantization.gptq",
    )
    calibration_images: int | None = Field(
        default=None, ge=1, description="training images for rounding: gptq; default 128, or all where there are fewer"
    )
    use_double_quant: bool = Field(
        default=False, description="keep the scales of groups in 8 bits themselves, as bitsandbytes does"
    )
    rank: int | None = Field(
        default=None, ge=1, description="default 8; not where the section adalora or adaptive_bits decides ranks"
    )
    quantization_warmup_steps: int = Field(default=0, ge=0, description="steps before the float weights start to go")
    quantization_end_step: int | None = Field(
        default=None, ge=1, description="step at which only quantized weights are left; default two thirds of the run"
    )
    balance_target: float | None = Field(
        default=None, gt=0, description="adapter-to-error norm ratio to hold; null: it is measured, not managed"
    )
    balance_by: Literal["gradient_scale", "schedule_pace"] = Field(
        default="gradient_scale", description="what is moved to hold balance_target"
    )
    adaptive_bits: AdaptiveBitsConfig | None = None

    @property
    def fixed_rank(self) -> int:
        """Return the rank of every site where nothing else decides ranks."""
        return 8 if self.rank is None else self.rank

    @property
    def pool(self) -> int:
        """Return the inputs per group on which an adapter's update is constant; 1: a plain adapter."""
        return self.group_size if self.use_group_quantization else 1

    @property
    def offset(self) -> bool:
        """Return whether an offset is stored beside each scale while training."""
        if self.quantization_offset is None:
            return self.use_group_quantization and not self.use_double_quant
        return self.quantization_offset

    @property
    def images_to_round_by(self) -> int:
        """Return how many training images `rounding: gptq` takes, if there are as many."""
        return _CALIBRATION_IMAGES if self.calibration_images is None else self.calibration_images

    @property
    def keeps_codes(self) -> bool:
        """Return whether packed weights depend on more than the float ones, and so are saved with the adapters."""
        return self.rounding == "gptq"

    @model_validator(mode="after")
    def _bits_are_said_once(self) -> Self:
        if self.adaptive_bits is not None:
            for field in ("quantization_bits", "quantization_type"):
                if getattr(self, field) is not None:
                    raise ValueError(f"{field} has no effect with adaptive_bits, which chooses among types; remove it")
            if self.adaptive_bits.ranks and self.rank is not None:
                raise ValueError("rank has no effect with adaptive_bits.ranks: true; remove it")
            return self
        if self.quantization_bits is None or self.quantization_type is None:
            raise ValueError("give quantization_bits and quantization_type, or adaptive_bits")
        expected = BITS_OF_TYPE[self.quantization_type]
        if self.quantization_bits != expected:
            raise ValueError(
                f"quantization_type: {self.quantization_type} stores {expected} bits, "
                f"quantization_bits says {self.quantization_bits}; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _settings_have_an_effect(self, info: ValidationInfo) -> Self:
        if not self.use_group_quantization and is_given(self, "group_size", info):
            raise ValueError("group_size has no effect with use_group_quantization: false; remove it")
        if self.use_double_quant and not self.use_group_quantization:
            raise ValueError(
                "use_double_quant needs use_group_quantization: true; one scale a row takes next to nothing as it is"
            )
        if self.quantization_schedule == "constant" and (
            self.quantization_warmup_steps or self.quantization_end_step is not None
        ):
            raise ValueError(
                "quantization_warmup_steps and quantization_end_step have no effect with a constant schedule"
            )
        if self.quantization_end_step is not None and self.quantization_end_step <= self.quantization_warmup_steps:
            raise ValueError("quantization_end_step must lie after quantization_warmup_steps; raise it")
        if self.rounding == "nearest" and self.calibration_images is not None:
            raise ValueError("calibration_images has no effect with rounding: nearest; remove it")
        if self.balance_target is None and is_given(self, "balance_by", info):
            raise ValueError("balance_by has no effect without balance_target; remove it")
        if self.balance_by == "schedule_pace" and self.quantization_schedule == "constant":
            raise ValueError("balance_by: schedule_pace has no effect with a constant schedule; use linear or cosine")
        return self
