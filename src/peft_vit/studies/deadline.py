"""Keeps a limit of time while a study runs: starts what is expected to end in time, and learns from what has ended."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_vit.studies.events import Event, RunEnded, RunInterrupted, RunStarted
from peft_vit.studies.ledger import run_name
from peft_vit.studies.time_limit import makespan, seed_by_seed, seeds_for_verdict

if TYPE_CHECKING:  # a driver needs no torch
    from peft_vit.studies.plan import PlannedRun


_STOPPING_S = 10.0  # for checkpoints in the end; at most a twentieth of the time that there is


@dataclass(frozen=True)
class Limit:
    """The time that a call has, in seconds on `clock`, from when it was given."""

    minutes: float
    started: float
    clock: Callable[[], float] = time.monotonic

    @property
    def over_at(self) -> float:
        """Return when what still runs is stopped."""
        return self.past_at - min(_STOPPING_S, self.minutes * 60 / 20)

    @property
    def past_at(self) -> float:
        """Return when it is no longer waited for."""
        return self.started + 60 * self.minutes

    @property
    def left_s(self) -> float:
        """Return the seconds until what still runs is stopped."""
        return self.over_at - self.clock()


class Deadline:
    """Until when a study may run, and on what it spends that time.

    Runs come seed by seed. If those that are needed for a verdict turn out to take longer than there is time for, the
    last experiments are left for a later call, so that the others get enough seeds.

    Args:
        runs: a row an experiment, the reference first, in it a run a seed; done ones are among them.
        workers: runs at a time.
        over_at: when what runs is asked to stop, so that it can write its checkpoint; on `clock`.
        past_at: when it is no longer waited for.
        left: share of a run that is still to be done, by its name, where that is not all of it.
        begun: see `choose`.
        clock: seconds.

    Attributes:
        over_at: as above.
        under_way: names of the runs that were started and have not ended.
    """

    def __init__(
        self,
        runs: Sequence[Sequence[PlannedRun]],
        workers: int,
        over_at: float,
        past_at: float,
        *,
        left: Mapping[str, float] | None = None,
        begun: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.under_way: set[str] = set()
        self._runs = runs
        self._workers = workers
        self.over_at = over_at
        self._past_at = past_at
        self._left = left or {}
        self._begun = begun
        self._clock = clock
        self._experiments = len(runs)
        self._started_at: dict[str, float] = {}
        self._taken: dict[str, list[float]] = {}  # seconds of this call's finished runs, by experiment
        self._stepped_s = self._planned_s = 0.0  # of those that take steps: seconds, and what was planned
        self._whatever: bool | None = None  # nothing is expected to end in time: begin it all the same
        self._news: list[str] = []

    @property
    def over(self) -> bool:
        """Tell whether what runs should be stopped."""
        return self._clock() >= self.over_at

    @property
    def past(self) -> bool:
        """Tell whether nothing should be waited for any more."""
        return self._clock() >= self._past_at

    def news(self) -> Iterator[str]:
        """Yield what a person should know, once."""
        while self._news:
            yield self._news.pop(0)

    def to_start(self, waiting: Collection[str]) -> Iterator[PlannedRun]:
        """Yield the runs that should be started now, which then count as under way.

        Args:
            waiting: names of the runs that have not ended.
        """
        while len(self.under_way) < self._workers:
            run = self._next(waiting)
            if run is None:
                return
            self.under_way.add(run_name(run.spec))
            yield run

    def hear(self, event: Event, waiting: Collection[str]) -> None:
        """Take in what happened to a run; one that is not among those waiting has ended."""
        name = run_name(event.run.spec)
        if isinstance(event, RunStarted):
            self._started_at[name] = self._clock()
        elif isinstance(event, RunEnded | RunInterrupted) and name not in waiting:
            self.under_way.discard(name)
        if isinstance(event, RunEnded) and event.record.status == "done":
            experiment = event.run.spec.experiment
            self._taken.setdefault(experiment.name, []).append(event.record.seconds)
            if not experiment.is_probe:  # its first run computes features for all others: it says nothing of steps
                self._stepped_s += event.record.seconds
                self._planned_s += event.run.estimate.seconds

    def expected_s(self, run: PlannedRun) -> float:
        """Return the seconds that a run will still take once it is started.

        The median of this call's finished runs of the same experiment; without one what was planned, times what others
        have taken over what they were planned to.
        """
        alike = self._taken.get(run.spec.experiment.name)
        pace = self._stepped_s / self._planned_s if self._planned_s else 1.0
        whole = statistics.median(alike) if alike else pace * run.estimate.seconds
        return self._left.get(run_name(run.spec), 1.0) * whole

    def _next(self, waiting: Collection[str]) -> PlannedRun | None:
        left_s = self.over_at - self._clock()
        self._experiments = self._that_fit(waiting, left_s)
        seeds = len(self._runs[0])
        there = self._idle(seed_by_seed(self._runs, self._experiments, seeds), waiting)
        in_time = [run for run in there if self.expected_s(run) <= left_s]
        if self._whatever is None:
            self._whatever = bool(there) and not in_time
        return next(iter(there if self._whatever else in_time), None)

    def _idle(self, runs: Sequence[PlannedRun], waiting: Collection[str]) -> list[PlannedRun]:
        return [run for run in runs if run_name(run.spec) in waiting and run_name(run.spec) not in self.under_way]

    def _that_fit(self, waiting: Collection[str], left_s: float) -> int:
        """Return how many experiments get enough seeds in time; as many as before, if not even two do.

        One that was left for later comes back when others turn out to be faster than it looked.
        """
        busy = [self._remaining_s(run) for row in self._runs for run in row if run_name(run.spec) in self.under_way]
        for experiments in range(len(self._runs), 1, -1):
            needed = seeds_for_verdict(max(experiments, self._counted(waiting)), len(self._runs[0]))
            if needed is None:
                break
            missing = self._idle(seed_by_seed(self._runs, experiments, needed), waiting)
            if makespan(map(self.expected_s, missing), self._workers, busy=busy) <= left_s:
                self._tell_of(experiments)
                return experiments
        return self._experiments

    def _counted(self, waiting: Collection[str]) -> int:
        """Return how many experiments count as compared, for having a run that is done or under way."""
        names = [{run_name(run.spec) for run in row} for row in self._runs]
        return max(self._begun, sum(bool(row - set(waiting) or row & self.under_way) for row in names))

    def _tell_of(self, experiments: int) -> None:
        for row in self._runs[experiments : self._experiments]:
            name = row[0].spec.experiment.name
            self._news.append(f"runs take longer than planned: {name} is left for a later call, others get its time")
        for row in self._runs[self._experiments : experiments]:
            self._news.append(
                f"runs are faster than they looked: there is time for {row[0].spec.experiment.name} again"
            )

    def _remaining_s(self, run: PlannedRun) -> float:
        since = self._started_at.get(run_name(run.spec), self._clock())
        return max(0.0, self.expected_s(run) - (self._clock() - since))
