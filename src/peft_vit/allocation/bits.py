"""One choice per group under a budget of bytes: the number format of each layer, the rank of each site.

The groups' options have a predicted loss and a size each; the total loss is minimized while the total size stays within
the budget: a multiple-choice knapsack (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, ch. 11), solved as the
integer program that it is by branch and cut (HiGHS, through `scipy.optimize.milp`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

# Counted in nodes rather than seconds, so that a slow machine chooses as a fast one does. What real budgets take lies
# far below; see `Choice.lower_bound` for what holds where it is reached.
_NODE_LIMIT = 10_000
# HiGHS takes totals that differ by less than 1e-6 for equal; losses are scaled, so that this is 1e-12 of their sum.
_LOSS_SCALE = 1e6


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        options: of each group, the place of the option.
        loss: total of the chosen options.
        size: likewise.
        lower_bound: no choice within the budget has a total loss below this. Equal to the loss, up to the accuracy of
            the solver (1e-12 of the sum of the groups' ranges of losses), unless it stopped at its limit of nodes.
    """

    options: tuple[int, ...]
    loss: float
    size: int
    lower_bound: float


def choose(
    losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, *, node_limit: int = _NODE_LIMIT
) -> Choice:
    """Choose one option of each group, so that the total loss is least and the total size within the budget.

    Of options of one group that are worth the same, the smaller is taken, then the earlier; equal input gives equal
    choices.

    Args:
        losses: of each group's options, in any unit; a gain counts as a negative loss.
        sizes: likewise, whole numbers, not negative.
        budget: in the unit of the sizes.
        node_limit: of the search, after which the best choice so far is returned with the bound that was reached.

    Raises:
        ValueError: if the budget is below the smallest total size, or a loss is not finite.
    """
    smallest = sum(min(group) for group in sizes)
    if budget < smallest:
        raise ValueError(f"the smallest options take {smallest}, the budget is {budget}")
    if not all(math.isfinite(loss) for group in losses for loss in group):
        raise ValueError("expected finite losses")
    kept = [_undominated(*group) for group in zip(losses, sizes, strict=True)]
    # Losses and sizes are counted from those of the group's largest and smallest option, so that what differs between
    # choices is not lost beside what they share; sizes in their greatest common divisor.
    options = [(group, place) for group, places in enumerate(kept) for place in places]
    extra_loss = np.array([losses[group][place] - losses[group][kept[group][-1]] for group, place in options])
    extra_size = np.array([sizes[group][place] - sizes[group][kept[group][0]] for group, place in options])
    floor = math.fsum(losses[group][places[-1]] for group, places in enumerate(kept))
    most = math.fsum(losses[group][places[0]] - losses[group][places[-1]] for group, places in enumerate(kept))
    room, bound, chosen = budget - smallest, floor, [places[-1] for places in kept]  # the largest options, if they fit
    if sum(sizes[group][places[-1]] - sizes[group][places[0]] for group, places in enumerate(kept)) > room:
        unit = math.gcd(*extra_size.tolist())
        rows = scipy.sparse.coo_array((np.ones(len(options)), ([group for group, _ in options], range(len(options)))))
        result = scipy.optimize.milp(
            extra_loss / most * _LOSS_SCALE,  # in this order: the losses may be as small as floats can be
            integrality=np.ones(len(options)),
            bounds=(0, 1),
            constraints=[
                scipy.optimize.LinearConstraint(rows, 1, 1),
                scipy.optimize.LinearConstraint((extra_size // unit)[None], 0, room // unit),
            ],
            options={"mip_rel_gap": 0.0, "node_limit": node_limit},
        )
        if result.x is None:  # the smallest options always fit
            chosen = [places[0] for places in kept]
        else:
            chosen = [place for (_, place), taken in zip(options, result.x > 0.5, strict=True) if taken]
            bound += result.mip_dual_bound * (most / _LOSS_SCALE)
    size = sum(group[place] for group, place in zip(sizes, chosen, strict=True))
    assert size <= budget, "the solver's rounding left the budget"
    loss = math.fsum(group[place] for group, place in zip(losses, chosen, strict=True))
    return Choice(tuple(chosen), loss, size, min(bound, loss))


def _undominated(losses: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Return the options from the smallest on, each with less loss than every smaller or equal one."""
    kept: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda place: (sizes[place], losses[place], place)):
        if not kept or losses[place] < losses[kept[-1]]:
            kept.append(place)
    return kept
