"""What a figure can hold: which experiments it draws when there are many, and how it says so.

Nothing is left out in silence: the caption names what was left out, and the data below the figure or the tables
have it. Validation chooses, never test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from peft_vit.analysis import MethodResult

SINGLE_SEEDS = 10  # lines; with more, a band from the lowest to the highest stands for them
SEED_DOTS = 150  # more dots in one row cover one another
T = TypeVar("T")


def validation_means(methods: Sequence[MethodResult]) -> dict[str, float]:
    """Return experiment -> mean validation accuracy, of those that have validation images."""
    return {m.experiment.name: m.validation_accuracy.estimate for m in methods if m.validation_accuracy is not None}


def _of_experiment(item: Any) -> str:
    return str(item.experiment.name)


def leading(
    items: Sequence[T], validation: Mapping[str, float], limit: int, name: Callable[[T], str] = _of_experiment
) -> list[T]:
    """Return the `limit` best on validation in their order; all where there are no more.

    Args:
        items: in the order of the figure.
        validation: experiment -> mean validation accuracy; an experiment without one comes last.
        limit: how many at most.
        name: of an item's experiment.
    """
    names = [name(item) for item in items]
    best = sorted(range(len(names)), key=lambda i: (-validation.get(names[i], float("-inf")), names[i], i))
    return [items[i] for i in sorted(best[:limit])]


def selection_note(drawn: int, there: int) -> str:
    """Return a sentence for the caption, with a space before it; empty if everything is drawn."""
    if drawn == there:
        return ""
    return f" Drawn are the {drawn} of {there} experiments with the highest mean accuracy on validation."
