"""Where labels are too few to set some aside, trainings without a fold of them each tell how good a model is."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from peft_vit.errors import UserError
from peft_vit.evaluation import calibrate
from peft_vit.records import RunRecord
from peft_vit.runs.held_out import Outputs, checked_on
from peft_vit.statistics import TemperaturePrior
from peft_vit.studies.plan import Plan
from peft_vit.studies.within_time import Outcome, finished_runs
from peft_vit.tasks import metric_of

# No image that tells the temperature has chosen a step, and they are few: it is less known than after validation.
_PRIOR = TemperaturePrior(median=1.5, spread=0.6)


class ByFolds(NamedTuple):
    """What is known of a run's model by trainings like it, each tested on images that it did not see.

    Attributes:
        record: of the run, with its temperature and thresholds.
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
    outcomes, predicted = [], []
    for own, folder in finished_runs(plan, results_dir):
        outcomes.append(Outcome.of(own, folder))
        predicted.append(None if own.probe_test is None else np.asarray(own.probe_test.predicted))
    if not outcomes:
        raise UserError("every training on folds failed; the same command tries again", file=results_dir)
    logits, labels, images = (
        np.concatenate([getattr(outcome, of) for outcome in outcomes]) for of in ("logits", "labels", "images")
    )
    metric, tested = metric_of(record.spec), record.predictions
    assert tested is not None
    assert tested.logits is not None
    calibrated = calibrate(logits, labels, images.tolist(), _PRIOR)
    of_test = Outputs(np.asarray(tested.logits, np.float32), np.asarray(tested.labels, np.int64), None)
    flagged = None if record.tested_calibration is None else record.tested_calibration.unlike
    measured = {"calibrated": calibrated, "tested_calibration": checked_on(calibrated, of_test, flagged)}
    score = metric.interval(labels, logits.argmax(1))
    upper = score.high if metric.sign > 0 else score.low
    assert upper is not None
    of_probe = None
    folds = [fold for fold in predicted if fold is not None]
    if len(folds) == len(predicted):
        of_probe = metric.sign * metric.interval(labels, np.concatenate(folds)).estimate
    return ByFolds(record.model_copy(update=measured), metric.sign * score.estimate, metric.sign * upper, of_probe)
