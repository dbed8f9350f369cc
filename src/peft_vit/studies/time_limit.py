"""Which runs a limited time is spent on: few experiments with enough seeds for a verdict, before many with two."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from peft_vit.statistics import minimum_n_wilcoxon

_Of = TypeVar("_Of")
LATER_THAN_PLANNED = 1.3  # plans are right within 30 %: what is needed for a verdict is chosen as if it took as much


@dataclass(frozen=True)
class Choice:
    """What a limited time is spent on.

    Attributes:
        experiments: so many, in the file's order; the first is the reference.
        seeds: so many of each are expected to be done in the end, in the file's order.
        needed: so many seeds give every comparison a verdict; None: the study does not have enough for that.
        fits: `needed` seeds, or without them anything at all, are expected to be done in time.
    """

    experiments: int
    seeds: int
    needed: int | None
    fits: bool


def seeds_for_verdict(experiments: int, seeds: int) -> int | None:
    """Return how many seeds decide the comparisons with the first experiment; None: more than there are.

    Holm's correction over one comparison less than there are experiments, see `minimum_n_wilcoxon`.
    """
    if experiments < 2:
        return None
    needed = minimum_n_wilcoxon(comparisons=experiments - 1)
    return needed if needed <= seeds else None


def most_decided(experiments: int, seeds: int) -> int:
    """Return how many experiments can be decided at most with so many seeds; 0: no comparison can be."""
    return max((count for count in range(2, experiments + 1) if seeds_for_verdict(count, seeds)), default=0)


def seed_by_seed(rows: Sequence[Sequence[_Of]], experiments: int, seeds: int) -> list[_Of]:
    """Return what the first experiments have for the first seeds: all of them for a seed before the next one.

    Args:
        rows: a row an experiment, in it one entry a seed.
        experiments: rows to take.
        seeds: entries of each to take.
    """
    return [row[seed] for seed in range(seeds) for row in rows[:experiments]]


def choose(
    seconds: Sequence[Sequence[float]], workers: int, left_s: float, *, at_least: int = 2, begun: int = 0
) -> Choice:
    """Choose experiments and seeds for a limited time.

    All of them, if they fit. Else the most experiments, of those that can be decided, for which enough seeds for a
    verdict fit with 30 % to spare, and then as many seeds as fit. A study that has not enough seeds or experiments for
    any verdict is only bounded: all experiments, as many seeds as fit.

    Args:
        seconds: that are left of each run, a row an experiment, one entry a seed; 0 of one that is done.
        workers: runs at a time.
        left_s: seconds that there are.
        at_least: experiments that are not given up, since an earlier call has begun them.
        begun: experiments of which a run is done: they count as comparisons whether they go on or not.
    """
    count, seeds = len(seconds), len(seconds[0])

    def time_of(experiments: int, some: int) -> float:
        return makespan([one for one in seed_by_seed(seconds, experiments, some) if one > 0], workers)

    def seeds_in_time(experiments: int) -> int:
        return max((some for some in range(1, seeds + 1) if time_of(experiments, some) <= left_s), default=0)

    if time_of(count, seeds) <= left_s:
        return Choice(count, seeds, seeds_for_verdict(count, seeds), fits=True)
    most = most_decided(count, seeds)
    if not most:
        done = seeds_in_time(count)
        return Choice(count, done, None, fits=done > 0)
    fewest = min(max(at_least, 2), count)
    for experiments in range(most, fewest - 1, -1):
        needed = seeds_for_verdict(max(experiments, begun), seeds)
        if needed is not None and LATER_THAN_PLANNED * time_of(experiments, needed) <= left_s:
            return Choice(experiments, seeds_in_time(experiments), needed, fits=True)
    needed = seeds_for_verdict(max(fewest, begun), seeds)
    return Choice(fewest, seeds_in_time(fewest), needed, fits=False)


def makespan(seconds: Iterable[float], workers: int, *, busy: Iterable[float] = ()) -> float:
    """Return when the last run ends, if each in its turn goes to the worker that is free first.

    Args:
        seconds: of each run, in the order in which they start.
        workers: that work at a time.
        busy: for how long some of them still are.
    """
    free_at = sorted(busy)[-workers:]
    free_at += [0.0] * (workers - len(free_at))
    heapq.heapify(free_at)
    for one in seconds:
        heapq.heapreplace(free_at, free_at[0] + one)
    return max(free_at)
