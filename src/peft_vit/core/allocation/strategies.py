"""From scores to ranks: what a rank costs, how much is allowed at which step, and who gets it. Steps count from 1.

A budget has a unit: ranks, in which each rank costs 1, or another, in which a rank of one site may cost more than a
rank of another. A score per unit of cost then replaces the score:

    proportional   what is spent on a site is in proportion to its score; whole ranks by largest remainder
    threshold      sites whose score per cost is at least tau times the mean share in proportion to their scores, the
                   others keep the minimum
    top_k          the best k sites by score per cost (by default half), with equal spending; others keep the minimum
    global         AdaLoRA's ranking of all triplets (arXiv 2303.10512, sec. 3.3), by score per cost; one that no
                   longer fits is passed over

In ranks the budget is met exactly: the lesser of the budget and the sum of maxima. In other units it is never
exceeded, and what is left is less than one more rank of any site with room costs: what the chosen sites can't take
goes to the others. Ties go to the larger score, then to the first site.

All arithmetic is in whole numbers: equal shares are equal, the order of the sites changes no sum, and a budget of
many millions of bytes is not exceeded by a rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from peft_vit.base.errors import UserError
from peft_vit.core.backbones import Site
from peft_vit.core.config import AdaLoraConfig, BudgetUnit, Strategy

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_SCALES_BYTES = 4  # of a rank's row and column in 1 to 8 bits, float16 each


@dataclass(frozen=True)
class Bounds:
    """Smallest and largest rank of each site, (sites,) each."""

    minimum: Ints
    maximum: Ints


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
        """Return the budget after the last decision at or before `step`.

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
    """Return the cost of one rank of each site in the unit of the budget, (sites,).

    A triplet of a site holds (in / pool) + out trained values, in the svd form one more. In ranks each triplet costs
    1, in parameters its values, in bytes 4 a value (adapters train and are stored in float32), in macs one
    multiply-accumulate a value and token: the two skinny products of the forward pass of one image.

    Args:
        config: the `adalora` section.
        sites: that carry adapters.
        pool: inputs per group on which an update is constant.
    """
    return rank_costs(config.budget.unit, sites, pool=pool, svd=config.parametrization == "svd")


def rank_costs(
    unit: BudgetUnit, sites: Sequence[Site], *, pool: int = 1, svd: bool = False, bits: int | None = None
) -> Ints:
    """Return the cost of one rank of each site in a unit, (sites,), see `costs_for`.

    Bytes are those of a file with so many bits a value, the two scales included; None: of float32.
    """
    if unit == "ranks":
        return np.ones(len(sites), dtype=np.int64)
    values = np.array([site.in_features // pool + site.out_features + svd for site in sites], dtype=np.int64)
    if unit == "macs":
        return values * np.array([site.tokens for site in sites], dtype=np.int64)
    if unit == "parameters":
        return values
    if bits is None:
        return values * 4
    return -(-values * bits // 8) + (_SCALES_BYTES if bits < 16 else 0)


def largest_ranks(sites: Sequence[Site], pool: int = 1) -> Ints:
    """Return the rank of each site above which more can't change its update, min(in / pool, out), (sites,)."""
    return np.array([min(site.in_features // pool, site.out_features) for site in sites], dtype=np.int64)


def limited(largest: Ints, limit: int | None, *, field: str) -> Ints:
    """Return the largest ranks, (sites,), under a limit; refuse one above all of them, which never holds."""
    if limit is None:
        return largest
    if limit > largest.max():
        raise UserError(f"{limit} lies above the widest module's {largest.max()}; lower it", field=field)
    return np.minimum(largest, limit)


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
                f"{initial} {unit} are more than the {most} that the modules can hold; lower it",
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
    maximum = limited(largest, config.maximum_rank, field="adalora.maximum_rank")  # (sites,)
    minimum = np.full(len(largest), config.minimum_rank, dtype=np.int64)
    if (minimum > maximum).any():
        raise UserError(
            f"{config.minimum_rank} lies above a module's largest rank {maximum.min()}; lower it",
            field="adalora.minimum_rank",
        )
    least, most = max(int(costs @ minimum), int(costs.min())), int(costs @ maximum)
    unit, total, field = config.budget
    if not least <= total <= most:
        reason = f"minimum ranks of {len(minimum)} modules" if config.minimum_rank else "a rank of the cheapest module"
        raise UserError(
            f"expected {least} ({reason}) to {most} {unit} (what the modules can hold), got {total}",
            field=f"adalora.{field}",
        )
    if total - int(costs @ minimum) < costs.min():
        raise UserError(
            f"the minimum ranks of {len(minimum)} modules take the {total} {unit} of {field}, and nothing is left to "
            "decide; lower it",
            field="adalora.minimum_rank",
        )
    sites = len(minimum)
    if config.top_k is not None and config.top_k >= sites:
        reason = f"exceeds the {sites} modules" if config.top_k > sites else "is every module, so scores decide nothing"
        raise UserError(f"{config.top_k} {reason}; lower it", field="adalora.top_k")
    if config.threshold_tau > sites:
        raise UserError(
            f"no score can be {config.threshold_tau} times the mean of {sites} modules; lower it",
            field="adalora.threshold_tau",
        )
    return Bounds(minimum, maximum)


def even_ranks(budget: int, bounds: Bounds, costs: Ints) -> Ints:
    """Return ranks as equal as bounds and budget allow, (sites,), with which a run starts."""
    # What is spent on a site is in proportion to its score: scores like costs give equal ranks.
    return allocate("proportional", costs.astype(np.float64), budget, bounds, costs=costs)


def allocate(
    strategy: Strategy,
    scores: Floats,
    budget: int,
    bounds: Bounds,
    *,
    costs: Ints | None = None,
    threshold_tau: float = 1.0,
    top_k: int | None = None,
    triplet_scores: Sequence[Floats] | None = None,
) -> Ints:
    """Return the rank of each site, (sites,).

    Args:
        strategy: see the module.
        scores: non-negative score of each site, (sites,).
        budget: over all sites, in the unit of the costs; at least what the minima cost.
        bounds: of each site.
        costs: of one rank of each site, (sites,), at least 1; 1 each if left out.
        threshold_tau: for `threshold`.
        top_k: for `top_k`.
        triplet_scores: for `global`: per site the scores of its present triplets.

    Raises:
        UserError: if a score of a site is negative or not finite.
    """
    sites = _Sites.of(scores, np.ones(len(scores), np.int64) if costs is None else costs)
    low, high = bounds.minimum.tolist(), bounds.maximum.tolist()
    if strategy == "global":
        assert triplet_scores is not None
        ranks = sites.best_triplets(triplet_scores, budget, low, high)
    else:
        chosen, weights = set(range(len(scores))), sites.worth
        if strategy == "threshold":
            chosen = sites.above(threshold_tau)
        elif strategy == "top_k":
            wanted = max(1, len(scores) // 2) if top_k is None else top_k
            chosen = {site for site, place in enumerate(sites.place) if place < wanted}
            weights = _per_cost([1.0] * len(scores), sites.costs)
        reach = [high[site] if site in chosen else low[site] for site in range(len(scores))]
        ranks = sites.share(weights, budget, low, reach)
    return np.array(sites.share(sites.worth, budget, ranks, high), dtype=np.int64)  # what is left, to all


def reach_threshold(scores: Floats, costs: Ints, threshold_tau: float) -> bool:
    """Return whether any site reaches the bar of `threshold`; arguments as for `allocate`."""
    return bool(_Sites.of(scores, costs).above(threshold_tau))


def _per_cost(values: Sequence[float], costs: Sequence[int]) -> list[int]:
    """Return values over costs, all times the factor that makes them whole; no digit is lost."""
    ratios = [value.as_integer_ratio() for value in values]
    denominator = max((below for _, below in ratios), default=1)  # of floats: powers of two
    multiple = math.lcm(*costs)
    return [
        above * (denominator // below) * (multiple // cost) for (above, below), cost in zip(ratios, costs, strict=True)
    ]


@dataclass(frozen=True)
class _Sites:
    """Costs and scores of the sites, for the strategies.

    Attributes:
        costs: of one rank.
        worth: score per unit of cost, times a factor that all share.
        place: 0 for the best site by worth, then by score, then by order.
    """

    costs: list[int]
    worth: list[int]
    place: list[int]

    @classmethod
    def of(cls, scores: Floats, costs: Ints) -> _Sites:
        if not np.all(np.isfinite(scores)) or np.any(scores < 0):
            raise UserError("importance scores must be finite and not negative", field="importance_scores")
        worth = _per_cost(scores.tolist(), costs.tolist())
        best_first = sorted(range(len(worth)), key=lambda site: (-worth[site], -scores[site], site))
        return cls(costs.tolist(), worth, np.argsort(best_first).tolist())

    def cost(self, ranks: Sequence[int]) -> int:
        """Return the total cost of ranks."""
        return sum(cost * rank for cost, rank in zip(self.costs, ranks, strict=True))

    def above(self, threshold_tau: float) -> set[int]:
        """Return the sites whose worth reaches so many times the mean."""
        bar = Fraction(threshold_tau) * sum(self.worth) / len(self.worth)
        return {site for site, worth in enumerate(self.worth) if worth >= bar}

    def share(self, weights: list[int], budget: int, low: list[int], high: list[int]) -> list[int]:
        """Return ranks within bounds in proportion to the weights, as many as the budget buys, by largest remainder.

        Quotas are clip(level * weight, low, high) at the level at which they cost the budget (water-filling). Sites
        without weight count only once the others are full; then equal amounts are spent on them.
        """
        if self.cost(high) <= budget:
            return list(high)
        full = [most if weight else least for weight, least, most in zip(weights, low, high, strict=True)]
        if self.cost(full) <= budget:
            low, equal = full, _per_cost([1.0] * len(weights), self.costs)
            weights = [0 if weight else share for weight, share in zip(weights, equal, strict=True)]
        ranks, remainders = list(low), [0] * len(low)  # of the quotas, over a denominator that all share
        free = [site for site, weight in enumerate(weights) if weight]
        left = budget - sum(self.costs[site] * rank for site, rank in enumerate(low) if not weights[site])
        while free:
            total = sum(self.costs[site] * weights[site] for site in free)  # the level is left / total
            below = [site for site in free if left * weights[site] < low[site] * total]
            above = [site for site in free if left * weights[site] > high[site] * total]
            if not below and not above:
                for site in free:
                    ranks[site], remainders[site] = divmod(left * weights[site], total)
                break
            missing = sum(self.costs[site] * (low[site] * total - left * weights[site]) for site in below)
            surplus = sum(self.costs[site] * (left * weights[site] - high[site] * total) for site in above)
            # Raising those below takes more than cutting those above gives: the level can only fall, so they stay.
            held, bound = (below, low) if missing >= surplus else (above, high)
            for site in held:
                ranks[site] = bound[site]
                left -= self.costs[site] * bound[site]
            free = [site for site in free if site not in held]
        left = budget - self.cost(ranks)
        order = sorted(range(len(ranks)), key=lambda site: (-remainders[site], self.place[site]))
        given = True
        while given:  # once in ranks; in other units what does not buy a dear rank may buy several cheap ones
            given = False
            for site in order:
                if ranks[site] < high[site] and self.costs[site] <= left:
                    ranks[site] += 1
                    left -= self.costs[site]
                    given = True
        return ranks

    def best_triplets(self, triplets: Sequence[Floats], budget: int, low: list[int], high: list[int]) -> list[int]:
        """Fill each site's minimum, then take present triplets, the best first, as far as they fit."""
        ranks, left = list(low), budget - self.cost(low)
        owners, scores = [], []  # of triplets beyond each site's minimum
        for site, values in enumerate(triplets):
            best_first = np.sort(values)[::-1][low[site] : high[site]]  # (rank,), without the minimum
            owners += [site] * len(best_first)
            scores += best_first.tolist()
        worth = _per_cost(scores, [self.costs[site] for site in owners])
        for _, _, site in sorted((-value, self.place[site], site) for value, site in zip(worth, owners, strict=True)):
            if self.costs[site] <= left:
                ranks[site] += 1
                left -= self.costs[site]
        return ranks
