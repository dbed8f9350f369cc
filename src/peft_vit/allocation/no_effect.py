"""Says aloud when an allocation that was asked for decides nothing: a warning that runs keep in their records."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from peft_vit.allocation.strategies import Bounds, Floats, Ints, reach_threshold
from peft_vit.config import AdaLoraConfig
from peft_vit.errors import SilentNoEffectWarning


def warn_of_a_held_start(config: AdaLoraConfig, ranks: Ints, costs: Ints, bounds: Bounds) -> None:
    """Warn if only removals are to be decided, and the final budget holds every triplet of the start.

    The global ranking grows sites only by what its budget has left.
    """
    unit, total, _ = config.budget
    held = int(costs @ ranks)
    grows = (ranks < bounds.maximum) & (costs <= total - held)
    if config.allocation_strategy == "global" and held <= total and not grows.any():
        _warn(
            f"allocation_strategy: global has no effect: the adapters start with {held} {unit}, the final budget holds "
            "them all"
        )


def warn_of_equal_scores(config: AdaLoraConfig, scores: Mapping[str, float]) -> None:
    """Warn if all sites have the same score."""
    if len(set(scores.values())) == 1:
        _warn(
            f"importance_metric {config.importance_metric} gave every site the same score; "
            "the allocation says nothing about the sites"
        )


def warn_of_a_bar_too_high(config: AdaLoraConfig, scores: Floats, costs: Ints) -> bool:
    """Warn if the threshold strategy chooses no site, so that all share what is left; tell whether it is so."""
    missed = config.allocation_strategy == "threshold" and not reach_threshold(scores, costs, config.threshold_tau)
    if missed:
        _warn(
            f"threshold_tau {config.threshold_tau} has no effect: no site's score reaches so many times the mean, and "
            "all share the budget in proportion; lower it"
        )
    return missed


def _warn(text: str) -> None:
    warnings.warn(text, SilentNoEffectWarning, stacklevel=4)  # who called the controller
