"""From scores to ranks: pure functions of scores, budget and bounds.

Every strategy meets the budget exactly (the lesser of the budget and the sum of maxima), keeps each site within its
bounds, and breaks ties by the order of the sites.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def allocate(
    strategy: Strategy,
    scores: Floats,
    budget: int,
    bounds: Bounds,
    *,
    threshold_tau: float = 1.0,
    top_k: int | None = None,
    triplet_scores: list[Floats] | None = None,
) -> Ints:
    """Return the rank of each site, (sites,).

    Args:
        strategy: `proportional`: ranks by largest remainder in proportion to the scores. `threshold`: sites at or
            above tau times the mean score share in proportion, the others keep the minimum. `top_k`: the best k
            sites (by default half) share equally, the others keep the minimum. `global`: AdaLoRA's ranking of all
            triplets (arXiv 2303.10512, sec. 3.3). What the chosen sites can't hold goes to the others.
        scores: non-negative score of each site, (sites,).
        budget: ranks over all sites.
        bounds: of each site.
        threshold_tau: for `threshold`.
        top_k: for `top_k`.
        triplet_scores: for `global`: per site the scores of its present triplets.

    Raises:
        UserError: if the budget lies below the sum of minima, or a score is negative or not finite.
    """
    if budget < bounds.minimum.sum():
        raise UserError(
            f"{budget} lies below the sites' minimum ranks, {int(bounds.minimum.sum())} together; raise it",
            field="adalora.total_rank_budget",
        )
    if not np.all(np.isfinite(scores)) or np.any(scores < 0):
        raise UserError("importance scores must be finite and not negative", field="importance_scores")
    if strategy == "proportional":
        chosen = np.ones(len(scores), bool)
    elif strategy == "threshold":
        chosen = scores >= threshold_tau * scores.mean()
    elif strategy == "top_k":
        count = max(1, len(scores) // 2) if top_k is None else min(top_k, len(scores))
        chosen = np.zeros(len(scores), bool)
        chosen[_ranking(scores)[:count]] = True
    else:
        if triplet_scores is None:
            raise UserError("the global strategy ranks triplets; give their scores", field="triplet_scores")
        return _global(triplet_scores, scores, budget, bounds)
    weights = np.ones(len(scores)) if strategy == "top_k" else scores
    ranks = _share(weights, scores, budget, bounds.minimum, np.where(chosen, bounds.maximum, bounds.minimum))
    return _share(scores, scores, budget, ranks, bounds.maximum)  # what the chosen sites could not hold


def _ranking(scores: Floats) -> Ints:
    return np.argsort(-scores, kind="stable")


def _share(weights: Floats, scores: Floats, budget: int, minimum: Ints, maximum: Ints) -> Ints:
    """Give each site its minimum and share the rest in proportion to the weights, by largest remainder.

    The quota of a site is what water-filling gives it: sites whose proportional part (minimum included) falls
    outside their bounds are held at the bound, the others share what is left.
    """
    budget = int(min(budget, maximum.sum()))
    quota = _water_fill(weights, budget, minimum.astype(float), maximum.astype(float))
    ranks = np.floor(quota + 1e-9).astype(np.int64)
    # Largest remainder first, then the larger score, then the order of the sites.
    order = np.lexsort((np.arange(len(quota)), -scores, -np.round(quota - ranks, 9)))
    for site in order:
        if ranks.sum() == budget:
            break
        if ranks[site] < maximum[site]:
            ranks[site] += 1
    return ranks


def _water_fill(weights: Floats, budget: int, minimum: Floats, maximum: Floats) -> Floats:
    """Return quotas clip(level * weight, minimum, maximum) that sum to the budget."""
    positive = weights > 0
    if positive.any():
        # Below 1e-100 of the largest, a bound over a weight could overflow to an infinite level.
        weights = np.where(positive, np.maximum(weights / weights[positive].max(), 1e-100), 0.0)
        reachable = np.where(positive, maximum, minimum).sum()
    if not positive.any() or reachable <= budget:
        # Weightless sites count only once the others are full; then they share equally.
        base = np.where(positive, maximum, minimum)
        return _level(np.where(positive, 0.0, 1.0), budget, base, maximum)
    return _level(weights, budget, minimum, maximum)


def _level(weights: Floats, budget: int, minimum: Floats, maximum: Floats) -> Floats:
    movable = weights > 0
    if not movable.any() or minimum.sum() >= budget:
        return minimum.copy()
    # The sum is a piecewise linear, growing function of the level: find its piece, then solve it.
    knots = np.unique(np.concatenate([minimum[movable] / weights[movable], maximum[movable] / weights[movable]]))
    totals = np.array([np.clip(level * weights, minimum, maximum).sum() for level in knots])
    upper = min(int(np.searchsorted(totals, budget)), len(knots) - 1)
    level = knots[upper]
    if upper > 0 and totals[upper] > totals[upper - 1]:
        part = (budget - totals[upper - 1]) / (totals[upper] - totals[upper - 1])
        level = knots[upper - 1] + min(part, 1.0) * (knots[upper] - knots[upper - 1])
    return np.clip(level * weights, minimum, maximum)


def _global(triplets: list[Floats], scores: Floats, budget: int, bounds: Bounds) -> Ints:
    ranks = np.minimum(bounds.minimum, bounds.maximum)
    candidates = []  # triplets beyond each site's minimum, best first within a site
    for site, values in enumerate(triplets):
        ordered = np.sort(values)[::-1]
        for place in range(int(bounds.minimum[site]), min(len(ordered), int(bounds.maximum[site]))):
            candidates.append((-float(ordered[place]), site, place))
    for _, site, _ in sorted(candidates)[: max(0, budget - int(ranks.sum()))]:
        ranks[site] += 1
    return _share(scores, scores, budget, ranks, bounds.maximum)  # a budget above the present triplets makes sites grow
