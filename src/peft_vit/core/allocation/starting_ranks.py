"""Ranks of a LoRA that are chosen once, before the first step, by a rule; below one rank a site, too.

W (out, in) is a site's frozen weight. G = dL/dW is the gradient of the run's own loss over all calibration images, at
the head that training starts from. Two rules score:

    gradient     the k-th rank of a site scores sigma_k(G)^2, and the best ranks of all sites are taken. Of all updates
                 of K rank-one terms at any sites and Frobenius norm n, the loss falls most to first order, by
                 n sqrt(sum of the K largest sigma^2), along those (Eckart and Young 1936, on the block diagonal matrix
                 of all G)
    stable_rank  ranks in proportion to ||W||_F^2 / ||W||_2^2, whole ones by largest remainder (after the abstract of
                 SR-LoRA, arXiv 2507.00327, whose code has its ranks as numbers and no formula): reads no image

Controls, which read nothing:

    even                       the same rank everywhere as far as the budget buys it, then one rank more for as many
                               sites as it buys: of each kind of matrix in turn, at equal distances in depth, so that
                               few ranks reach as many kinds and blocks as they can; a cheaper rank that still fits
                               goes to the first sites that have room for it
    random                     sites in an order drawn from the run's seed: `site_rank` each until the budget is spent
    first_blocks, last_blocks  likewise from the first block on, or from the last block backwards

A budget has the units of `budget.rank_costs`. Under one other than ranks `gradient` divides its score by what a rank
costs; `stable_rank` was published for ranks and goes by the score above.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from peft_vit.base.errors import SilentNoEffectWarning, UserError
from peft_vit.base.seeding import torch_generator
from peft_vit.core.allocation.importance import weight_scores
from peft_vit.core.allocation.loss_prediction import squared_singular_values, weight_gradients
from peft_vit.core.allocation.strategies import Bounds, Floats, Ints, allocate, largest_ranks, limited, rank_costs
from peft_vit.core.backbones import Site
from peft_vit.core.config import ORDERED_RULES, BudgetUnit, StartingRanksConfig

MeanLoss = Callable[[Tensor, Tensor], Tensor]  # of logits (B, classes) and labels (B,)


class CalibrationBatch(NamedTuple):
    """Training images, and the loss whose gradients are asked for."""

    images: Tensor  # (N, C, S, S), normalised, on the model's device
    labels: Tensor  # (N,) int64
    loss: MeanLoss


class Adapters(NamedTuple):
    """What decides the cost of a rank, beside the sites.

    Attributes:
        section: of the settings, for errors.
        pool: inputs on which an update is constant.
        bits: that a file has for a value; None: float32.
    """

    section: str = "lora"
    pool: int = 1
    bits: int | None = None

    def costs(self, unit: BudgetUnit, sites: Sequence[Site]) -> Ints:
        """Return what one rank of each site costs in a unit, (sites,)."""
        return rank_costs(unit, sites, pool=self.pool, bits=self.bits)


PLAIN = Adapters()


def check_starting_ranks(config: StartingRanksConfig, sites: Sequence[Site], adapters: Adapters = PLAIN) -> None:
    """Refuse a budget that buys no rank, one under which the rule decides nothing, and a limit that never holds.

    Raises:
        UserError: naming the setting and what the sites allow.
    """
    costs, largest = adapters.costs(config.unit, sites), largest_ranks(sites, adapters.pool)
    name, limit, field = "maximum_rank", config.maximum_rank, f"{adapters.section}.ranks"
    limited(largest, limit, field=f"{field}.maximum_rank")
    if config.rule in ORDERED_RULES:
        name, limit = "site_rank", config.site_rank
    most = int(costs @ (largest if limit is None else np.minimum(largest, limit)))
    if not costs.min() <= config.budget < most:
        reason = "what they can hold" if limit is None else f"{name} {limit} everywhere; raise {name} for more"
        raise UserError(
            f"expected at least {costs.min()} (one rank of the cheapest module) and less than {most} {config.unit} (of "
            f"all {len(sites)} modules {reason}), got {config.budget}",
            field=f"{field}.budget",
        )
    bought = config.budget // int(costs.min())  # ranks of the cheapest site
    if limit is not None and limit > bought:
        message = f"{limit} has no effect above the {bought} ranks that the budget buys at a module; lower it"
        raise UserError(message, field=f"{field}.{name}")


def choose_starting_ranks(
    model: nn.Module,
    sites: Sequence[Site],
    config: StartingRanksConfig,
    *,
    seed: int,
    batch: CalibrationBatch | None = None,
    adapters: Adapters = PLAIN,
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the rank of each site, and what a rule that scores has said of its first rank (nothing for a control).

    Args:
        model: carries adapters without rank; is left as it was.
        sites: that carry them.
        config: the settings.
        seed: of the run, for `random`.
        batch: for the rule that reads images.
        adapters: what a rank costs.

    Raises:
        UserError: as `check_starting_ranks`, or if a score is not finite, or none is above 0.
    """
    check_starting_ranks(config, sites, adapters)
    costs, largest = adapters.costs(config.unit, sites), largest_ranks(sites, adapters.pool)  # (sites,), as all below
    names = [site.name for site in sites]
    if not config.scores_sites:
        return dict(zip(names, _controlled(config, sites, costs, largest, seed).tolist(), strict=True)), {}
    by_rank = _scored(config.rule, model, sites, batch)
    scores = {name: float(by_rank[name][0]) for name in names}
    if not any(scores.values()):
        message = f"rule {config.rule} gave every module the score 0, so it can't choose; do all gradients vanish?"
        raise UserError(message, field="lora.ranks.rule")
    largest = limited(largest, config.maximum_rank, field=f"{adapters.section}.ranks.maximum_rank")
    bounds, firsts = Bounds(np.zeros_like(largest), largest), np.array([scores[name] for name in names])
    if config.rule == "gradient":
        of_triplets = [by_rank[name] for name in names]
        allocated = allocate("global", firsts, config.budget, bounds, costs=costs, triplet_scores=of_triplets)
    else:  # `allocate` divides by costs, and this score goes by ranks in every unit
        allocated = allocate("proportional", costs * firsts, config.budget, bounds, costs=costs)
    ranks = dict(zip(names, allocated.tolist(), strict=True))
    alike = [what for what, of in (("score", scores), ("rank", ranks)) if len(set(of.values())) == 1]
    if alike:
        warnings.warn(
            f"lora.ranks: rule {config.rule} gave every module the same {alike[0]}, so it says nothing about them",
            SilentNoEffectWarning,
            stacklevel=3,
        )
    return ranks, scores


def _scored(rule: str, model: nn.Module, sites: Sequence[Site], batch: CalibrationBatch | None) -> dict[str, Floats]:
    """Return the scores of each site's ranks, the first one first, or under `stable_rank` one a site."""
    try:
        if rule == "stable_rank":
            by_rank = {name: np.array([score]) for name, score in weight_scores(model, "stable_rank").items()}
        else:
            assert batch is not None
            images, labels, loss = batch

            def share_of_mean(logits: Tensor, part: slice) -> Tensor:
                return loss(logits.float(), labels[part]) * (len(logits) / len(images))  # (B, classes) -> ()

            modules = list(dict.fromkeys(site.module for site in sites))
            gradients = weight_gradients(model, modules, images, model, share_of_mean)
            by_rank = {site.name: squared_singular_values(gradients[site.module][site.span]).numpy() for site in sites}
        finite = all(np.isfinite(scores).all() for scores in by_rank.values())
    except torch.linalg.LinAlgError:  # of a matrix with NaN
        finite = False
    if not finite:
        message = f"rule {rule} gave scores that are not finite; look for NaN in weights and images"
        raise UserError(message, field="lora.ranks.rule")
    return by_rank


def _controlled(config: StartingRanksConfig, sites: Sequence[Site], costs: Ints, largest: Ints, seed: int) -> Ints:
    if config.rule == "even":
        return _even(config.budget, sites, costs, largest)
    order = list(range(len(sites)))
    if config.rule == "random":
        order = torch.randperm(len(sites), generator=torch_generator(seed, "starting_ranks")).tolist()
    else:
        sign = 1 if config.rule == "first_blocks" else -1
        order.sort(key=lambda place: sign * sites[place].layer)  # stable: within a block in the model's order
    ranks = np.zeros_like(costs)
    _fill(ranks, order, config.site_rank, config.budget, costs, largest)
    return ranks


def _even(budget: int, sites: Sequence[Site], costs: Ints, largest: Ints) -> Ints:
    ranks = np.minimum(largest, budget // int(costs.sum()))  # (sites,)
    roomy = np.flatnonzero(ranks < largest).tolist()
    left = budget - int(costs @ ranks)
    for count in range(len(roomy), 0, -1):
        spread = _spread(count, roomy, sites)
        if int(costs[spread].sum()) <= left:  # as many as fit
            ranks[spread] += 1
            break
    left = budget - int(costs @ ranks)
    while _fill(ranks, range(len(ranks)), 1, left, costs, largest):  # a cheap rank may fit still
        left = budget - int(costs @ ranks)
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


def _fill(ranks: Ints, order: Iterable[int], each: int, left: int, costs: Ints, largest: Ints) -> int:
    """Give so many more ranks to each site in turn, in place, as far as what is left buys; return what was spent."""
    before = left
    for site in order:
        more = min(each, int(largest[site] - ranks[site]), left // int(costs[site]))
        ranks[site] += more
        left -= more * int(costs[site])
    return before - left
