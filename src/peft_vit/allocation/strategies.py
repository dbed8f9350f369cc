"""From scores to ranks: pure functions of scores, budget, bounds and costs.

A budget has a unit: ranks, in which each rank costs 1, or another, in which a rank of one site may cost more than a
rank of another. A score per unit of cost then takes the place of the score:

    proportional   what is spent on a site is in proportion to its score; whole ranks by largest remainder
    threshold      sites whose score per cost is at least tau times the mean share in proportion to their scores, the
                   others keep the minimum
    top_k          the best k sites by score per cost (by default half), with equal spending; others keep the minimum
    global         AdaLoRA's ranking of all triplets (arXiv 2303.10512, sec. 3.3), by score per cost; one that no
                   longer fits is passed over

In ranks the budget is met exactly: the lesser of the budget and the sum of maxima. In other units it is never
exceeded, and what is left is less than one more rank of any site with room costs: what the chosen sites can't take
goes to the others. Ties go to the larger score, then to the first site.

All arithmetic is in whole numbers: equal shares are equal, the order of the sites changes no sum, and a budget of many
millions of bytes is not exceeded by a rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from peft_vit.config import Strategy
from peft_vit.errors import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Bounds:
    """Smallest and largest rank of each site, (sites,) each."""

    minimum: Ints
    maximum: Ints


@dataclass(frozen=True)
class _Sites:
    """What the strategies need to know of each site, in whole numbers.

    Attributes:
        costs: of one rank.
        worth: score per unit of cost, times a factor that all share.
        place: 0 for the best site by worth, then by score, then by order.
    """

    costs: list[int]
    worth: list[int]
    place: list[int]

    def cost(self, ranks: Sequence[int]) -> int:
        """Return what ranks cost together."""
        return sum(cost * rank for cost, rank in zip(self.costs, ranks, strict=True))


def even_ranks(budget: int, bounds: Bounds, costs: Ints) -> Ints:
    """Return ranks as equal as the bounds and the budget allow, (sites,); what a run starts with."""
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
        budget: over all sites, in the unit of the costs.
        bounds: of each site.
        costs: of one rank of each site, (sites,), at least 1; 1 each if left out.
        threshold_tau: for `threshold`.
        top_k: for `top_k`.
        triplet_scores: for `global`: per site the scores of its present triplets.

    Raises:
        UserError: if the minima cost more than the budget, a score is negative or not finite, or a cost below 1.
    """
    _check_scores(scores)
    costs = np.ones(len(scores), np.int64) if costs is None else costs
    sites = _sites(scores, costs)
    low, high = [int(rank) for rank in bounds.minimum], [int(rank) for rank in bounds.maximum]
    if budget < sites.cost(low):
        raise UserError(
            f"{budget} lies below what the sites' minimum ranks cost, {sites.cost(low)} together; raise it",
            field="budget",
        )
    if strategy == "global":
        if triplet_scores is None:
            raise UserError("the global strategy ranks triplets; give their scores", field="triplet_scores")
        ranks = _keep_best_triplets(sites, triplet_scores, budget, low, high)
    else:
        chosen = set(range(len(scores)))
        if strategy == "threshold":
            chosen = reach_threshold(scores, costs, threshold_tau)
        elif strategy == "top_k":
            wanted = max(1, len(scores) // 2) if top_k is None else top_k
            chosen = {site for site, place in enumerate(sites.place) if place < wanted}
        reach = [most if site in chosen else least for site, (least, most) in enumerate(zip(low, high, strict=True))]
        weights = _per_cost([1.0] * len(scores), sites.costs) if strategy == "top_k" else sites.worth
        ranks = _share(sites, weights, budget, low, reach)
    # What is left goes to whoever can take it.
    return np.array(_share(sites, sites.worth, budget, ranks, high), dtype=np.int64)


def reach_threshold(scores: Floats, costs: Ints, threshold_tau: float) -> set[int]:
    """Return the sites that `threshold` chooses; arguments as for `allocate`."""
    worth = _sites(scores, costs).worth
    bar = Fraction(threshold_tau) * sum(worth) / len(worth)
    return {site for site, one in enumerate(worth) if one >= bar}


def _check_scores(scores: Floats) -> None:
    if not np.all(np.isfinite(scores)) or np.any(scores < 0):
        raise UserError("importance scores must be finite and not negative", field="importance_scores")


def _sites(scores: Floats, costs: Ints) -> _Sites:
    if np.any(costs < 1):
        raise UserError(f"a rank costs at least 1, got {costs.min()}", field="costs")
    whole_costs = [int(cost) for cost in costs]
    worth = _per_cost([float(score) for score in scores], whole_costs)
    best_first = sorted(range(len(worth)), key=lambda site: (-worth[site], -scores[site], site))
    place = [0] * len(worth)
    for position, site in enumerate(best_first):
        place[site] = position
    return _Sites(whole_costs, worth, place)


def _per_cost(values: Sequence[float], costs: Sequence[int]) -> list[int]:
    """Return values over costs, all times the factor that makes them whole; no digit is lost."""
    ratios = [value.as_integer_ratio() for value in values]
    denominator = max((below for _, below in ratios), default=1)  # of floats: powers of two
    multiple = math.lcm(*costs)
    return [
        above * (denominator // below) * (multiple // cost) for (above, below), cost in zip(ratios, costs, strict=True)
    ]


def _share(sites: _Sites, weights: list[int], budget: int, low: list[int], high: list[int]) -> list[int]:
    """Return ranks within bounds in proportion to the weights, as many as the budget buys, by largest remainder."""
    ranks, remainders = _quotas(sites, weights, budget, low, high)
    left = budget - sites.cost(ranks)
    order = sorted(range(len(ranks)), key=lambda site: (-remainders[site], sites.place[site]))
    given = True
    while given:  # once in ranks; in other units what does not buy a dear rank may buy several cheap ones
        given = False
        for site in order:
            if ranks[site] < high[site] and sites.costs[site] <= left:
                ranks[site] += 1
                left -= sites.costs[site]
                given = True
    return ranks


def _quotas(
    sites: _Sites, weights: list[int], budget: int, low: list[int], high: list[int]
) -> tuple[list[int], list[int]]:
    """Return quotas, clip(level * weight, low, high) at the level at which they cost the budget (water-filling).

    Sites without weight count only once the others are full; then equal amounts are spent on them.

    Returns:
        The whole part of each quota, and the remainders as numerators over a denominator that all share.
    """
    full = [most if weight else least for weight, least, most in zip(weights, low, high, strict=True)]
    if sites.cost(full) <= budget:
        equal = _per_cost([1.0] * len(weights), sites.costs)
        weights = [0 if weight else share for weight, share in zip(weights, equal, strict=True)]
        low = full
    if sites.cost(high) <= budget:
        return list(high), [0] * len(high)
    ranks, remainders = list(low), [0] * len(low)
    free = [site for site, weight in enumerate(weights) if weight]
    left = budget - sum(sites.costs[site] * rank for site, rank in enumerate(low) if not weights[site])
    while free:
        total = sum(sites.costs[site] * weights[site] for site in free)  # the level is left / total
        below = [site for site in free if left * weights[site] < low[site] * total]
        above = [site for site in free if left * weights[site] > high[site] * total]
        if not below and not above:
            break
        missing = sum(sites.costs[site] * (low[site] * total - left * weights[site]) for site in below)
        surplus = sum(sites.costs[site] * (left * weights[site] - high[site] * total) for site in above)
        # Raising those below takes more than cutting those above gives: the level can only fall, so they stay there.
        held, bound = (below, low) if missing >= surplus else (above, high)
        for site in held:
            ranks[site] = bound[site]
            left -= sites.costs[site] * bound[site]
        free = [site for site in free if site not in set(held)]
    for site in free:
        ranks[site], remainders[site] = divmod(left * weights[site], total)
    return ranks, remainders


def _keep_best_triplets(
    sites: _Sites, triplets: Sequence[Floats], budget: int, low: list[int], high: list[int]
) -> list[int]:
    """Fill each site's minimum, then take present triplets, the best first, as far as they fit."""
    ranks = list(low)
    left = budget - sites.cost(low)
    owners, scores = [], []  # of triplets beyond each site's minimum
    for site, values in enumerate(triplets):
        best_first = np.sort(values)[::-1][low[site] : high[site]]
        _check_scores(best_first)
        owners += [site] * len(best_first)
        scores += [float(score) for score in best_first]
    worth = _per_cost(scores, [sites.costs[site] for site in owners])
    for _, _, site in sorted(zip((-one for one in worth), (sites.place[site] for site in owners), owners, strict=True)):
        if sites.costs[site] <= left:
            ranks[site] += 1
            left -= sites.costs[site]
    return ranks
