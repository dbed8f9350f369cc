"""Until when runs may go on, and which of them are worth starting, learning from what has ended."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING

from peft_vit.forecasting.time_limit import Limit, Pace, fit
from peft_vit.records import checkpoint_folders, run_folder
from peft_vit.studies.executors import EXECUTORS, Event, ExecutorName, RunEnded, RunInterrupted

if TYPE_CHECKING:  # a scheduler needs no torch
    from peft_vit.studies.plan import Plan, PlannedRun


class Deadline:
    """Until when the runs of a plan may go on, and which of them are started: those that are expected to end in time.

    Args:
        plan: in whose order runs are started.
        results_dir: checkpoints lie below it.
        limit: of time.
        executor: of the runs; on a cluster all may run at a time.

    Attributes:
        limit: as above.
        under_way: names of the runs that were started and have not ended.
    """

    def __init__(self, plan: Plan, results_dir: Path, limit: Limit, executor: ExecutorName = "local") -> None:
        self.limit = limit
        self.under_way: set[str] = set()
        self._runs = plan.pending
        self._workers = max(1, len(plan.pending)) if EXECUTORS[executor].is_elastic else plan.study.execution.workers
        self._left = {}  # share of a run that is still to be done, by its newest checkpoint
        for run in plan.pending:
            reached = max(checkpoint_folders(run_folder(results_dir, run.spec)), default=0)
            self._left[run.spec.name] = 1 - reached / run.total_steps
        self._taken: dict[str, list[float]] = {}  # seconds of this call's finished runs, by experiment
        self._pace = Pace()  # of those that take steps
        self._whatever: bool | None = None  # nothing is expected to end in time: begin it all the same

    @property
    def over(self) -> bool:
        """Tell whether what runs should be stopped."""
        return self.limit.left_s <= 0

    @property
    def past(self) -> bool:
        """Tell whether nothing should be waited for any more."""
        return self.limit.clock() >= self.limit.past_at

    def to_start(self, waiting: Set[str]) -> Iterator[PlannedRun]:
        """Yield the runs that should be started now, which then count as under way.

        Args:
            waiting: names of the runs that have not ended.
        """
        while len(self.under_way) < self._workers:
            idle = [run for run in self._runs if run.spec.name in waiting - self.under_way]
            run = fit(idle, self._expected_s, self.limit.left_s)
            if self._whatever is None:
                self._whatever = bool(idle) and run is None
            if self._whatever:
                run = next(iter(idle), None)
            if run is None:
                return
            self.under_way.add(run.spec.name)
            yield run

    def on_event(self, event: Event, waiting: Set[str]) -> None:
        """Take in what happened to a run; one that is not among those waiting has ended."""
        name = event.run.spec.name
        if isinstance(event, RunEnded | RunInterrupted) and name not in waiting:
            self.under_way.discard(name)
        if isinstance(event, RunEnded) and event.record.status == "done":
            experiment = event.run.spec.experiment
            self._taken.setdefault(experiment.name, []).append(event.record.seconds)
            if not experiment.is_probe:  # its first run computes features for all others: it says nothing of steps
                self._pace.add(event.record.seconds, event.run.estimate.seconds)

    def _expected_s(self, run: PlannedRun) -> float:
        """Return the seconds that a run will still take once it is started.

        The median of this call's finished runs of the same experiment; without one what was planned, times what others
        have taken over what they were planned to.
        """
        alike = self._taken.get(run.spec.experiment.name)
        whole = statistics.median(alike) if alike else self._pace.factor * run.estimate.seconds
        return self._left[run.spec.name] * whole
