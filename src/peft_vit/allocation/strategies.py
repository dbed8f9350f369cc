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

All arithmetic is in integers and fractions: equal shares are equal, the order of the sites changes no sum, and a
budget of many millions of bytes is not exceeded by a rounding error.
"""

from __future__ import annotations

from bisect import bisect_left
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
    """Exact numbers of each site.

    Attributes:
        costs: of one rank.
        worth: score per unit of cost.
        place: 0 for the best site by worth, then by score, then by order.
    """

    costs: list[Fraction]
    worth: list[Fraction]
    place: list[int]


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
    sites = _exact(scores, np.ones(len(scores), np.int64) if costs is None else costs)
    low, high = [int(rank) for rank in bounds.minimum], [int(rank) for rank in bounds.maximum]
    if budget < _cost(sites, low):
        raise UserError(
            f"{budget} lies below what the sites' minimum ranks cost, {_cost(sites, low)} together; raise it",
            field="budget",
        )
    if strategy == "global":
        if triplet_scores is None:
            raise UserError("the global strategy ranks triplets; give their scores", field="triplet_scores")
        ranks = _keep_best_triplets(sites, triplet_scores, budget, low, high)
    else:
        chosen = _choose(strategy, sites, threshold_tau, top_k)
        reach = [most if site in chosen else least for site, (least, most) in enumerate(zip(low, high, strict=True))]
        equal = [1 / cost for cost in sites.costs]
        ranks = _share(sites, equal if strategy == "top_k" else sites.worth, budget, low, reach)
    # What is left goes to whoever can take it.
    return np.array(_share(sites, sites.worth, budget, ranks, high), dtype=np.int64)


def _exact(scores: Floats, costs: Ints) -> _Sites:
    if not np.all(np.isfinite(scores)) or np.any(scores < 0):
        raise UserError("importance scores must be finite and not negative", field="importance_scores")
    if np.any(costs < 1):
        raise UserError(f"a rank costs at least 1, got {costs.min()}", field="costs")
    exact_costs = [Fraction(int(cost)) for cost in costs]
    worth = [Fraction(float(score)) / cost for score, cost in zip(scores, exact_costs, strict=True)]
    best_first = sorted(range(len(worth)), key=lambda site: (-worth[site], -scores[site], site))
    place = [0] * len(worth)
    for position, site in enumerate(best_first):
        place[site] = position
    return _Sites(exact_costs, worth, place)


def _cost(sites: _Sites, ranks: Sequence[int | Fraction]) -> Fraction:
    return sum((cost * rank for cost, rank in zip(sites.costs, ranks, strict=True)), Fraction())


def _choose(strategy: Strategy, sites: _Sites, threshold_tau: float, top_k: int | None) -> set[int]:
    count = len(sites.worth)
    if strategy == "threshold":
        bar = Fraction(threshold_tau) * sum(sites.worth) / count
        return {site for site, worth in enumerate(sites.worth) if worth >= bar}
    if strategy == "top_k":
        wanted = max(1, count // 2) if top_k is None else top_k
        return {site for site, place in enumerate(sites.place) if place < wanted}
    return set(range(count))


def _share(sites: _Sites, weights: list[Fraction], budget: int, low: list[int], high: list[int]) -> list[int]:
    """Share the budget in proportion to the weights, within bounds, in whole ranks by largest remainder."""
    quotas = _quotas(sites, weights, budget, low, high)
    ranks = [int(quota) for quota in quotas]
    left = budget - _cost(sites, ranks)
    order = sorted(range(len(ranks)), key=lambda site: (ranks[site] - quotas[site], sites.place[site]))
    given = True
    while given:  # once in ranks; a unit in which the first in line no longer fit leaves more to the cheaper ones
        given = False
        for site in order:
            if ranks[site] < high[site] and sites.costs[site] <= left:
                ranks[site] += 1
                left -= sites.costs[site]
                given = True
    return ranks


def _quotas(
    sites: _Sites, weights: list[Fraction], budget: int, low: list[int], high: list[int]
) -> Sequence[int | Fraction]:
    """Return clip(level * weight, low, high) at the level at which they cost the budget (water-filling).

    Sites without weight count only once the others are full; then equal amounts are spent on them.
    """
    if _cost(sites, high) <= budget:
        return high
    full = [most if weight else least for weight, least, most in zip(weights, low, high, strict=True)]
    if _cost(sites, full) <= budget:
        weights = [Fraction(not weight) / cost for weight, cost in zip(weights, sites.costs, strict=True)]
        low = full

    def at(level: Fraction) -> list[Fraction]:
        return [
            min(max(level * weight, Fraction(least)), Fraction(most))
            for weight, least, most in zip(weights, low, high, strict=True)
        ]

    # The cost is a piecewise linear, growing function of the level: find its piece, then solve it.
    bends = {bound / weight for weight, *both in zip(weights, low, high, strict=True) if weight for bound in both}
    levels = sorted({Fraction(0)} | bends)
    upper = bisect_left(levels, Fraction(budget), key=lambda level: _cost(sites, at(level)))
    if upper == 0:
        return low
    below, above = (_cost(sites, at(level)) for level in levels[upper - 1 : upper + 1])
    part = (budget - below) / (above - below)
    return at(levels[upper - 1] + part * (levels[upper] - levels[upper - 1]))


def _keep_best_triplets(
    sites: _Sites, triplets: Sequence[Floats], budget: int, low: list[int], high: list[int]
) -> list[int]:
    """Fill each site's minimum, then take present triplets, the best first, as far as they fit."""
    ranks = list(low)
    left = budget - _cost(sites, low)
    candidates = []  # triplets beyond each site's minimum
    for site, values in enumerate(triplets):
        best_first = sorted((float(value) for value in values), reverse=True)[low[site] : high[site]]
        candidates += [(-Fraction(score) / sites.costs[site], sites.place[site], site) for score in best_first]
    for _, _, site in sorted(candidates):
        if sites.costs[site] <= left:
            ranks[site] += 1
            left -= sites.costs[site]
    return ranks
