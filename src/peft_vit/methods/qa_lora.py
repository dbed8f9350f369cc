"""LoRA on quantized weights (QA-LoRA, arXiv 2309.14717): the section `qa_lora`, and the formats of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from pydantic import Field, ValidationInfo, model_validator

from peft_vit.errors import UserError
from peft_vit.methods.lora import DEFAULT_RANK
from peft_vit.methods.method import Method, Preparation, Wishes, check_rank_at, sites_of
from peft_vit.settings import AdapterConfig, Frozen, is_given

if TYPE_CHECKING:
    from torch import nn

    from peft_vit.backbones import BackboneShape
    from peft_vit.config import ExperimentConfig
    from peft_vit.training import Hook

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


_CALIBRATION_IMAGES = 128  # as many as GPTQ's paper takes sequences
_GROUP, _SMALLEST_GROUP = 32, 8  # of what `peft-vit train` takes; in smaller ones scales take more than codes


def packed_by_default(shape: BackboneShape) -> dict[str, Any]:
    """Return what `peft-vit train` takes: nf4, in groups of 32 inputs or of fewer, where that does not divide a site's.

    Where no group divides all of them, each row has one scale.
    """
    group = math.gcd(_GROUP, *(site.in_features for site in shape.sites))
    groups = {"use_group_quantization": True, "group_size": group} if group >= _SMALLEST_GROUP else {}
    return {"quantization_bits": 4, "quantization_type": "nf4", "use_group_quantization": False, **groups}


def trainer(
    model: nn.Module, experiment: ExperimentConfig, preparation: Preparation, *, ranks: Mapping[str, int] | None = None
) -> Hook:
    """Pack the weights, attach adapters where there are none, and return what runs the schedule."""
    from peft_vit.training import QALoRATrainer

    settings = experiment.need(QaLoraConfig)
    images = None
    if settings.rounding == "gptq" and preparation.packed is None:
        assert preparation.calibration is not None
        images = preparation.calibration(settings.images_to_round_by)
    return QALoRATrainer(
        model,
        settings,
        preparation.total_steps,
        seed=preparation.seed,
        formats=preparation.formats,
        ranks=preparation.ranks if ranks is None else ranks,
        images=images,
        packed=preparation.packed,
    )


def packed_at_once(experiment: ExperimentConfig) -> Sequence[str] | None:
    """Return the targets whose float weights nothing needs but their packing; None if training or measures do."""
    settings = experiment.section(QaLoraConfig)
    if settings is None or settings.quantization_schedule != "constant" or settings.adaptive_bits is not None:
        return None
    return None if settings.keeps_codes else settings.targets


def keeps_codes(experiment: ExperimentConfig) -> bool:
    """Return whether packed weights depend on more than the float ones, so that they are saved with the adapters."""
    settings = experiment.section(QaLoraConfig)
    return settings is not None and settings.keeps_codes


def check_packing(
    experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int, *, rank: int
) -> None:
    """Refuse groups and ranks that do not fit the sites, a schedule the steps, or too many calibration images.

    The rank is every adapter's; 0 where something else decides ranks.
    """
    from peft_vit.training import check_bits, end_step

    settings = experiment.need(QaLoraConfig)
    check_rank_at("qa_lora.rank", sites_of("qa_lora", settings, shape), rank, settings.pool)
    end_step(settings, total_steps)
    if settings.calibration_images is not None and settings.calibration_images > train_images:
        raise UserError(
            f"{settings.calibration_images} are more than the {train_images} training images; lower it",
            field="qa_lora.calibration_images",
        )
    if settings.adaptive_bits is not None:
        check_bits(settings, shape.sites)
        if (images := settings.adaptive_bits.calibration_images) > train_images:
            raise UserError(
                f"{images} are more than the {train_images} training images; lower it",
                field="qa_lora.adaptive_bits.calibration_images",
            )


def shorten(experiment: ExperimentConfig, total_steps: int, steps: int, every: int) -> dict[str, Frozen]:
    """Return the section with a schedule for fewer steps."""
    from peft_vit.training import end_step

    settings = experiment.need(QaLoraConfig)
    if settings.quantization_schedule == "constant":
        return {}
    part = steps / total_steps
    warmup = round(part * settings.quantization_warmup_steps)
    end = max(warmup + 1, round(part * end_step(settings, total_steps)))
    short = {"quantization_warmup_steps": min(warmup, steps - 1), "quantization_end_step": min(end, steps)}
    return {"qa_lora": settings.model_copy(update=short)}


def _prepare(model: nn.Module, experiment: ExperimentConfig, preparation: Preparation) -> list[Hook]:
    return [trainer(model, experiment, preparation)]


def _check(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    settings = experiment.need(QaLoraConfig)
    ranks_are_chosen = settings.adaptive_bits is not None and settings.adaptive_bits.ranks
    check_packing(experiment, shape, total_steps, train_images, rank=0 if ranks_are_chosen else settings.fixed_rank)


def _defaults(wishes: Wishes) -> dict[str, dict[str, Any]]:
    packing, sites = packed_by_default(wishes.shape), wishes.shape.sites
    # A pooled adapter sees one input a group: a rank above their number would be wasted.
    group = packing.get("group_size", 1)
    most = min(min(site.in_features // group, site.out_features) for site in sites)
    return {"qa_lora": {**packing, "rank": wishes.rank or min(DEFAULT_RANK, most)}}


QA_LORA = Method(
    name="qa_lora",
    title="QA-LoRA",
    color="#009e73",
    trains="adapters",
    settings={"qa_lora": QaLoraConfig},
    prepare=_prepare,
    check=_check,
    shorten=shorten,
    defaults=_defaults,
    size_options=("rank",),
    why_not_peft=(
        "a QA-LoRA adapter belongs to the quantized weights; PEFT would add it to the float ones, another model"
    ),
)
