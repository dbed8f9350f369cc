"""Newly grown triplets get one interval to show what they are worth.

A triplet that has just grown has smoothed scores near zero, whatever it is worth: unprotected it would be the first to
go at the next decision, and would pull its site down until then. A triplet that grew after decision d is young until
decision d + 1 is applied: it is not removed there, counts as its site's strongest, and does not count in its site's
mean score. Triplets that were there from the start are never young.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_vit.allocation.strategies import Bounds, Floats, Ints, allocate
from peft_vit.config import AdaLoraConfig


class TripletAges:
    """Knows at which decision each triplet was grown.

    Attributes:
        decisions: decisions taken so far.
        births: by site, the number of the decision after which each triplet was grown, (rank,) int64; 0: the start.
    """

    def __init__(self, ranks: Mapping[str, int]) -> None:
        self.decisions = 0
        self.births = {name: torch.zeros(rank, dtype=torch.int64) for name, rank in ranks.items()}

    def rank(self, name: str) -> int:
        """Return how many triplets a site has."""
        return len(self.births[name])

    def young(self, name: str) -> Tensor:
        """Return which triplets of a site have grown since the latest decision, (rank,) bool."""
        return (self.births[name] == self.decisions) & (self.births[name] > 0)

    def has_young(self, name: str) -> bool:
        """Say whether a site has young triplets; if so they stand last."""
        births = self.births[name]
        return bool(len(births)) and int(births[-1]) == self.decisions > 0

    def young_count(self, name: str) -> int:
        """Return how many triplets of a site are young."""
        return int(self.young(name).sum())

    def follow(self, kept: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
        """Carry the ages through a change of rank; arguments as in `ImportanceTracker.follow`."""
        for name, keep in kept.items():
            grown = torch.full((ranks[name] - len(keep),), self.decisions)
            self.births[name] = torch.cat([self.births[name][keep.cpu()], grown])

    def strongest_first(self, name: str, scores: Tensor) -> Tensor:
        """Return scores of the same order, (rank,), but with the young triplets above all others of their site."""
        if not self.has_young(name):
            return scores
        young = self.young(name)
        order = torch.argsort(scores.detach().cpu(), descending=True, stable=True)
        order = order[torch.argsort(young[order].int(), descending=True, stable=True)]
        places = torch.empty(len(order), dtype=torch.float64)
        places[order] = torch.arange(len(order), 0, -1, dtype=torch.float64)
        return places


def protected_minimum(young: Ints, scores: Floats, budget: int, bounds: Bounds, costs: Ints) -> Ints:
    """Return each site's smallest rank with its young triplets, so many of each site, protected, (sites,).

    If the budget can't hold them all, those of the sites with the lowest scores give way. (In other units than ranks,
    a cheap one of a lower score may still fit where a dear one did not.)
    """
    least: Ints = bounds.minimum.copy()
    left = budget - int(costs @ least)
    for site in np.argsort(-scores, kind="stable"):
        wanted = min(int(young[site]), int(bounds.maximum[site])) - int(least[site])
        held = max(0, min(wanted, left // int(costs[site])))
        least[site] += held
        left -= held * int(costs[site])
    return least


def allocate_protected(
    config: AdaLoraConfig,
    scores: Floats,
    triplet_scores: Sequence[Floats] | None,
    young: Sequence[NDArray[np.bool_]],
    budget: int,
    bounds: Bounds,
    costs: Ints,
) -> Ints:
    """Return the ranks (sites,) that the settings' strategy gives, with young triplets held as the budget allows.

    Args:
        config: names the strategy, and says what it needs.
        scores: (sites,), the mean per triplet.
        triplet_scores: (rank,) of each site, for the global ranking alone.
        young: (rank,) of each site, which triplets are.
        budget: in the unit of the costs.
        bounds: of ranks, (sites,).
        costs: of a rank, (sites,).
    """
    least = protected_minimum(np.array([one.sum() for one in young]), scores, budget, bounds, costs)
    if triplet_scores is not None:
        triplet_scores = [shielded(*one) for one in zip(triplet_scores, young, map(int, least), strict=True)]
    return allocate(
        config.allocation_strategy,
        scores,
        budget,
        Bounds(least, bounds.maximum),
        costs=costs,
        threshold_tau=config.threshold_tau,
        top_k=config.top_k,
        triplet_scores=triplet_scores,
    )


def shielded(scores: Floats, young: NDArray[np.bool_], count: int) -> Floats:
    """Return a site's triplet scores with the best `count` of the young ones at infinity, for a ranking of triplets."""
    order = np.argsort(np.where(young, -scores, np.inf), kind="stable")
    result = scores.copy()
    result[order[: min(count, int(young.sum()))]] = np.inf
    return result
