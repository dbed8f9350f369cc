"""What the chosen model is worth on images that nothing was chosen by, and how far it can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from peft_vit.analysis.model_quality import ModelQuality, model_quality
from peft_vit.analysis.reliability import BINS, Bin, calibration_error, equal_count_bins, equal_width_bins
from peft_vit.errors import UserError
from peft_vit.records import Calibrated, Predictions, RunRecord
from peft_vit.statistics import (
    Interval,
    fold_coverage,
    paired_proportions,
    prediction_sets,
    probabilities,
    proportion_interval,
)

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
    """The chosen model on the sealed images, which its final run has read once."""

    quality: ModelQuality  # probabilities calibrated
    reference: Interval | None  # accuracy of the reference; None: that is the chosen one
    lost: Interval | None  # against the reference, of the same images
    calibration: CalibrationResult
    on_folds: CalibrationResult
    coverage_results: tuple[CoverageResult, ...]


def held_out(records: Sequence[RunRecord]) -> HeldOut:
    """Return what runs on folds predicted of their test images.

    Raises:
        UserError: if a record holds no logits.
    """
    kept = [(record.spec.seed, record.predictions, _logits(record)) for record in records]
    found = [(seed, predictions, logits) for seed, predictions, logits in kept if predictions is not None]
    return HeldOut(
        np.concatenate([logits for _, _, logits in found]),
        np.concatenate([predictions.labels for _, predictions, _ in found]).astype(np.int64),
        np.concatenate([predictions.images for _, predictions, _ in found]).astype(np.int64),
        np.concatenate([np.full(len(predictions.labels), seed) for seed, predictions, _ in found]),
    )


def measure_sealed(chosen: RunRecord, reference: RunRecord | None, folds: HeldOut, calibrated: Calibrated) -> Sealed:
    """Return what final runs have predicted of the sealed images.

    Args:
        chosen: record of the chosen model's final run.
        reference: likewise; None: the chosen one is the reference.
        folds: predictions of the chosen model on folds.
        calibrated: what was found on them.

    Raises:
        UserError: if a record holds no logits.
    """
    logits, predictions = _logits(chosen), chosen.predictions
    assert predictions is not None
    labels, predicted = np.asarray(predictions.labels), np.asarray(predictions.predicted)
    right, n = labels == predicted, len(labels)
    other = None if reference is None else _right(reference, predictions)
    probability = probabilities(logits, calibrated.temperature)
    quality = model_quality(chosen, probability[np.arange(n), predicted])
    assert quality is not None
    return Sealed(
        quality=quality,
        reference=None if other is None else proportion_interval(int(other.sum()), n),
        lost=None if other is None else paired_proportions(int((other & ~right).sum()), int((right & ~other).sum()), n),
        calibration=_calibration(logits, labels, calibrated),
        on_folds=_calibration(folds.logits, folds.labels, calibrated),
        coverage_results=tuple(_coverage_results(probability, labels, folds, calibrated)),
    )


def _logits(record: RunRecord) -> NDArray[np.float64]:
    if record.predictions is None or record.predictions.logits is None:
        raise UserError(
            "holds no logits, on which probabilities are calibrated; run it again with measures: {logits: true}",
            file=record.spec.run_id,
            field="predictions.logits",
        )
    return np.asarray(record.predictions.logits, dtype=np.float64)


def _right(reference: RunRecord, chosen: Predictions) -> NDArray[np.bool_]:
    """Return where the reference is right, on the images of the chosen one in their order."""
    found = reference.predictions
    assert found is not None
    assert found.images == chosen.images
    return np.asarray(found.labels) == np.asarray(found.predicted)


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
