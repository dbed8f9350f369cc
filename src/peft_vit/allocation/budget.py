"""What a rank costs, how much is allowed at which step, and at which steps ranks are decided. Steps count from 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peft_vit.allocation.strategies import Bounds, Ints
from peft_vit.backbones import Site
from peft_vit.config import AdaLoraConfig, BudgetUnit
from peft_vit.errors import UserError


@dataclass(frozen=True)
class BudgetSchedule:
    """The budget's course over one run, in the unit of the budget.

    Attributes:
        initial: allowed during warm-up, b0.
        total: allowed in the end, b_T.
        warmup_steps: t_i, the step of the first decision.
        update_frequency: steps between decisions.
        final_steps: t_f, steps at the end with frozen ranks; the last decision falls just before them.
        total_steps: T.
    """

    initial: int
    total: int
    warmup_steps: int
    update_frequency: int
    final_steps: int
    total_steps: int

    def __post_init__(self) -> None:
        if self.warmup_steps > self.last_update:
            raise UserError(
                f"warmup_steps {self.warmup_steps} plus final_steps {self.final_steps} leave no step for a decision "
                f"in {self.total_steps} steps; shorten them or train longer",
                field="adalora.warmup_steps",
            )

    @property
    def last_update(self) -> int:
        """Return the step of the last decision, T - t_f."""
        return self.total_steps - self.final_steps

    def last_due(self, step: int) -> int:
        """Return the last step, `step` included, after which ranks are decided; 0 if there was none yet."""
        if step < self.warmup_steps:
            return 0
        if step >= self.last_update:
            return self.last_update
        return step - (step - self.warmup_steps) % self.update_frequency

    def budget_at(self, step: int) -> int:
        """Return what is allowed while no later decision was taken than the one at or before `step`.

        Cubic between warm-up and the last decision (arXiv 2303.10512, sec. 3.3 and appendix A):
        b_T + (b0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3, rounded down as in the official code. It moves only at
        decisions.
        """
        decided = self.last_due(step)
        if decided == 0:
            return self.initial
        if decided == self.last_update:
            return self.total
        span = self.last_update - self.warmup_steps
        left = self.last_update - decided
        # In integers: a float could land just below a whole number and be rounded down to the one before.
        return self.total + (self.initial - self.total) * left**3 // span**3


def costs_for(config: AdaLoraConfig, sites: Sequence[Site], pool: int = 1) -> Ints:
    """Return what one rank of each site costs in the unit of the budget, (sites,).

    A triplet of a site holds (in / pool) + out trained values, in the svd form one more. In ranks each triplet costs
    1, in parameters its values, in bytes 4 a value (adapters train and are stored in float32), in macs one
    multiply-accumulate a value and token: the two skinny products of the forward pass of one image.

    Args:
        config: the `adalora` section.
        sites: that carry adapters.
        pool: inputs per group on which an update is constant.
    """
    return rank_costs(config.budget.unit, sites, pool=pool, svd=config.parametrization == "svd")


def rank_costs(unit: BudgetUnit, sites: Sequence[Site], *, pool: int = 1, svd: bool = False) -> Ints:
    """Return what one rank of each site costs in a unit, (sites,), see `costs_for`."""
    if unit == "ranks":
        return np.ones(len(sites), dtype=np.int64)
    values = np.array([site.in_features // pool + site.out_features + svd for site in sites], dtype=np.int64)
    if unit == "macs":
        return values * np.array([site.tokens for site in sites], dtype=np.int64)
    return values * {"parameters": 1, "bytes": 4}[unit]


def largest_ranks(sites: Sequence[Site], pool: int = 1) -> Ints:
    """Return the rank of each site above which more can't change its update, min(in / pool, out), (sites,)."""
    return np.array([min(site.in_features // pool, site.out_features) for site in sites], dtype=np.int64)


def schedule_for(config: AdaLoraConfig, total_steps: int, bounds: Bounds, costs: Ints) -> BudgetSchedule:
    """Return the schedule of a configuration, in the unit of its budget.

    Raises:
        UserError: if the initial budget is more than the sites can hold, or the steps leave none for a decision.
    """
    unit, total, _ = config.budget
    initial, most = total, int(costs @ bounds.maximum)
    if config.initial_budget is not None:
        initial = config.initial_budget
        if initial > most:
            raise UserError(
                f"{initial} {unit} are more than the {most} that the sites can hold; lower it",
                field="adalora.initial_budget",
            )
    elif config.budget_schedule == "cubic":
        # AdaLoRA starts at 1.5 times its target; and below one rank a site, a site could never show what it is worth.
        initial = max(min(max(round(1.5 * total), int(costs.sum())), most), total)
    final_steps = total_steps // 4 if config.final_steps is None else config.final_steps
    return BudgetSchedule(initial, total, config.warmup_steps, config.update_frequency, final_steps, total_steps)


def bounds_for(config: AdaLoraConfig, largest: Ints, costs: Ints) -> Bounds:
    """Return each site's bounds, and refuse a budget that they can't meet, or under which nothing is decided.

    Args:
        config: the `adalora` section.
        largest: rank of each site, from `largest_ranks`.
        costs: of one rank of each site, from `costs_for`.

    Raises:
        UserError: naming the setting and what the sites allow.
    """
    if config.maximum_rank is not None and config.maximum_rank > largest.max():
        raise UserError(
            f"{config.maximum_rank} lies above the widest site's {largest.max()}; lower it",
            field="adalora.maximum_rank",
        )
    maximum = largest if config.maximum_rank is None else np.minimum(largest, config.maximum_rank)
    minimum = np.full(len(largest), config.minimum_rank, dtype=np.int64)
    if (minimum > maximum).any():
        raise UserError(
            f"{config.minimum_rank} lies above a site's largest rank {maximum.min()}; lower it",
            field="adalora.minimum_rank",
        )
    least, most = max(int(costs @ minimum), int(costs.min())), int(costs @ maximum)
    unit, total, field = config.budget
    if not least <= total <= most:
        reason = f"minimum ranks of {len(minimum)} sites" if config.minimum_rank else "one rank of the cheapest site"
        raise UserError(
            f"expected {least} ({reason}) to {most} {unit} (what the sites can hold), got {total}",
            field=f"adalora.{field}",
        )
    if total - int(costs @ minimum) < costs.min():
        raise UserError(
            f"the minimum ranks of {len(minimum)} sites take the {total} {unit} of {field}, and nothing is left to "
            "decide; lower it",
            field="adalora.minimum_rank",
        )
    sites = len(minimum)
    if config.top_k is not None and config.top_k >= sites:
        reason = f"exceeds the {sites} sites" if config.top_k > sites else "is every site, and scores decide nothing"
        raise UserError(f"{config.top_k} {reason}; lower it", field="adalora.top_k")
    if config.threshold_tau > sites:
        raise UserError(
            f"no score can be {config.threshold_tau} times the mean of {sites} sites; lower it",
            field="adalora.threshold_tau",
        )
    return Bounds(minimum, maximum)
