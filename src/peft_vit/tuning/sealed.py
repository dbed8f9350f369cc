"""What the chosen model is worth on images that nothing was chosen by, and how far it can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from peft_vit.analysis.model_quality import ModelQuality, model_quality
from peft_vit.analysis.reliability import BINS, Bin, calibration_error, equal_count_bins, equal_width_bins
from peft_vit.records import Calibrated, RunRecord
from peft_vit.statistics import (
    Interval,
    fold_coverage,
    paired_proportions,
    prediction_sets,
    probabilities,
    proportion_interval,
)
from peft_vit.tasks.classification import CLASSIFICATION
from peft_vit.tuning.running import Outcome

SHOWN_COVERAGES = (0.8, 0.9, 0.95, 0.99)
_IN_A_BIN = 15  # images, at least, of a figure


@dataclass(frozen=True)
class HeldOut:
    """Predictions of images by models that were not trained on them; an image has a row for each time."""

    logits: NDArray[np.float64]  # (m, classes)
    labels: NDArray[np.int64]  # (m,)
    images: NDArray[np.int64]  # (m,) positions in the data set
    runs: NDArray[np.int64]  # (m,) seed of the run


@dataclass(frozen=True)
class CalibrationResult:
    """Probabilities on some images, before and after the temperature; the smaller, the better."""

    nll: tuple[float, float]  # mean, nats
    ece: tuple[float, float]
    bins: tuple[tuple[Bin, ...], tuple[Bin, ...]]  # of equal counts, for a figure


@dataclass(frozen=True)
class CoverageResult:
    """Prediction sets of one asked coverage."""

    asked: float
    folds: float  # share of held-out images whose set holds their class, each by thresholds of other images
    folds_size: float  # classes in a set, mean
    sealed: Interval  # the same share on the sealed images
    sealed_size: float


@dataclass(frozen=True)
class Sealed:
    """The chosen model on the sealed images, which nothing was chosen by."""

    quality: ModelQuality  # probabilities calibrated
    lost: Interval | None  # by rounding, of the same images; None: nothing was rounded after training
    calibration: CalibrationResult
    on_folds: CalibrationResult
    coverage_results: tuple[CoverageResult, ...]


def held_out(outcomes: Sequence[Outcome]) -> HeldOut:
    """Return what runs on folds said of their test images."""
    return HeldOut(
        np.concatenate([outcome.logits for outcome in outcomes]),
        np.concatenate([outcome.labels for outcome in outcomes]),
        np.concatenate([outcome.images for outcome in outcomes]),
        np.concatenate([np.full(len(outcome.labels), run) for run, outcome in enumerate(outcomes)]),
    )


def in_form(record: RunRecord, outcome: Outcome) -> RunRecord:
    """Return a run's record with what it says of its test images in the form that is delivered."""
    assert record.predictions is not None
    logits = outcome.logits.astype(np.float32)
    predictions = CLASSIFICATION.predictions(logits, outcome.labels, outcome.images, keep_logits=True)
    predictions = predictions.model_copy(update={"files": record.predictions.files})
    measured = CLASSIFICATION.measure(logits, outcome.labels)
    return record.model_copy(update={"test": measured, "predictions": predictions})


def measure_sealed(
    record: RunRecord, final: Outcome, before: Outcome, folds: HeldOut, calibrated: Calibrated
) -> Sealed:
    """Return what the last training's model says of the sealed images.

    Args:
        record: of its run, in the form that is delivered.
        final: in that form.
        before: of the same run, before its weights were rounded; the same if they are not.
        folds: what the recipe's models said on folds.
        calibrated: what was found on them.
    """
    logits, labels = final.logits, final.labels
    n = len(labels)
    probability = probabilities(logits, calibrated.temperature)
    quality = model_quality(record, probability[np.arange(n), logits.argmax(1)])
    assert quality is not None
    lost = None
    if before is not final:
        lost = paired_proportions(int((before.right & ~final.right).sum()), int((final.right & ~before.right).sum()), n)
    return Sealed(
        quality=quality,
        lost=lost,
        calibration=_calibration(logits, labels, calibrated),
        on_folds=_calibration(folds.logits, folds.labels, calibrated),
        coverage_results=tuple(_coverage_results(probability, labels, folds, calibrated)),
    )


def _calibration(logits: NDArray[np.float64], labels: NDArray[np.int64], calibrated: Calibrated) -> CalibrationResult:
    right = logits.argmax(1) == labels
    nll, ece, bins = [], [], []
    for temperature in (1.0, calibrated.temperature):
        log_p = scipy.special.log_softmax(logits / temperature, axis=1)  # (m, classes)
        nll.append(float(-log_p[np.arange(len(labels)), labels].mean()))
        sure = np.exp(log_p.max(1)).clip(0, 1)  # (m,)
        ece.append(calibration_error(equal_width_bins(sure, right)))
        bins.append(equal_count_bins(sure, right, max(3, min(BINS, len(labels) // _IN_A_BIN))))
    return CalibrationResult((nll[0], nll[1]), (ece[0], ece[1]), (bins[0], bins[1]))


def _coverage_results(
    probability: NDArray[np.float64], labels: NDArray[np.int64], folds: HeldOut, calibrated: Calibrated
) -> list[CoverageResult]:
    on_folds, n, found = probabilities(folds.logits, calibrated.temperature), len(labels), []
    several = len(np.unique(folds.runs)) > 1
    for asked in SHOWN_COVERAGES:
        if asked in calibrated.coverages and several:
            inside = prediction_sets(probability, calibrated.threshold(asked))
            share, size = fold_coverage(on_folds, folds.labels, folds.images, folds.runs, asked)
            sealed = proportion_interval(int(inside[np.arange(n), labels].sum()), n)
            found.append(CoverageResult(asked, share, size, sealed, float(inside.sum(1).mean())))
    return found
