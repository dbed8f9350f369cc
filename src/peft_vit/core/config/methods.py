"""What can be asked of the methods of fine-tuning: a section of an experiment each, and a line in `METHOD_KINDS`.

What a method does to a model is a module of `methods`; how scores are computed and ranks given out is described in
`allocation`, how weights are quantized in `quantization`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from peft_vit.base.settings import (
    AdapterConfig,
    Frozen,
    OnlyWith,
    Settings,
    exactly_one,
    is_given,
    refuse,
    without_repeats,
)
from peft_vit.core.config.registries import BITS_OF_TYPE, Bits, QuantizationType
from peft_vit.core.config.units import Count, Fraction, Positive, Text


@dataclass(frozen=True)
class ImportanceMetric:
    """What a metric needs, by which ranks are given out; its score is described, and computed, in
    `allocation.importance`.

    Attributes:
        reads_gradient: whether it is smoothed over the steps' gradients.
        probe_power: power of the gradient by which a site without rank is scored in its units, see
            `allocation.importance`; None: it is not probed.
    """

    reads_gradient: bool = False
    probe_power: int | None = None


METRICS: dict[str, ImportanceMetric] = {
    "magnitude": ImportanceMetric(probe_power=1),
    "gradient_norm": ImportanceMetric(reads_gradient=True, probe_power=1),
    "fisher": ImportanceMetric(reads_gradient=True, probe_power=2),
    "sensitivity": ImportanceMetric(reads_gradient=True, probe_power=2),
    "random": ImportanceMetric(),
    "uniform": ImportanceMetric(),
    "stable_rank": ImportanceMetric(),
}
GRADIENT_METRICS = tuple(name for name, metric in METRICS.items() if metric.reads_gradient)

if TYPE_CHECKING:
    Metric = str
else:
    Metric = Literal[tuple(METRICS)]

Strategy = Literal["proportional", "threshold", "top_k", "global"]
BudgetUnit = Literal["ranks", "parameters", "bytes", "macs"]


class Budget(NamedTuple):
    """What all target modules together may hold once the schedule has come down."""

    unit: BudgetUnit
    total: int
    field: str  # the setting that gives it


_BUDGETS: dict[str, BudgetUnit] = {
    "total_rank_budget": "ranks",
    "total_parameter_budget": "parameters",
    "total_byte_budget": "bytes",
    "total_mac_budget": "macs",
}


class AdaLoraConfig(AdapterConfig):
    """Adaptive ranks under a budget; its schedule and the sensitivity are AdaLoRA's (arXiv 2303.10512).

    The budget is given in exactly one unit, see `allocation.strategies.costs_for` for what a rank costs in each.
    """

    total_rank_budget: Count | None = Field(default=None, description="The sum of the ranks of all target modules")
    total_parameter_budget: Count | None = Field(
        default=None, description="Trainable parameters of all updates, without the head"
    )
    total_byte_budget: Count | None = Field(
        default=None, description="Bytes of all updates in float32, without the head"
    )
    total_mac_budget: Count | None = Field(
        default=None, description="Multiply-accumulates of all updates in a forward pass of one image"
    )
    allocation_strategy: Strategy = Field(description="How scores become ranks")
    importance_metric: Metric = Field(description="How ranks or modules are scored")
    update_frequency: Count = Field(description="Change ranks every so many steps")
    warmup_steps: Count = Field(description="Change ranks for the first time after this many steps")
    final_steps: int | None = Field(
        default=None, ge=0, description="Keep the last ranks for this many steps. Without it, for a quarter of the run"
    )
    budget_schedule: Literal["cubic", "constant"] = Field(
        default="cubic",
        description="cubic: the budget falls from initial_budget to the total. constant: it is "
        "the total from the start",
    )
    initial_budget: Annotated[Count | None, OnlyWith(budget_schedule="cubic")] = Field(
        default=None,
        description="The budget during warm-up with the cubic schedule, in the unit of the total. Without it, "
        "1.5 times the total, and at least one rank for each module",
    )
    minimum_rank: int = Field(
        default=0, ge=0, le=65_536, description="The lowest rank of a module. With 0 a module may lose its update"
    )
    maximum_rank: Count | None = Field(
        default=None, description="The highest rank of a module. Without it, the smaller side of its matrix"
    )
    parametrization: Literal["product", "svd"] = Field(
        default="product",
        description="The form of an update. product: B A as in LoRA. svd: P diag(lambda) Q as in AdaLoRA",
    )
    factor_start: Annotated[Literal["normal", "orthonormal"], OnlyWith(parametrization="svd")] = Field(
        default="normal",
        description="How P and Q of the svd form start: from N(0, 0.02^2) as published, or orthonormal",
    )
    lambda_gain: Annotated[Positive, OnlyWith(parametrization="svd")] = Field(
        default=1.0,
        description="The factor k on lambda in the svd form. Lambda then learns k times as fast under AdamW, k^2 "
        "times under SGD",
    )
    importance_gradient: Annotated[
        Literal["task", "task_and_penalty"], OnlyWith(importance_metric=GRADIENT_METRICS)
    ] = Field(
        default="task",
        description="Which gradient is scored: that of the task's loss, or that with the penalty, as in the "
        "official AdaLoRA code. In your own loop it depends on when you call update_importance_scores",
    )
    orthogonality_weight: Annotated[float | None, OnlyWith(parametrization="svd")] = Field(
        default=None,
        ge=0,
        description="Weight of the orthogonality penalty. Without it, 0.1 for svd and none for product",
    )
    sensitivity_beta: Annotated[Fraction, OnlyWith(importance_metric=GRADIENT_METRICS)] = Field(
        default=0.85, description="How much scores are smoothed (beta 1 of AdaLoRA)"
    )
    uncertainty_beta: Annotated[Fraction, OnlyWith(importance_metric="sensitivity")] = Field(
        default=0.85, description="How much their uncertainty is smoothed (beta 2 of AdaLoRA)"
    )
    threshold_tau: Annotated[Positive, OnlyWith(allocation_strategy="threshold")] = Field(
        default=1.0,
        description="With the strategy threshold: modules that score at least this multiple "
        "of the mean share the budget",
    )
    top_k: Annotated[Count | None, OnlyWith(allocation_strategy="top_k")] = Field(
        default=None,
        description="With the strategy top_k: this many modules share the budget. Without it, half of them",
    )

    @property
    def budget(self) -> Budget:
        """Return the budget in the one unit that was given."""
        return next(
            Budget(unit, total, field)
            for field, unit in _BUDGETS.items()
            if (total := getattr(self, field)) is not None
        )

    @property
    def penalty_weight(self) -> float:
        """Return the weight of the orthogonality penalty: without a setting 0.1 as in the official code, with svd."""
        usual = 0.1 if self.parametrization == "svd" else 0.0
        return usual if self.orthogonality_weight is None else self.orthogonality_weight

    @model_validator(mode="after")
    def _something_is_decided(self) -> Self:
        exactly_one(self, *_BUDGETS)
        if self.maximum_rank is not None and self.maximum_rank < max(1, self.minimum_rank):
            raise ValueError("maximum_rank lies below minimum_rank (and below 1); raise it")
        if self.initial_budget is not None and self.initial_budget < self.budget.total:
            raise ValueError(f"initial_budget lies below {self.budget.field}; the cubic schedule only descends")
        if self.importance_gradient == "task_and_penalty" and not self.penalty_weight:
            raise ValueError(
                "importance_gradient: task_and_penalty needs a penalty: parametrization: svd with an "
                "orthogonality_weight above 0"
            )
        if self.allocation_strategy == "global" and self.budget_schedule == "constant":
            raise ValueError(
                "allocation_strategy: global has no effect with budget_schedule: constant, where every triplet stays; "
                "use cubic or another strategy"
            )
        if self.allocation_strategy == "global" and self.importance_metric == "uniform":
            raise ValueError(
                "importance_metric: uniform is not a control for allocation_strategy: global, which removes "
                "those of the last modules from equal triplets; use it with proportional"
            )
        return self


ORDERED_RULES = ("random", "first_blocks", "last_blocks")  # gave each site its ranks until the budget was spent
FORMER_RULES = ("gradient", *ORDERED_RULES)  # of kept studies, which are read and not repeated


class StartingRanksConfig(Settings):
    """A budget of ranks, which may be fewer than modules, and the rule that distributes it."""

    rule: Literal["stable_rank", "even", "gradient", "random", "first_blocks", "last_blocks"] = Field(
        description="How modules share the budget: stable_rank or even. The others are those of older studies, which "
        "can be read and not be run"
    )
    budget: Count = Field(description="The budget of all modules together, counted as unit says")
    unit: BudgetUnit = Field(default="ranks", description="What the budget counts")
    maximum_rank: Annotated[Count | None, OnlyWith(rule="stable_rank")] = Field(
        default=None, description="The highest rank of a module"
    )
    site_rank: Annotated[Count, OnlyWith(rule=ORDERED_RULES)] = Field(default=1, description="Of older studies")
    calibration_images: Annotated[Count, OnlyWith(rule="gradient")] = Field(default=64, description="Of older studies")


# Of `peft-vit train --budget`: what the screening of seven rules chose.
RULE_OF_A_BUDGET = "stable_rank"


class StoredAdapterConfig(AdapterConfig):
    """What adapters have whose ranks are chosen at the start, and whose files hold few bits a value."""

    ranks: StartingRanksConfig | None = Field(
        default=None, description="Instead of rank: a budget for all modules, and a rule that distributes it"
    )
    adapter_bits: Literal[1, 2, 4, 8, 16] | None = Field(
        default=None,
        description="Store each value of an update in this many bits, with one scale for each row. A budget in "
        "bytes then counts these",
    )
    adapter_rounding: Annotated[Literal["training", "after"] | None, OnlyWith(adapter_bits=...)] = Field(
        default=None,
        description="When values are rounded to adapter_bits. training: from the first step on, with the "
        "gradients of unrounded values (straight-through). after: only to validate, test and export. "
        "Without it, training",
    )


class LoraConfig(StoredAdapterConfig):
    """LoRA (arXiv 2106.09685) of one rank, of ranks that a rule chooses, or from an adapter of PEFT."""

    rank: Count | None = Field(default=None, description="The rank of every update")
    start: Text | None = Field(
        default=None,
        description="Instead of rank: start from the PEFT LoRA adapter in this folder, or a run's adapter.safetensors",
    )

    @model_validator(mode="after")
    def _rank_or_start(self, info: ValidationInfo) -> Self:
        exactly_one(self, "rank", "start", "ranks")
        decided = () if self.start is None else ("scale", "targets", "adapter_bits")
        given = [name for name in decided if is_given(self, name, info)]
        refuse(self, dict.fromkeys(given, "has no effect with start: the adapter has its own; remove it"))
        return self


class PeftLoraConfig(AdapterConfig):
    """LoRA by the PEFT library; one rank for a fused query, key and value."""

    rank: Count = Field(description="The rank of every update")


class PeftAdaLoraConfig(AdapterConfig):
    """AdaLoRA (arXiv 2303.10512) by the PEFT library; its names for the settings are in brackets."""

    initial_rank: int = Field(default=12, ge=2, description="The rank of every module until the first mask (init_r)")
    target_rank: Count = Field(default=8, description="The mean rank of the modules in the end (target_r)")
    update_frequency: Count = Field(description="Make masks at multiples of this step (deltaT)")
    warmup_steps: Count = Field(
        description="Make no mask up to this step (tinit). With 0, PEFT masks before it has scores"
    )
    final_steps: int | None = Field(
        default=None,
        ge=0,
        description="Keep the last mask for this many steps (tfinal). Without it, for a quarter of the run",
    )
    orthogonality_weight: float = Field(
        default=0.5,
        ge=0,
        description="Weight of the orthogonality penalty (orth_reg_weight), which this package's loop adds",
    )
    beta1: Fraction = Field(default=0.85, description="How much the sensitivity is smoothed")
    beta2: Fraction = Field(default=0.85, description="How much its uncertainty is smoothed")

    @model_validator(mode="after")
    def _rank_falls(self) -> Self:
        if self.target_rank >= self.initial_rank:
            raise ValueError(
                f"target_rank {self.target_rank} does not lie below initial_rank {self.initial_rank}, and PEFT fails "
                "when it has nothing to mask; raise initial_rank, or use peft_lora"
            )
        return self


class PeftConfig(Frozen):
    """A tuner of the PEFT library, with PEFT's own settings, which PEFT checks."""

    model_config = ConfigDict(extra="allow")

    type: Text = Field(description="PEFT's name of the tuner, in small letters, or dora, rslora, eva")

    @property
    def settings(self) -> dict[str, Any]:
        """Return what is handed on to PEFT."""
        return dict(self.model_extra or {})


IMAGES_ROUNDED_BY = 128  # as many as GPTQ's paper takes sequences


class AdaptiveBitsConfig(Settings):
    """Choose each layer's bits before training, by what each number format would cost on training images."""

    average_bits: float | None = Field(
        default=None,
        gt=0,
        le=32,
        description="Stored bits for each weight on average over the quantized layers, scales and offsets included",
    )
    total_byte_budget: Count | None = Field(
        default=None, description="Bytes of the packed weights; with ranks: true, also of the float32 adapters"
    )
    ranks: Annotated[bool, OnlyWith(total_byte_budget=...)] = Field(
        default=False, description="Choose each module's rank within the same bytes, instead of rank"
    )
    types: Annotated[tuple[QuantizationType, ...], without_repeats("names a format twice; remove one")] = Field(
        default=("int2", "int4", "int8"), min_length=2, description="The number formats that a layer may get"
    )
    sensitivity: Literal["fisher", "loss"] = Field(
        default="fisher",
        description="How the loss of a layer is predicted. fisher: by the squared error weighted with the "
        "Fisher's diagonal, in one backward pass. loss: by the rise of the loss, in a forward pass "
        "for each type of each layer",
    )
    calibration_images: Count = Field(default=64, description="Measure on this many training images")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        exactly_one(self, "average_bits", "total_byte_budget")
        if len({BITS_OF_TYPE[type] for type in self.types}) == 1:
            raise ValueError("types are all of the same bits, so a budget decides nothing; name others")
        return self


_COURSES = ("linear", "cosine")
Rounding: TypeAlias = Literal["nearest", "gptq"]


class QaLoraConfig(StoredAdapterConfig):
    """Quantization-aware LoRA (arXiv 2309.14717), NF4/FP4 codebooks (arXiv 2305.14314), and a schedule."""

    quantization_bits: Annotated[Bits | None, OnlyWith(adaptive_bits=None)] = Field(
        default=None, description="Bits of a weight; adaptive_bits replaces it"
    )
    quantization_type: Annotated[QuantizationType | None, OnlyWith(adaptive_bits=None)] = Field(
        default=None, description="Number format of the weights; adaptive_bits replaces it"
    )
    quantization_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="How quantized weights replace float weights. constant: from the start. linear, cosine: gradually",
    )
    gradient_scaling_factor: Positive = Field(
        default=1.0, description="Multiply the adapters' gradients by this factor"
    )
    gradient_scaling: Literal["constant", "adaptive"] = Field(
        default="constant",
        description="constant: one factor for all layers. adaptive: each layer's factor is in proportion to its "
        "relative quantization error, with the same mean",
    )
    use_group_quantization: bool = Field(
        description="true: a scale for each group of inputs, and an adapter that merges exactly (QA-LoRA). "
        "false: a scale for each output, and a plain adapter (QLoRA)"
    )
    group_size: Annotated[int, OnlyWith(use_group_quantization=True)] = Field(
        default=32, ge=2, description="The number of inputs that share a scale, with use_group_quantization"
    )
    quantization_offset: bool | None = Field(
        default=None, description="Store an offset beside each scale while training. Without it, if there are groups"
    )
    scale_precision: Literal["fp16", "fp32"] = Field(default="fp16", description="The precision of scales and offsets")
    rounding: Rounding = Field(
        default="nearest",
        description="nearest: each weight by itself. gptq: layer by layer, so that errors make up for each other "
        "on training images (arXiv 2210.17323)",
    )
    calibration_images: Annotated[Count | None, OnlyWith(rounding="gptq")] = Field(
        default=None, description="Training images for rounding: gptq. Without it, 128, or all if there are fewer"
    )
    rank: Count | None = Field(
        default=None,
        description="The rank of every update. Without it, 8, or what ranks, the section "
        "adalora or adaptive_bits decide",
    )
    quantization_warmup_steps: Annotated[int, OnlyWith(quantization_schedule=_COURSES)] = Field(
        default=0, ge=0, description="Train on float weights alone for this many steps"
    )
    quantization_end_step: Annotated[Count | None, OnlyWith(quantization_schedule=_COURSES)] = Field(
        default=None,
        description="From this step on, use quantized weights alone. Without it, after two thirds of the run",
    )
    balance_target: Positive | None = Field(
        default=None,
        description="Hold the ratio of the update's norm to the quantization error's at this "
        "value. Without it, the ratio is only measured",
    )
    balance_by: Annotated[Literal["gradient_scale", "schedule_pace"], OnlyWith(balance_target=...)] = Field(
        default="gradient_scale", description="What changes to hold balance_target"
    )
    adaptive_bits: AdaptiveBitsConfig | None = None

    @property
    def fixed_rank(self) -> int:
        """Return the rank of every site where nothing else decides ranks; 0 where a rule will."""
        return 0 if self.ranks is not None else 8 if self.rank is None else self.rank

    @property
    def pool(self) -> int:
        """Return the inputs per group on which an adapter's update is constant; 1: a plain adapter."""
        return self.group_size if self.use_group_quantization else 1

    @property
    def offset(self) -> bool:
        """Return whether an offset is stored beside each scale while training."""
        return self.use_group_quantization if self.quantization_offset is None else self.quantization_offset

    @property
    def images_to_round_by(self) -> int:
        """Return how many training images `rounding: gptq` takes, if there are as many."""
        return IMAGES_ROUNDED_BY if self.calibration_images is None else self.calibration_images

    @property
    def keeps_codes(self) -> bool:
        """Return whether packed weights depend on more than the float ones, and so are saved with the adapters."""
        return self.rounding == "gptq"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ranks is not None and (self.rank is not None or self.adaptive_bits is not None):
            raise ValueError("ranks has no effect with rank or adaptive_bits; remove one of the two")
        if self.adaptive_bits is not None:
            if self.adaptive_bits.ranks and self.rank is not None:
                raise ValueError("rank has no effect with adaptive_bits.ranks: true; remove it")
        elif self.quantization_bits is None or self.quantization_type is None:
            raise ValueError("give quantization_bits and quantization_type, or adaptive_bits")
        elif self.quantization_bits != (expected := BITS_OF_TYPE[self.quantization_type]):
            raise ValueError(
                f"quantization_type: {self.quantization_type} stores {expected} bits, "
                f"quantization_bits says {self.quantization_bits}; change one of them"
            )
        if self.quantization_end_step is not None and self.quantization_end_step <= self.quantization_warmup_steps:
            raise ValueError("quantization_end_step must lie after quantization_warmup_steps; raise it")
        if self.balance_by == "schedule_pace" and self.quantization_schedule == "constant":
            raise ValueError("balance_by: schedule_pace has no effect with a constant schedule; use linear or cosine")
        return self


@dataclass(frozen=True)
class MethodKind:
    """What can be asked of a method, and how reports show it.

    Attributes:
        name: what a configuration says.
        title: what a report says.
        color: of its marks in figures.
        trains: a probe fits a head on features of the frozen backbone and takes no step.
        settings: the sections of an experiment that it reads, and their models.
        unread: of these sections the settings that have no effect with the method, and what to do instead.
        module: of `methods`, which prepares a model; empty: the one of its name.
    """

    name: str
    title: str
    color: str
    trains: Literal["head", "adapters", "everything"]
    settings: Mapping[str, type[Frozen]] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)
    module: str = ""

    @property
    def may_end_sooner(self) -> bool:
        """Return whether a training may have fewer steps than planned: neither ranks nor bits change by them."""
        return self.trains != "head" and self.settings.keys() <= {"lora"}

    @property
    def without_integers(self) -> str | None:
        """Return why frozen products can't be made in integers; None if they can."""
        if self.trains == "everything":
            return "no layer is frozen"
        return "the layers are PEFT's" if self.name.startswith("peft") else None

    def refuse_unread(self, experiment: BaseModel, info: ValidationInfo) -> None:
        """Refuse settings that have no effect with the method, in a validator of the experiment."""
        problems = {}
        for path, remedy in self.unread.items():
            *sections, name = path.split(".")
            section = functools.reduce(lambda above, below: above and getattr(above, below), sections, experiment)
            if section is not None and is_given(section, name, info):
                problems[path] = f"has no effect with method: {self.name}; {remedy}"
        refuse(experiment, problems)


_OF_ADAPTERS = (
    "rank",
    "ranks",
    "adapter_bits",
    "scale",
    "gradient_scaling_factor",
    "gradient_scaling",
    "balance_target",
    "adaptive_bits.ranks",
)
METHOD_KINDS: dict[str, MethodKind] = {  # in the order in which reports show them
    kind.name: kind
    for kind in (
        MethodKind("linear", "Linear probe", "#6b7780", "head", module="full_precision"),
        MethodKind(
            "qa_linear",
            "Linear probe on low-bit weights",
            "#bbaa66",
            "head",
            {"qa_lora": QaLoraConfig},
            unread={f"qa_lora.{setting}": "there are no adapters, remove it" for setting in _OF_ADAPTERS},
            module="quantized",
        ),
        MethodKind("full", "Full fine-tuning", "#cc79a7", "everything", module="full_precision"),
        MethodKind("lora", "LoRA, fixed rank", "#0072b2", "adapters", {"lora": LoraConfig}, module="full_precision"),
        MethodKind("peft_lora", "LoRA by PEFT", "#56b4e9", "adapters", {"peft_lora": PeftLoraConfig}, module="peft"),
        MethodKind("adalora", "AdaLoRA", "#d55e00", "adapters", {"adalora": AdaLoraConfig}, module="full_precision"),
        MethodKind(
            "peft_adalora", "AdaLoRA by PEFT", "#e69f00", "adapters", {"peft_adalora": PeftAdaLoraConfig}, module="peft"
        ),
        MethodKind("qa_lora", "QA-LoRA", "#009e73", "adapters", {"qa_lora": QaLoraConfig}, module="quantized"),
        MethodKind(
            "qa_adalora",
            "AdaLoRA + QA-LoRA",
            "#8844ee",
            "adapters",
            {"adalora": AdaLoraConfig, "qa_lora": QaLoraConfig},
            unread={
                "qa_lora.rank": "adalora decides ranks, remove it",
                "qa_lora.ranks": "adalora decides ranks, remove it",
                "qa_lora.adapter_bits": "its adapters are stored in float32, remove it",
                "qa_lora.adaptive_bits.ranks": "adalora decides ranks, remove it",
                "adalora.scale": "set qa_lora.scale",
                "adalora.targets": "set qa_lora.targets",
            },
            module="quantized",
        ),
        MethodKind("peft", "Tuner of PEFT", "#775533", "adapters", {"peft": PeftConfig}),
    )
}
# Every section that an experiment may have, and the model of its settings; a probe has none of its own.
SECTIONS: dict[str, type[Frozen]] = {
    section: settings
    for kind in METHOD_KINDS.values()
    if kind.trains != "head"
    for section, settings in kind.settings.items()
}
# Strengths of a probe's penalty, see `training.linear_probe`; validation chooses.
PROBE_L2 = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
