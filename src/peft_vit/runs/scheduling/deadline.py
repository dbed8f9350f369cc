"""What the runs of a call will still take, by what it has seen of them, and which are started within its minutes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peft_vit.base.console import duration
from peft_vit.base.files import checkpoint_folders
from peft_vit.core.config import ExperimentConfig
from peft_vit.runs.costs.time_limit import PROCESS_S, Limit, Pace, RunTimer, first_that_fits, makespan
from peft_vit.runs.executors import (
    EXECUTORS,
    Event,
    ExecutorName,
    RunEnded,
    RunInterrupted,
    RunProgress,
    RunRetried,
    RunStarted,
)
from peft_vit.runs.records.storage import run_folder

if TYPE_CHECKING:  # it runs without torch, which only executors need
    from peft_vit.runs.planned import Plan, PlannedRun

_SLOW_FACTOR, _ENOUGH_STEPS = 3.0, 3  # times longer than planned, from where it is told; steps that tell it
_PROBE_FACTOR = 5.0  # probes may be so many times slower than planned for reasons of their own


class RunTimes:
    """What the runs of a plan will still take, by what a call has seen of them; all times are seconds on one clock.

    A run that waits takes what was planned, times the pace of its experiment: what its runs take over what they were
    planned to. That is the median of those that have ended, or have shown it before they were stopped; without one, of
    those under way. Where none has shown anything yet, those of other experiments tell it, all together. Linear probes
    tell it only of each other, since the first one computes features for all; but that one is much slower than planned
    means that the others will be, too. A run under way shows it by its steps, see `RunTimer`, or by taking longer than
    expected. What a checkpoint holds is done.

    Args:
        runs: that are to be done.
        results_dir: checkpoints lie below it; None: there are none.

    Attributes:
        running: the runs under way, by name.
    """

    def __init__(self, runs: Iterable[PlannedRun], results_dir: Path | None = None) -> None:
        self.running: dict[str, RunTimer] = {}
        self._experiments: dict[str, ExperimentConfig] = {}  # by name of the run
        self._left: dict[str, float] = {}  # share of a run that is still to be done, by its newest checkpoint
        for run in runs:
            folders = {} if results_dir is None else checkpoint_folders(run_folder(results_dir, run.spec))
            self._left[run.spec.name] = 1 - max(folders, default=0) / run.total_steps if folders else 1.0
            self._experiments[run.spec.name] = run.spec.experiment
        self._ended: list[_Taken] = []
        self._workers: set[str] = set()

    def on_event(self, event: Event | RunRetried, now: float) -> None:
        """Take in what happened to a run."""
        run, name = event.run, event.run.spec.name
        match event:
            case RunStarted():
                began = now if event.worker in self._workers else now + PROCESS_S
                self._workers.add(event.worker)
                planned_s, after_s = run.estimate.seconds, run.estimate.after_s
                done_s = (1 - self._left[name]) * (planned_s - after_s)
                self.running[name] = RunTimer(planned_s, began, after_s, done_s)
            case RunProgress():
                if (timer := self.running.get(name)) is not None:
                    timer.stepped(event.progress.step, event.progress.total_steps, now)
            case RunEnded():
                self.running.pop(name, None)
                if event.record.status == "done":
                    self._ended.append(_Taken(run.spec.experiment, event.record.seconds, run.estimate.seconds))
            case RunRetried() | RunInterrupted():
                timer = self.running.pop(name, None)
                if timer is not None:
                    self._ended += self._shown({name: timer}, self._paces(now), now)
                if isinstance(event, RunInterrupted):
                    self._left[name] = 1 - event.step / run.total_steps

    def left_s(self, now: float) -> dict[str, float]:
        """Return the seconds that are left of each run under way, by name."""
        paces, running = self._paces(now), list(self.running.items())  # another thread may change it
        return {name: timer.left_s(now, paces[self._experiments[name].name]) for name, timer in running}

    def whole_s(self, runs: Iterable[PlannedRun], now: float) -> list[float]:
        """Return the seconds that runs will take from when they are started."""
        paces = self._paces(now)
        return [self._left[run.spec.name] * paces[run.spec.experiment.name] * run.estimate.seconds for run in runs]

    def _shown(self, timers: Mapping[str, RunTimer], paces: Mapping[str, float], now: float) -> list[_Taken]:
        """Return what runs under way have shown to take, at the paces that are expected of their experiments."""
        shown = []
        for name, timer in list(timers.items()):
            experiment = self._experiments[name]
            if (taken_s := timer.shown_s(now, paces[experiment.name])) is not None:
                shown.append(_Taken(experiment, taken_s, timer.planned_s))
        return shown

    def _paces(self, now: float) -> dict[str, float]:
        """Return how many times longer than planned runs take, by name of the experiment."""
        names = dict.fromkeys(experiment.name for experiment in self._experiments.values())
        paces = dict.fromkeys(names, math.inf)
        for _ in range(2):  # first by ended runs and steps; what takes longer than expected of these is shown next
            under_way = self._shown(self.running, paces, now)
            factors = [Pace(), Pace()]  # of what takes steps, and of probes
            for experiment, taken_s, planned_s in (*self._ended, *under_way):
                factors[experiment.is_probe].add(taken_s, planned_s)
            steps, probes = factors
            others = steps.factor if steps.planned_s else max(1.0, probes.factor / _PROBE_FACTOR)
            shown = _by_experiment(under_way) | _by_experiment(self._ended)
            paces = {name: statistics.median(shown[name]) if name in shown else others for name in names}
        return paces


class _Taken(NamedTuple):
    experiment: ExperimentConfig
    taken_s: float
    planned_s: float


def _by_experiment(runs: Iterable[_Taken]) -> dict[str, list[float]]:
    """Return times longer than planned, by name of the experiment."""
    factors: dict[str, list[float]] = {}
    for experiment, taken_s, planned_s in runs:
        factors.setdefault(experiment.name, []).append(taken_s / planned_s)
    return factors


class Deadline:
    """Until when the runs of a plan may continue, and which of them are started: those that are expected to end in
    time, see `RunTimes`.

    Args:
        plan: in whose order runs are started.
        results_dir: checkpoints lie below it.
        limit: of time.
        executor: of the runs; on a cluster all may run at a time.
        workers: how many do there; None: it is not known.

    Attributes:
        limit: as above.
        under_way: names of the runs that were started and have not ended.
    """

    def __init__(
        self, plan: Plan, results_dir: Path, limit: Limit, executor: ExecutorName = "local", workers: int | None = None
    ) -> None:
        self.limit = limit
        self.under_way: set[str] = set()
        self._runs = plan.pending
        usual = max(1, len(plan.pending)) if EXECUTORS[executor].is_elastic else plan.study.execution.workers
        self._workers = workers or usual
        self._times = RunTimes(plan.pending, results_dir)
        self._none_fits: bool | None = None  # nothing is expected to end in time: begin it all the same
        self._has_warned = False
        self._stopped: list[tuple[float, str]] = []  # seconds that runs take that were stopped, and a line on it

    def to_start(self, waiting: Set[str]) -> Iterator[PlannedRun]:
        """Yield the runs that should be started now, which then count as under way.

        Args:
            waiting: names of the runs that have not ended.
        """
        while len(self.under_way) < self._workers:
            idle = self._idle(waiting)
            fitting = first_that_fits(idle, lambda option: option[1], self.limit.left_s)
            if self._none_fits is None:
                self._none_fits = bool(idle) and fitting is None
            if self._none_fits:
                fitting = next(iter(idle), None)
            if fitting is None:
                return
            self.under_way.add(fitting[0].spec.name)
            yield fitting[0]

    def on_event(self, event: Event, waiting: Set[str]) -> None:
        """Take in what happened to a run; one that is not among those waiting has ended."""
        name, now = event.run.spec.name, self.limit.clock()
        if isinstance(event, RunInterrupted) and name in self._times.running:
            self._stopped.append((self._times.left_s(now)[name], f"{name} {self._takes(name, now)}"))
        if isinstance(event, RunEnded | RunInterrupted) and name not in waiting:
            self.under_way.discard(name)
        self._times.on_event(event, now)

    def warning(self, waiting: Set[str]) -> str | None:
        """Return, once, that a run takes several times what was planned, if not all runs will be done in time.

        Args:
            waiting: names of the runs that have not ended.
        """
        now = self.limit.clock()
        for name, timer in {} if self._has_warned else self._times.running.items():
            taken_s = timer.takes_s(now) if timer.steps_seen >= _ENOUGH_STEPS else timer.done_s + timer.spent_s(now)
            if taken_s < _SLOW_FACTOR * timer.planned_s:
                continue
            idle_s = [run_s for _, run_s in self._idle(waiting)]
            left_s = makespan(idle_s, self._workers, busy=self._times.left_s(now).values())
            if left_s > self.limit.left_s:
                self._has_warned = True
                planned = f"{name} was planned to take {duration(timer.planned_s)} and {self._takes(name, now)}"
                fits = f"all runs take about {duration(left_s)} more, and {duration(self.limit.left_s)} are left"
                return f"slower than planned: {planned}; {fits}"
        return None

    def shortest(self) -> str:
        """Return which run could have been the first to end, and what it takes here, as far as is known."""
        now = self.limit.clock()
        under_way = self._times.left_s(now).items()
        begun = self._stopped + [(left_s, f"{name} {self._takes(name, now)}") for name, left_s in under_way]
        if begun:
            return min(begun)[1]
        run, seconds = min(self._idle({run.spec.name for run in self._runs}), key=lambda option: option[1])
        return f"{run.spec.name} is planned to take {duration(seconds)}"

    def _takes(self, name: str, now: float) -> str:
        """Return in words what a run under way takes."""
        timer = self._times.running[name]
        if timer.steps_seen:
            return f"takes about {duration(timer.takes_s(now))} here"
        spent_s, left_s = timer.spent_s(now), self._times.left_s(now)[name]
        if spent_s < left_s:
            return f"is expected to take {duration(timer.done_s + spent_s + left_s)} here"
        return f"takes more than {duration(spent_s)} here"

    def _idle(self, waiting: Set[str]) -> list[tuple[PlannedRun, float]]:
        """Return the runs that could be started, and the seconds that each will take."""
        idle = [run for run in self._runs if run.spec.name in waiting - self.under_way]
        return list(zip(idle, self._times.whole_s(idle, self.limit.clock()), strict=True))
