"""Runs of a stage as an ordinary study: planned, done until the time is over, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from peft_vit.base.errors import UserError
from peft_vit.base.files import folder_below
from peft_vit.base.statistics import TemperaturePrior
from peft_vit.core.config import study_from_mapping
from peft_vit.core.records import Calibrated, Decision, RunRecord
from peft_vit.core.tasks import (
    CLASSIFICATION,
    OF_FOLDS,
    TASKS,
    DecidingMetric,
    Labels,
    Task,
    meaning_fields,
    rows_of,
    thresholds_of,
)
from peft_vit.core.tasks.calibration import calibrate
from peft_vit.runs.costs.time_limit import Limit
from peft_vit.runs.executors import ExecutorName, Notice, RunEnded, RunRetried, StudyEvent, open_executor
from peft_vit.runs.records.progress import study_lock
from peft_vit.runs.records.storage import RECORD_FILE, read_record, run_folder
from peft_vit.runs.scheduling.deadline import Deadline
from peft_vit.runs.scheduling.plan import Plan, plan_study
from peft_vit.runs.scheduling.profiling import measure_step
from peft_vit.runs.scheduling.scheduler import drive


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to, on images that it was not trained on: of its fold, or the test images.

    Attributes:
        images: their positions in the data set, (n,).
        labels: of them, n.
        logits: what it says of them, (n, K), as the task has them that it learned.
        seconds: that the run took.
        folder: of its files.
        learned: its task, with what of it follows from its training images.
    """

    images: NDArray[np.int64]
    labels: Labels
    logits: NDArray[np.float64]
    seconds: float
    folder: Path
    learned: Task = CLASSIFICATION

    @classmethod
    def of(cls, record: RunRecord, folder: Path) -> Self:
        """Read it off the record of a run that is done, with its logits."""
        predictions = record.predictions
        assert predictions is not None
        assert predictions.logits is not None
        images, logits = np.asarray(predictions.images, np.int64), np.asarray(predictions.logits, np.float64)
        task = TASKS[record.spec.task].restored(record.decision)
        return cls(images, rows_of(predictions.labels), logits, record.seconds, folder, task)

    @property
    def right(self) -> NDArray[np.bool_]:
        """Return where it is right, (n,)."""
        return self.learned.right(self.logits, self.labels)

    def told(self, meaning: Calibrated | Decision) -> tuple[Labels, tuple[float, ...]]:
        """Return what is predicted of the images, and from which probabilities on, as metrics take it."""
        decision = meaning_fields(meaning)["decision"]
        return self.learned.predicted(self.logits, decision), thresholds_of(decision)


def pooled(outcomes: Iterable[Outcome], task: Task) -> tuple[NDArray[np.float64], Labels, NDArray[np.int64]]:
    """Return logits (N, K) as a task has them, labels (N,) and positions (N,) of several runs' images together."""
    runs = list(outcomes)
    logits = np.concatenate([np.asarray(task.aligned(own.logits, own.learned), np.float64) for own in runs])
    return logits, np.concatenate([own.labels for own in runs]), np.concatenate([own.images for own in runs])


def meaning_on(outcomes: Iterable[Outcome], task: Task, prior: TemperaturePrior | None = None) -> Calibrated | Decision:
    """Return what outputs of a task mean, as it was learned, from what like models said of images on folds.

    Args:
        outcomes: of these models.
        task: with what of it follows from training images.
        prior: of the temperature of a softmax; None: the images decide alone.
    """
    logits, labels, images = pooled(outcomes, task)
    return task.decide(logits, labels, OF_FOLDS, images) or calibrate(logits, labels, images.tolist(), prior)


def covered_on_folds(outcomes: Sequence[Outcome], task: Task) -> dict[float, float]:
    """Return by coverage how often sets or intervals hold the truth on images of folds; empty of one class an image.

    Those of a fold are made by what models said of images outside of it, so that no image chose its own. Folds count by
    their images.
    """
    if not outcomes:
        return {}
    logits, labels, images = pooled(outcomes, task)
    by_fold = []
    for own in outcomes:
        others = ~np.isin(images, own.images)
        decision = task.decide(logits[others], labels[others], OF_FOLDS, images[others])
        by_fold.append({} if decision is None else task.covered(decision, pooled([own], task)[0], own.labels)[0])
    sizes = [len(own.images) for own in outcomes]
    everywhere = (c for c in by_fold[0] if all(c in held for held in by_fold))
    return {c: float(np.average([held[c] for held in by_fold], weights=sizes)) for c in everywhere}


class EveryRunFailedError(UserError):
    """No run of a study has come to its end, and some have failed."""


Only = tuple[Sequence[str], Sequence[int]]
Outcomes = dict[tuple[str, int], Outcome]  # by name of the experiment, and seed


# Does the runs of a study that are not done, as far as there is time, of some names and seeds or all; returns all that
# are done.
Runner = Callable[[Mapping[str, Any], Limit, Only | None], Outcomes]


def finished_runs(plan: Plan, results_dir: Path) -> Iterator[tuple[RunRecord, Path]]:
    """Yield the record and the folder of each run of a plan that is done."""
    for run in plan.runs:
        folder = run_folder(results_dir, run.spec)
        if (folder / RECORD_FILE).exists() and (record := read_record(folder / RECORD_FILE)).status == "done":
            yield record, folder


@dataclass(frozen=True)
class StudyRunner:
    """Does runs in processes of this machine, or on a cluster.

    Attributes:
        results_dir: studies lie below it.
        metric: of what is shown.
        executor: which one.
        tell: gets what ended and what failed, a line each.
    """

    results_dir: Path
    metric: DecidingMetric
    executor: ExecutorName
    tell: Callable[[str], None]

    def __call__(self, mapping: Mapping[str, Any], limit: Limit, only: Only | None = None) -> Outcomes:
        """Do a study's runs, and return what came of all that are done.

        Args:
            mapping: of the shape of a configuration file.
            limit: when what runs is stopped.
            only: names and seeds that are done now; None: all.

        Raises:
            UserError: for what planning refuses.
            EveryRunFailedError: if nothing is done, and something failed.
            KeyboardInterrupt: after Ctrl-C.
        """
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
        done = {
            (record.spec.experiment.name, record.spec.seed): Outcome.of(record, folder)
            for record, folder in finished_runs(whole, self.results_dir)
        }
        if failed and not done:
            problem = f"every run failed: {next(iter(failed.values()))}; the same command tries again"
            raise EveryRunFailedError(problem, file=file)
        return done

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
                value = self.metric.text(self.metric.of(record.test))
                self.tell(f"  {name}: {record.seconds:.0f} s{f', {value}' if record.spec.data.folds else ''}")
