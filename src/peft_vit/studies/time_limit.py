"""What a limited time is spent on: few experiments with enough seeds for a verdict, before many with two.

`choose` decides it before a study runs, `Deadline` while it does, learning from what has ended.
"""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from peft_vit.statistics import minimum_n_wilcoxon
from peft_vit.studies.events import Event, RunEnded, RunInterrupted, RunStarted

if TYPE_CHECKING:  # a scheduler needs no torch
    from peft_vit.studies.plan import PlannedRun

_Of = TypeVar("_Of")
LATER_THAN_PLANNED = 1.3  # plans are right within 30 %: what is needed for a verdict is chosen as if it took as much
_STOPPING_S = 10.0  # for checkpoints in the end; at most a twentieth of the time that there is


@dataclass(frozen=True)
class Limit:
    """The time that a call has, in seconds on `clock`, from when it was given."""

    minutes: float
    started: float
    clock: Callable[[], float] = time.monotonic

    @property
    def over_at(self) -> float:
        """Return when what still runs is stopped, so that it can write its checkpoint."""
        return self.past_at - min(_STOPPING_S, self.minutes * 60 / 20)

    @property
    def past_at(self) -> float:
        """Return when it is no longer waited for."""
        return self.started + 60 * self.minutes

    @property
    def left_s(self) -> float:
        """Return the seconds until what still runs is stopped."""
        return self.over_at - self.clock()


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


def can_decide(experiments: int, seeds: int) -> bool:
    """Tell whether a study has enough experiments and seeds for any verdict."""
    return seeds_for_verdict(min(experiments, 2), seeds) is not None


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
    if not can_decide(count, seeds):
        done = seeds_in_time(count)
        return Choice(count, done, None, fits=done > 0)
    fewest = min(max(at_least, 2), count)
    for experiments in range(count, fewest - 1, -1):
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


class Deadline:
    """Until when a study may run, and on what it spends that time.

    Runs come seed by seed. If those that are needed for a verdict turn out to take longer than there is time for, the
    last experiments are left for a later call, so that the others get enough seeds.

    Args:
        runs: a row an experiment, the reference first, in it a run a seed; done ones are among them.
        workers: runs at a time.
        limit: of time.
        left: share of a run that is still to be done, by its name, where that is not all of it.
        begun: see `choose`.
        may_leave_out: leave the last experiments for later, so that the others get enough seeds for the exact test.

    Attributes:
        limit: as above.
        under_way: names of the runs that were started and have not ended.
        news: what a person should know; whoever tells it empties the list.
    """

    def __init__(
        self,
        runs: Sequence[Sequence[PlannedRun]],
        workers: int,
        limit: Limit,
        *,
        left: Mapping[str, float] | None = None,
        begun: int = 0,
        may_leave_out: bool = True,
    ) -> None:
        self.limit = limit
        self.under_way: set[str] = set()
        self.news: list[str] = []
        self._runs = runs
        self._workers = workers
        self._left = left or {}
        self._begun = begun
        self._may_leave_out = may_leave_out
        self._experiments = len(runs)
        self._started_at: dict[str, float] = {}
        self._taken: dict[str, list[float]] = {}  # seconds of this call's finished runs, by experiment
        self._stepped_s = self._planned_s = 0.0  # of those that take steps: seconds, and what was planned
        self._whatever: bool | None = None  # nothing is expected to end in time: begin it all the same

    @property
    def over(self) -> bool:
        """Tell whether what runs should be stopped."""
        return self.limit.left_s <= 0

    @property
    def past(self) -> bool:
        """Tell whether nothing should be waited for any more."""
        return self.limit.clock() >= self.limit.past_at

    def to_start(self, waiting: Collection[str]) -> Iterator[PlannedRun]:
        """Yield the runs that should be started now, which then count as under way.

        Args:
            waiting: names of the runs that have not ended.
        """
        while len(self.under_way) < self._workers:
            run = self._next(waiting)
            if run is None:
                return
            self.under_way.add(run.spec.name)
            yield run

    def hear(self, event: Event, waiting: Collection[str]) -> None:
        """Take in what happened to a run; one that is not among those waiting has ended."""
        name = event.run.spec.name
        if isinstance(event, RunStarted):
            self._started_at[name] = self.limit.clock()
        elif isinstance(event, RunEnded | RunInterrupted) and name not in waiting:
            self.under_way.discard(name)
        if isinstance(event, RunEnded) and event.record.status == "done":
            experiment = event.run.spec.experiment
            self._taken.setdefault(experiment.name, []).append(event.record.seconds)
            if not experiment.is_probe:  # its first run computes features for all others: it says nothing of steps
                self._stepped_s += event.record.seconds
                self._planned_s += event.run.estimate.seconds

    def _expected_s(self, run: PlannedRun) -> float:
        """Return the seconds that a run will still take once it is started.

        The median of this call's finished runs of the same experiment; without one what was planned, times what others
        have taken over what they were planned to.
        """
        alike = self._taken.get(run.spec.experiment.name)
        pace = self._stepped_s / self._planned_s if self._planned_s else 1.0
        whole = statistics.median(alike) if alike else pace * run.estimate.seconds
        return self._left.get(run.spec.name, 1.0) * whole

    def _next(self, waiting: Collection[str]) -> PlannedRun | None:
        left_s = self.limit.left_s
        if self._may_leave_out:
            self._experiments = self._that_fit(waiting, left_s)
        there = self._idle(seed_by_seed(self._runs, self._experiments, len(self._runs[0])), waiting)
        in_time = [run for run in there if self._expected_s(run) <= left_s]
        if self._whatever is None:
            self._whatever = bool(there) and not in_time
        return next(iter(there if self._whatever else in_time), None)

    def _idle(self, runs: Sequence[PlannedRun], waiting: Collection[str]) -> list[PlannedRun]:
        return [run for run in runs if run.spec.name in waiting and run.spec.name not in self.under_way]

    def _that_fit(self, waiting: Collection[str], left_s: float) -> int:
        """Return how many experiments get enough seeds in time; as many as before, if not even two do.

        One that was left for later comes back when others turn out to be faster than it looked.
        """
        busy = [self._remaining_s(run) for row in self._runs for run in row if run.spec.name in self.under_way]
        for experiments in range(len(self._runs), 1, -1):
            needed = seeds_for_verdict(max(experiments, self._counted(waiting)), len(self._runs[0]))
            if needed is None:
                break
            missing = self._idle(seed_by_seed(self._runs, experiments, needed), waiting)
            if makespan(map(self._expected_s, missing), self._workers, busy=busy) <= left_s:
                self._tell_of(experiments)
                return experiments
        return self._experiments

    def _counted(self, waiting: Collection[str]) -> int:
        """Return how many experiments count as compared, for having a run that is done or under way."""
        names = [{run.spec.name for run in row} for row in self._runs]
        return max(self._begun, sum(bool(row - set(waiting) or row & self.under_way) for row in names))

    def _tell_of(self, experiments: int) -> None:
        names = [row[0].spec.experiment.name for row in self._runs]
        for name in names[experiments : self._experiments]:
            self.news.append(f"runs take longer than planned: {name} is left for a later call, others get its time")
        for name in names[self._experiments : experiments]:
            self.news.append(f"runs are faster than they looked: there is time for {name} again")

    def _remaining_s(self, run: PlannedRun) -> float:
        now = self.limit.clock()
        return max(0.0, self._expected_s(run) - (now - self._started_at.get(run.spec.name, now)))
