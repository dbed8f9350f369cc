"""What a figure can hold: which experiments it draws when there are many, and how it says so.

Nothing is left out in silence: the caption names what was left out, and the data below the figure or the tables
have it. Validation chooses, never test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft_vit.analysis import MethodResult

SEED_DOTS = 150  # more dots in one row cover one another


def validation_means(methods: Sequence[MethodResult]) -> dict[str, float]:
    """Return experiment -> mean validation accuracy."""
    return {m.experiment.name: m.validation_accuracy.estimate for m in methods}


def leading(names: Sequence[str], validation: Mapping[str, float], limit: int) -> list[int]:
    """Return which to draw: the `limit` best on validation, by place; all where there are no more.

    Args:
        names: experiments in the order of the figure.
        validation: experiment -> mean validation accuracy; an experiment without one comes last.
        limit: how many at most.
    """
    best = sorted(range(len(names)), key=lambda i: (-validation.get(names[i], float("-inf")), names[i], i))
    return sorted(best[:limit])


def selection_note(drawn: int, there: int) -> str:
    """Return a sentence for the caption, with a space before it; empty if everything is drawn."""
    if drawn == there:
        return ""
    return f" Drawn are the {drawn} of {there} experiments with the highest mean accuracy on validation."


def many_seeds(methods: Sequence[MethodResult]) -> bool:
    """Return whether single seeds would cover one another, so that their range stands for them."""
    return any(len(m.by_seed) > SEED_DOTS for m in methods)
