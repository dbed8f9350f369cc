"""Where labels are too few to set some aside, trainings without a fold of them each tell how good a model is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from peft_vit.base.errors import UserError
from peft_vit.core.records import Calibrated, Decision, RunRecord
from peft_vit.core.tasks import OF_FOLDS, TASKS, Labels, Task, meaning_fields, metric_of, rows_of, thresholds_of
from peft_vit.fit.within_time import Outcome, covered_on_folds, finished_runs, meaning_on, pooled
from peft_vit.runs.scheduling.plan import Plan


class ByFolds(NamedTuple):
    """What is known of a run's model by trainings like it, each tested on images that it did not see.

    Attributes:
        record: of the run, with what its outputs mean.
        value: of the metric that decides; larger is better.
        upper: the end of its 95 % interval.
        of_probe: likewise, of the regression that these trainings started from, on the same images; None: of none.
    """

    record: RunRecord
    value: float
    upper: float
    of_probe: float | None


def known_by_folds(record: RunRecord, plan: Plan, results_dir: Path) -> ByFolds:
    """Return what the finished runs of a study on folds tell of a run's model, see `fold_study`.

    Args:
        record: of the run.
        plan: of the study.
        results_dir: the study lies below it.

    Raises:
        UserError: if none of them has finished.
    """
    task, metric = TASKS[record.spec.task].restored(record.decision), metric_of(record.spec)
    finished = list(finished_runs(plan, results_dir))
    if not finished:
        raise UserError("every training on folds failed; the same command tries again", file=results_dir)
    outcomes = [Outcome.of(own, folder) for own, folder in finished]
    labels = np.concatenate([outcome.labels for outcome in outcomes])
    known = with_meaning(record, meaning_on(outcomes, task, OF_FOLDS), outcomes, task)
    score = metric.interval(labels, *_by_others(task, outcomes))
    upper = score.high if metric.sign > 0 else score.low
    upper = score.estimate if upper is None else upper
    of_probe = None
    probes = [own.probe_test for own, _ in finished if own.probe_test is not None]
    if len(probes) == len(finished):
        each = [(rows_of(probe.predicted), probe.thresholds) for probe in probes]
        of_probe = metric.sign * metric.interval(labels, *_joined(each)).estimate
    return ByFolds(known, metric.sign * score.estimate, metric.sign * upper, of_probe)


def with_meaning(
    record: RunRecord,
    meaning: Calibrated | Decision,
    outcomes: Sequence[Outcome],
    task: Task,
    logits: NDArray[np.float32] | None = None,
) -> RunRecord:
    """Return a run's record with what its outputs mean, and what that comes to on its test images.

    Args:
        record: of the run.
        meaning: of its outputs.
        outcomes: of like runs on folds, by which that is known.
        task: as the run learned it.
        logits: (N, K) of its test images in another form of the model, such as with rounded weights; None: its own.
    """
    tested, found = record.predictions, meaning_fields(meaning)
    assert tested is not None
    own, labels = np.asarray(tested.logits, np.float32), rows_of(tested.labels)
    is_own = logits is None or np.array_equal(own, logits)
    logits, decision = own if logits is None else logits, found["decision"]
    if decision is not None or not is_own:
        images = np.asarray(tested.images)
        again = task.predictions(logits, labels, images, keep_logits=True, decision=decision)
        found["predictions"] = again.model_copy(update={"files": tested.files})
        found["test"] = task.measure(logits, labels, decision)
    # Of another form nobody has counted which images are unlike those of training.
    flagged = record.tested_calibration.unlike if is_own and record.tested_calibration else None
    held = task.tested(meaning, logits, labels, flagged)
    found["tested_calibration"] = held.model_copy(update={"covered_on_folds": covered_on_folds(outcomes, task)})
    return record.model_copy(update=found)


def _by_others(task: Task, outcomes: Sequence[Outcome]) -> tuple[Labels, Labels]:
    """Return what is predicted of all images, and from which probabilities on, with what other folds say that it means.

    Thresholds that an image has chosen would make it look better than a new one.
    """
    each = []
    for own in outcomes:
        others = [other for other in outcomes if other is not own] or [own]
        logits, labels, _ = pooled(others, task)
        meaning = task.decide(logits, labels, OF_FOLDS)
        each.append((task.predicted(pooled([own], task)[0], meaning), thresholds_of(meaning)))
    return _joined(each)


def _joined(each: Sequence[tuple[Labels, tuple[float, ...]]]) -> tuple[Labels, Labels]:
    thresholds = [np.broadcast_to(least or 0.5, predicted.shape) for predicted, least in each]
    return np.concatenate([predicted for predicted, _ in each]), np.concatenate(thresholds)
