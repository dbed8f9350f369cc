"""Few combinations instead of all: faults seldom need more than two choices to meet."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def covering_pairs(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Choose combinations of one value a factor, so that any two values of two factors meet in one of them.

    Greedy: each next one brings most pairs that are new (Cohen et al. 1997, "The AETG system").
    """
    everything = list(product(*(range(len(values)) for values in factors)))
    left = {pair for places in everything for pair in combinations(enumerate(places), 2)}
    chosen = []
    while left:
        best = max(everything, key=lambda places: len(left.intersection(combinations(enumerate(places), 2))))
        left.difference_update(combinations(enumerate(best), 2))
        chosen.append(tuple(values[place] for values, place in zip(factors, best, strict=True)))
    return chosen
