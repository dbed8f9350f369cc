"""Ranks of a LoRA that are chosen once, before the first step, by a rule; below one rank a site, too.

    stable_rank  ranks in proportion to ||W||_F^2 / ||W||_2^2 of a site's frozen weight W (out, in), whole ones by
                 largest remainder (after the abstract of SR-LoRA, arXiv 2507.00327, whose code has its ranks as numbers
                 and no formula)
    even         the same rank everywhere as far as the budget buys it, then one rank more for as many sites as it buys:
                 of each kind of matrix in turn, at equal distances in depth, so that few ranks reach as many kinds and
                 blocks as they can; a cheaper rank that still fits goes to the first sites that have room for it

A budget has the units of `budget.rank_costs`. `stable_rank` was published for ranks and goes by its score in every
unit.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from peft_vit.base.errors import SilentNoEffectWarning, UserError
from peft_vit.core.allocation.importance import weight_scores
from peft_vit.core.allocation.strategies import Bounds, Ints, allocate, largest_ranks, limited, rank_costs
from peft_vit.core.backbones import Site
from peft_vit.core.config import FORMER_RULES, BudgetUnit, StartingRanksConfig


class Adapters(NamedTuple):
    """Parameters of the cost of a rank, beside the sites.

    Attributes:
        section: of the settings, for errors.
        pool: inputs on which an update is constant.
        bits: that a file has for a value; None: float32.
    """

    section: str = "lora"
    pool: int = 1
    bits: int | None = None

    def costs(self, unit: BudgetUnit, sites: Sequence[Site]) -> Ints:
        """Return the cost of one rank of each site in a unit, (sites,)."""
        return rank_costs(unit, sites, pool=self.pool, bits=self.bits)


PLAIN = Adapters()


def check_starting_ranks(config: StartingRanksConfig, sites: Sequence[Site], adapters: Adapters = PLAIN) -> None:
    """Refuse a rule of older studies, a budget that buys no rank or every one, and a limit that never holds.

    Raises:
        UserError: naming the setting and what the sites allow.
    """
    field = f"{adapters.section}.ranks"
    if config.rule in FORMER_RULES:
        message = f"{config.rule} can be read and not be run any more; use stable_rank or even"
        raise UserError(message, field=f"{field}.rule")
    costs, largest = adapters.costs(config.unit, sites), largest_ranks(sites, adapters.pool)
    limit = config.maximum_rank
    limited(largest, limit, field=f"{field}.maximum_rank")
    most = int(costs @ (largest if limit is None else np.minimum(largest, limit)))
    if not costs.min() <= config.budget < most:
        reason = "what they can hold" if limit is None else f"maximum_rank {limit} everywhere; raise it for more"
        raise UserError(
            f"expected at least {costs.min()} (one rank of the cheapest module) and less than {most} {config.unit} (of "
            f"all {len(sites)} modules {reason}), got {config.budget}",
            field=f"{field}.budget",
        )
    bought = config.budget // int(costs.min())  # ranks of the cheapest site
    if limit is not None and limit > bought:
        message = f"{limit} has no effect above the {bought} ranks that the budget buys at a module; lower it"
        raise UserError(message, field=f"{field}.maximum_rank")


def choose_starting_ranks(
    model: nn.Module, sites: Sequence[Site], config: StartingRanksConfig, adapters: Adapters = PLAIN
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the rank of each site, and its score under `stable_rank` (nothing under `even`).

    Args:
        model: carries adapters without rank; is left as it was.
        sites: that carry them.
        config: the settings.
        adapters: what a rank costs.

    Raises:
        UserError: as `check_starting_ranks`, or if a score is not finite.
    """
    check_starting_ranks(config, sites, adapters)
    costs, largest = adapters.costs(config.unit, sites), largest_ranks(sites, adapters.pool)  # (sites,), as all below
    names = [site.name for site in sites]
    if config.rule == "even":
        return dict(zip(names, _even(config.budget, sites, costs, largest).tolist(), strict=True)), {}
    scores = _stable_ranks(model, names, f"{adapters.section}.ranks.rule")
    bounds = Bounds(
        np.zeros_like(largest), limited(largest, config.maximum_rank, field=f"{adapters.section}.ranks.maximum_rank")
    )
    # `allocate` divides by costs, and this score goes by ranks in every unit.
    of_sites = costs * np.array([scores[name] for name in names])
    allocated = allocate("proportional", of_sites, config.budget, bounds, costs=costs)
    ranks = dict(zip(names, allocated.tolist(), strict=True))
    alike = [what for what, of in (("score", scores), ("rank", ranks)) if len(set(of.values())) == 1]
    if alike:
        warnings.warn(
            f"{adapters.section}.ranks: rule stable_rank gave every module the same {alike[0]}, so it says nothing "
            "about them",
            SilentNoEffectWarning,
            stacklevel=3,
        )
    return ranks, scores


def _stable_ranks(model: nn.Module, names: Sequence[str], field: str) -> dict[str, float]:
    """Return the scores of sites by name."""
    try:
        scores = weight_scores(model, "stable_rank")
    except torch.linalg.LinAlgError:  # of a matrix with NaN
        scores = {}
    if not all(np.isfinite(scores.get(name, np.nan)) for name in names):
        raise UserError("stable_rank gave scores that are not finite; look for NaN in weights", field=field)
    return {name: scores[name] for name in names}


def _even(budget: int, sites: Sequence[Site], costs: Ints, largest: Ints) -> Ints:
    ranks = np.minimum(largest, budget // int(costs.sum()))  # (sites,)
    roomy = np.flatnonzero(ranks < largest).tolist()
    left = budget - int(costs @ ranks)
    for count in range(len(roomy), 0, -1):
        spread = _spread(count, roomy, sites)
        if int(costs[spread].sum()) <= left:  # as many as fit
            ranks[spread] += 1
            break
    before = budget
    while (left := budget - int(costs @ ranks)) < before:
        before = left
        for site in range(len(ranks)):
            if ranks[site] < largest[site] and costs[site] <= left:  # a cheap rank may fit still
                ranks[site] += 1
                left -= int(costs[site])
    return ranks


def _spread(count: int, places: Sequence[int], sites: Sequence[Site]) -> list[int]:
    """Return so many of the places: of each kind of matrix in turn, at equal distances in depth."""
    layers = sorted({sites[place].layer for place in places})
    depths = {layer: depth for depth, layer in enumerate(layers)}
    free: dict[str, list[int]] = {}
    for place in places:
        free.setdefault(sites[place].kind, []).append(place)
    kinds = itertools.cycle(free.values())
    chosen: list[int] = []
    while len(chosen) < count:
        if of_kind := next(kinds):
            wanted = (2 * len(chosen) + 1) * len(layers)  # whole numbers, times 2 count: no rounding decides
            nearest = min(of_kind, key=lambda place: abs((2 * depths[sites[place].layer] + 1) * count - wanted))
            of_kind.remove(nearest)
            chosen.append(nearest)
    return chosen
