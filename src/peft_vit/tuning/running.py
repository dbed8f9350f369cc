"""Runs of a stage as an ordinary study: planned, done until the time is over, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from peft_vit.config import study_from_mapping
from peft_vit.errors import UserError
from peft_vit.forecasting.time_limit import Limit
from peft_vit.records import RECORD_FILE, RunRecord, read_record, run_folder
from peft_vit.records.progress import study_lock
from peft_vit.safe_io import folder_below
from peft_vit.studies.executors import ExecutorName, Notice, RunEnded, RunRetried, StudyEvent, open_executor
from peft_vit.studies.plan import Plan, plan_study
from peft_vit.studies.profiling import measure_step
from peft_vit.studies.scheduler import Deadline, drive
from peft_vit.tasks import DecidingMetric


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to; scores are shares by the metric that decides.

    Attributes:
        validation: on validation images, at the chosen step; None: there are none.
        nll: likewise, nats.
        test: on the fold's test images; of the final runs on the sealed ones.
        gain: of the last step over the head that training started from, on validation; 0 of a probe.
        l2: strength of the probe's penalty; None: there was no probe.
        seconds: that the run took.
        folder: of its files.
    """

    validation: float | None
    nll: float | None
    test: float
    gain: float
    l2: float | None
    seconds: float
    folder: Path


Only = tuple[Sequence[str], Sequence[int]]
Outcomes = dict[tuple[str, int], Outcome]  # by name of the experiment, and seed


class Runner(Protocol):
    """Does the runs of a study that are not done, as far as there is time."""

    def __call__(self, mapping: Mapping[str, Any], limit: Limit, only: Only | None = None) -> Outcomes:
        """Return what came of all runs of the study that are done.

        Args:
            mapping: of the shape of a configuration file.
            limit: when what runs is stopped.
            only: names and seeds that are done now; None: all.

        Raises:
            UserError: for what planning refuses, and if every run has failed.
            KeyboardInterrupt: after Ctrl-C.
        """
        ...


@dataclass(frozen=True)
class StudyRunner:
    """Does runs in processes of this machine, or on a cluster.

    Attributes:
        results_dir: studies lie below it.
        metric: of scores.
        executor: which one.
        tell: told what ended and what failed, a line each.
    """

    results_dir: Path
    metric: DecidingMetric
    executor: ExecutorName
    tell: Callable[[str], None]

    def __call__(self, mapping: Mapping[str, Any], limit: Limit, only: Only | None = None) -> Outcomes:
        """Return what came of all runs that are done; see `Runner`."""
        file = self.results_dir / str(mapping["name"])
        study = study_from_mapping(dict(mapping), file=file)
        with study_lock(folder_below(self.results_dir, study.name)) as lock:
            measure = partial(measure_step, log=self.tell)
            whole = plan_study(study, self.results_dir, file=None, part=True, measure_step=measure)
            names = [one.name for one in whole.study.experiments if only is None or one.name in only[0]]
            seeds = [seed for seed in whole.study.seeds if only is None or seed in only[1]]
            plan, failed = whole.only(names, seeds, by_seed=True), {}
            if plan.runs:
                make_executor = partial(open_executor, self.executor, plan, self.results_dir)
                deadline = Deadline(plan, self.results_dir, limit, self.executor)
                failed = drive(plan, lock, make_executor, self._say, deadline=deadline)
        done = self._outcomes(whole)
        if failed and not done:
            raise UserError(f"every run failed: {next(iter(failed.values()))}", file=file)
        return done

    def _outcomes(self, plan: Plan) -> Outcomes:
        found: Outcomes = {}
        for run in plan.runs:
            folder = run_folder(self.results_dir, run.spec)
            if not (folder / RECORD_FILE).exists():
                continue
            record = read_record(folder / RECORD_FILE)
            if record.status != "done" or record.test is None:
                continue
            found[run.spec.experiment.name, run.spec.seed] = Outcome(
                validation=None if record.validation is None else self.metric.of(record.validation),
                nll=None if record.validation is None else record.validation.nll,
                test=self.metric.of(record.test),
                gain=_gain(record, self.metric),
                l2=None if record.head_fit is None else record.head_fit.chosen_l2,
                seconds=record.seconds,
                folder=folder,
            )
        return found

    def _say(self, event: StudyEvent) -> None:
        if isinstance(event, Notice):
            self.tell(f"  {event.text}")
        elif isinstance(event, RunRetried):
            self.tell(f"  {event.record.spec.run_id}: {event.record.error}; tried again")
        elif isinstance(event, RunEnded):
            name, record = event.run.spec.name, event.record
            if record.status == "failed" or record.test is None:
                self.tell(f"  {name} failed: {record.error}")
            else:
                own = "" if record.validation is None else self.metric.text(self.metric.of(record.validation))
                self.tell(f"  {name}: {own and f'validation {own}, '}{record.seconds:.0f} s")


def _gain(record: RunRecord, metric: DecidingMetric) -> float:
    if not record.evaluations or record.evaluations[0].step:  # those of a probe are its strengths
        return 0.0
    first, last = (metric.of(record.evaluations[place].metrics) for place in (0, -1))
    return metric.sign * (last - first)
