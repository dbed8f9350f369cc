"""What can be asked of ranks that move between sites under a budget (AdaLoRA, arXiv 2303.10512): section `adalora`."""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

from pydantic import Field, ValidationInfo, model_validator

from peft_vit.config.importance import GRADIENT_METRICS, Metric
from peft_vit.settings import AdapterConfig, is_given

Strategy = Literal["proportional", "threshold", "top_k", "global"]
BudgetUnit = Literal["ranks", "parameters", "bytes", "macs"]


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
    total_parameter_budget: int | None = Field(default=None, ge=1, description="trainable parameters, head not counted")
    total_byte_budget: int | None = Field(default=None, ge=1, description="bytes of these values in float32")
    total_mac_budget: int | None = Field(
        default=None, ge=1, description="multiply-accumulates of the adapters' own products, forward, for one image"
    )
    allocation_strategy: Strategy = Field(description="how scores become ranks")
    importance_metric: Metric = Field(description="what scores a rank, or a site")
    update_frequency: int = Field(ge=1, description="steps between reallocations")
    warmup_steps: int = Field(ge=1, description="steps before the first reallocation")
    final_steps: int | None = Field(default=None, ge=0, description="last steps with frozen ranks; default a quarter")
    budget_schedule: Literal["cubic", "constant"] = Field(
        default="cubic", description="cubic: the budget comes down from initial_budget to the total"
    )
    initial_budget: int | None = Field(
        default=None,
        ge=1,
        description="budget during warm-up under cubic, in the unit of the total; default 1.5 x total, at least one "
        "rank a site",
    )
    minimum_rank: int = Field(default=0, ge=0, le=65_536, description="of a site; 0: it may lose its update")
    maximum_rank: int | None = Field(default=None, ge=1, description="default: the smaller side of the matrix")
    parametrization: Literal["product", "svd"] = Field(
        default="product", description="of an update: B A as in LoRA, or P diag(lambda) Q as in AdaLoRA"
    )
    factor_start: Literal["normal", "orthonormal"] = Field(
        default="normal", description="svd form: factors from N(0, 0.02^2) as published, or orthonormal ones"
    )
    lambda_gain: float = Field(
        default=1.0,
        gt=0,
        description="svd form: factor k on lambda; under AdamW a learning rate k times as high for it, under SGD k^2",
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
