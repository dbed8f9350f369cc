"""Rules for starting ranks that kept studies have and that peft-vit has no more: sites in an order.

    random                     in an order drawn from the run's seed
    first_blocks, last_blocks  from the first block on, or from the last block backwards

Each site gets `site_rank` until the budget is spent. `gradient`, the rule that is not here, and runs of all four can be
repeated with commit e26f5cdc.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_vit.base.seeding import torch_generator
from peft_vit.core.allocation import largest_ranks
from peft_vit.core.allocation.starting_ranks import PLAIN, Adapters
from peft_vit.core.backbones import Site
from peft_vit.core.config import StartingRanksConfig

ORDERED_RULES = ("random", "first_blocks", "last_blocks")


def ordered_ranks(
    sites: Sequence[Site], config: StartingRanksConfig, *, seed: int, adapters: Adapters = PLAIN
) -> dict[str, int]:
    """Return the rank of each site."""
    costs, largest = adapters.costs(config.unit, sites), largest_ranks(sites, adapters.pool)  # (sites,)
    order = list(range(len(sites)))
    if config.rule == "random":
        generator = torch_generator(seed, "starting_ranks")  # type: ignore[arg-type]  # a purpose of that time
        order = torch.randperm(len(sites), generator=generator).tolist()
    else:
        sign = 1 if config.rule == "first_blocks" else -1
        order.sort(key=lambda place: sign * sites[place].layer)  # stable: within a block in the model's order
    ranks, left = {site.name: 0 for site in sites}, config.budget
    for place in order:
        rank = min(config.site_rank, int(largest[place]), left // int(costs[place]))
        ranks[sites[place].name] = rank
        left -= rank * int(costs[place])
    return ranks
