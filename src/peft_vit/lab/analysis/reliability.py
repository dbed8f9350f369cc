"""Whether a model's confidence can be believed: reliability bins, two calibration errors, Brier's score.

A record holds the probability of the predicted class only, not those of the others. That is all that calibration of the
answer needs. Smaller is better for every measure here but `overconfidence`, whose best value is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from peft_vit.base.statistics.reliability import Bin, calibration_error, equal_count_bins, equal_width_bins
from peft_vit.core.config import ExperimentConfig
from peft_vit.lab.analysis.studies import Run, Study

Measure = Literal["nll", "ece", "adaptive_ece", "brier"]


@dataclass(frozen=True)
class Calibration:
    """One experiment over its seeds."""

    experiment: ExperimentConfig
    # equal-width bins over the predictions of all seeds. Seeds share images, so they are not independent, and an
    # interval from their count would be too narrow
    bins: tuple[Bin, ...]
    seeds: tuple[int, ...]  # with predictions
    without: tuple[int, ...]  # seeds whose record holds no predictions


def _of_predictions(measure: Callable[[Any, Any], float]) -> Callable[[Run], float | None]:
    """Return the measure of a run's confidences on test and of what is right; of a record without predictions None."""

    def of(run: Run) -> float | None:
        predictions = _predictions(run)
        return None if predictions is None else measure(*predictions)

    return of


MEASURES: dict[Measure, Callable[[Run], float | None]] = {
    "nll": lambda run: run.test.nll,
    "ece": lambda run: run.test.ece,
    "adaptive_ece": _of_predictions(lambda p, hit: calibration_error(equal_count_bins(p, hit))),
    # Mean squared error of the confidence in the answer. With two classes it is Brier's score of the probability of one
    # class (half of his sum over both). With more his sum needs all probabilities, which records do not hold; this then
    # scores the forecast "my answer is right". Source: Brier, Monthly Weather Review 78 (1950).
    "brier": _of_predictions(lambda p, hit: math.fsum((p - hit) ** 2) / p.size),
}
# mean confidence minus accuracy
OVERCONFIDENCE = _of_predictions(lambda p, hit: math.fsum(p - hit) / p.size)


def calibration(study: Study) -> tuple[Calibration, ...]:
    """Return one row for each experiment with a finished run."""
    rows = []
    for runs in (study.of(e.name) for e in study.experiments if study.of(e.name)):
        known = {run.seed: predictions for run in runs if (predictions := _predictions(run)) is not None}
        confidence, right = (np.concatenate(own) for own in zip(*known.values(), strict=True)) if known else ((), ())
        rows.append(
            Calibration(
                experiment=runs[0].experiment,
                bins=equal_width_bins(confidence, right) if known else (),
                seeds=tuple(known),
                without=tuple(run.seed for run in runs if run.seed not in known),
            )
        )
    return tuple(rows)


def _predictions(run: Run) -> tuple[NDArray[np.float64], NDArray[np.bool_]] | None:
    """Return the confidence on each test image and whether it is right, (n,) each; None if they are not recorded."""
    predictions = run.record.predictions
    if predictions is None or not predictions.labels:
        return None
    right = np.asarray(predictions.predicted) == np.asarray(predictions.labels)
    return np.asarray(predictions.probability, dtype=np.float64), right
