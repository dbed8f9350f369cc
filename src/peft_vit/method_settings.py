"""Settings of the methods: one frozen model a section, checked as far as the file alone tells.

`config` puts them into a study; they stand apart only so that each file can be read at once.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

Matrix = Literal["query", "key", "value", "out", "fc1", "fc2"]
MATRICES: tuple[Matrix, ...] = ("query", "key", "value", "out", "fc1", "fc2")
FUSED: tuple[Matrix, ...] = ("query", "key", "value")  # timm computes them as one matrix, qkv
# Where an adapter may sit: on a matrix, or on timm's fused query, key and value, which PEFT takes as one module.
SiteMatrix = Literal["qkv", "query", "key", "value", "out", "fc1", "fc2"]
SITE_MATRICES: tuple[SiteMatrix, ...] = ("qkv", *MATRICES)
Strategy = Literal["proportional", "threshold", "top_k", "global"]
Metric = Literal["magnitude", "gradient_norm", "fisher", "sensitivity", "random", "uniform"]
GRADIENT_METRICS: tuple[Metric, ...] = ("gradient_norm", "fisher", "sensitivity")
BudgetUnit = Literal["ranks", "parameters", "bytes", "macs"]
QuantizationType = Literal["nf4", "fp4", "int2", "int4", "int8"]
BITS_OF_TYPE: dict[str, int] = {"nf4": 4, "fp4": 4, "int2": 2, "int4": 4, "int8": 8}


# Strengths of a probe's penalty, see `training.linear_probe`; validation chooses.
PROBE_L2 = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


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


class Budget(NamedTuple):
    """What all sites together may hold once the schedule has come down."""

    unit: BudgetUnit
    total: int
    field: str  # the setting that gives it


_BUDGETS: dict[str, BudgetUnit] = {
    "total_rank_budget": "ranks",
    "total_parameter_budget": "parameters",
    "total_byte_budget": "bytes",
    "total_mac_budget": "macs",
}

# A setting, and with which values of another one it is read.
_ONLY_WITH: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("initial_budget", "budget_schedule", ("cubic",)),
    ("factor_start", "parametrization", ("svd",)),
    ("lambda_gain", "parametrization", ("svd",)),
    ("importance_gradient", "importance_metric", GRADIENT_METRICS),
    ("sensitivity_beta", "importance_metric", GRADIENT_METRICS),
    ("uncertainty_beta", "importance_metric", ("sensitivity",)),
    ("top_k", "allocation_strategy", ("top_k",)),
    ("threshold_tau", "allocation_strategy", ("threshold",)),
)


class AdaLoraConfig(AdapterConfig):
    """Adaptive ranks under a budget (arXiv 2303.10512 for the budget's course and the sensitivity).

    The budget is given in exactly one unit, see `allocation.budget.costs_for` for what a rank costs in each.
    """

    total_rank_budget: int | None = Field(default=None, ge=1, description="ranks over all sites")
    total_parameter_budget: int | None = Field(default=None, ge=1, description="trained values, head not counted")
    total_byte_budget: int | None = Field(default=None, ge=1, description="bytes of these values in float32")
    total_mac_budget: int | None = Field(
        default=None, ge=1, description="multiply-accumulates of the adapters' own products, forward, for one image"
    )
    allocation_strategy: Strategy
    importance_metric: Metric
    update_frequency: int = Field(ge=1, description="steps between reallocations")
    warmup_steps: int = Field(ge=1, description="steps before the first reallocation")
    final_steps: int | None = Field(default=None, ge=0, description="last steps with frozen ranks; default a quarter")
    budget_schedule: Literal["cubic", "constant"] = "cubic"
    initial_budget: int | None = Field(
        default=None,
        ge=1,
        description="budget during warm-up under cubic, in the unit of the total; default 1.5 x total, at least one "
        "rank a site",
    )
    minimum_rank: int = Field(default=0, ge=0, le=65_536)
    maximum_rank: int | None = Field(default=None, ge=1, description="default: the smaller side of the matrix")
    parametrization: Literal["product", "svd"] = "product"
    factor_start: Literal["normal", "orthonormal"] = Field(
        default="normal", description="svd form: factors from N(0, 0.02^2) as published, or orthonormal ones"
    )
    lambda_gain: float = Field(
        default=1.0,
        gt=0,
        description="svd form: factor k on lambda; under AdamW a learning rate k times as high for it, under SGD k^2",
    )
    prune: Literal["physical", "reversible"] = Field(
        default="physical",
        description="reversible: losers are set to zero and may come back; tensors shrink at the last decision",
    )
    importance_gradient: Literal["task", "task_and_penalty"] = Field(
        default="task",
        description="whose gradient is scored; the official AdaLoRA code scores with the penalty's. Read by the "
        "training loop: in another one it is decided by where the scores are updated",
    )
    orthogonality_weight: float | None = Field(default=None, ge=0, description="default 0.1 for svd, none for product")
    sensitivity_beta: float = Field(default=0.85, gt=0, lt=1, description="smoothing of scores (b1)")
    uncertainty_beta: float = Field(default=0.85, gt=0, lt=1, description="smoothing of their spread (b2)")
    threshold_tau: float = Field(default=1.0, gt=0, description="threshold strategy: multiple of the mean score")
    top_k: int | None = Field(default=None, ge=1, description="top_k strategy: number of sites; default half")

    @property
    def budget(self) -> Budget:
        """Return the budget in the one unit that was given."""
        return next(
            Budget(unit, total, field)
            for field, unit in _BUDGETS.items()
            if (total := getattr(self, field)) is not None
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [field for field in _BUDGETS if getattr(self, field) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(_BUDGETS)}; got {' and '.join(given) or 'none'}")
        if self.maximum_rank is not None and self.maximum_rank < max(1, self.minimum_rank):
            raise ValueError("maximum_rank lies below minimum_rank (and below 1); raise it")
        if self.parametrization == "product" and self.orthogonality_weight:
            raise ValueError("orthogonality_weight needs parametrization: svd; the plain product has no such penalty")
        return self

    @model_validator(mode="after")
    def _settings_have_an_effect(self, info: ValidationInfo) -> Self:
        for field, decides, values in _ONLY_WITH:
            value = getattr(self, decides)
            if value not in values and getattr(self, field) is not None and is_given(self, field, info):
                raise ValueError(f"{field} has no effect with {decides}: {value}; remove it")
        if self.initial_budget is not None and self.initial_budget < self.budget.total:
            raise ValueError(f"initial_budget lies below {self.budget.field}; the cubic schedule only descends")
        if self.importance_gradient == "task_and_penalty" and (
            self.parametrization == "product" or self.orthogonality_weight == 0
        ):
            raise ValueError(
                "importance_gradient: task_and_penalty needs a penalty: parametrization: svd with an "
                "orthogonality_weight above 0"
            )
        return self

    @model_validator(mode="after")
    def _something_is_decided(self) -> Self:
        if self.budget_schedule == "constant" and self.prune == "reversible":
            raise ValueError(
                "prune: reversible has no effect with budget_schedule: constant, where no triplet ever loses; "
                "use cubic or prune: physical"
            )
        if self.allocation_strategy == "global" and self.budget_schedule == "constant":
            raise ValueError(
                "allocation_strategy: global has no effect with budget_schedule: constant, where every triplet stays; "
                "use cubic or another strategy"
            )
        if self.allocation_strategy == "global" and self.importance_metric == "uniform":
            raise ValueError(
                "importance_metric: uniform is no control of allocation_strategy: global: of equal triplets those of "
                "the last sites go; use it with proportional"
            )
        return self


class AdaptiveBitsConfig(Frozen):
    """Bits of each layer, chosen before training from what quantizing it to each type would cost on training images."""

    average_bits: float | None = Field(
        default=None, gt=0, le=32, description="stored bits a weight over the quantized layers, scales and offsets too"
    )
    total_byte_budget: int | None = Field(
        default=None, ge=1, description="bytes of the packed weights; with ranks: true, of the float32 adapters too"
    )
    ranks: bool = Field(default=False, description="choose each site's rank under the same bytes; in place of rank")
    types: tuple[QuantizationType, ...] = Field(default=("int2", "int4", "int8"), min_length=2)
    sensitivity: Literal["fisher", "loss"] = Field(
        default="fisher",
        description="fisher: squared error weighted with the Fisher's diagonal, one backward pass; loss: rise of the "
        "loss, a forward pass for each type of each layer. See allocation.bit_sensitivity",
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

    quantization_bits: Literal[2, 4, 8] | None = Field(default=None, description="of one code; not with adaptive_bits")
    quantization_type: QuantizationType | None = Field(default=None, description="not with adaptive_bits")
    quantization_schedule: Literal["constant", "linear", "cosine"] = "constant"
    gradient_scaling_factor: float = Field(default=1.0, gt=0, description="factor on the adapters' gradients")
    gradient_scaling: Literal["constant", "adaptive"] = Field(
        default="constant",
        description="adaptive: each layer's factor in proportion to its relative quantization error, mean factor kept",
    )
    use_group_quantization: bool
    group_size: int = Field(default=32, ge=2, description="inputs that share a scale; with use_group_quantization")
    quantization_offset: bool | None = Field(
        default=None, description="store an offset beside each scale while training; default: with groups"
    )
    scale_precision: Literal["fp16", "fp32"] = Field(default="fp16", description="of scales and offsets")
    rank: int | None = Field(
        default=None, ge=1, description="default 8; not where an adalora section or adaptive_bits decides ranks"
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
        return self.use_group_quantization if self.quantization_offset is None else self.quantization_offset

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
        if self.quantization_schedule == "constant" and (
            self.quantization_warmup_steps or self.quantization_end_step is not None
        ):
            raise ValueError(
                "quantization_warmup_steps and quantization_end_step have no effect with a constant schedule"
            )
        if self.quantization_end_step is not None and self.quantization_end_step <= self.quantization_warmup_steps:
            raise ValueError("quantization_end_step must lie after quantization_warmup_steps; raise it")
        if self.balance_target is None and is_given(self, "balance_by", info):
            raise ValueError("balance_by has no effect without balance_target; remove it")
        if self.balance_by == "schedule_pace" and self.quantization_schedule == "constant":
            raise ValueError("balance_by: schedule_pace has no effect with a constant schedule; use linear or cosine")
        return self


class _PeftConfig(AdapterConfig):
    @model_validator(mode="after")
    def _fused_matrix_whole(self) -> Self:
        fused = [matrix for matrix in FUSED if matrix in self.targets]
        if len(fused) not in (0, len(FUSED)):
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
