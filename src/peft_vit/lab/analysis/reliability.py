"""Whether a model's confidence can be believed: reliability bins, two calibration errors, Brier's score.

A record holds the probability of the predicted class only, not those of the others. That is all that calibration of the
answer needs. Smaller is better for every measure here but `overconfidence`, whose best value is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from peft_vit.core.config import ExperimentConfig
from peft_vit.lab.analysis.studies import Run, Study

BINS = 15  # as for the ECE of the records

Measure = Literal["nll", "ece", "adaptive_ece", "brier"]


@dataclass(frozen=True)
class Bin:
    """Predictions of similar confidence."""

    low: float  # no confidence in it lies below; the bin's own end, or with equal counts its smallest confidence
    high: float  # likewise above
    count: int  # predictions in it
    confidence: float | None  # their mean; None in an empty bin
    accuracy: float | None  # share of right ones among them; None in an empty bin


@dataclass(frozen=True)
class Calibration:
    """One experiment over its seeds."""

    experiment: ExperimentConfig
    # equal-width bins over the predictions of all seeds. Seeds share images, so they are not independent, and an
    # interval from their count would be too narrow
    bins: tuple[Bin, ...]
    seeds: tuple[int, ...]  # with predictions
    without: tuple[int, ...]  # seeds whose record holds no predictions


def equal_width_bins(confidence: ArrayLike, right: ArrayLike, bins: int = BINS) -> tuple[Bin, ...]:
    """Return (n,) predictions by confidence: bin m of M holds those in ((m - 1) / M, m / M], the first one 0 too.

    Source: Guo et al. 2017, arXiv 1706.04599, figure 1; the same bins as the ECE of the records.
    """
    p, hit = np.asarray(confidence), np.asarray(right)
    index = np.clip(np.ceil(p * bins).astype(np.int64) - 1, 0, bins - 1)
    return tuple(_bin(p[index == m], hit[index == m], m / bins, (m + 1) / bins) for m in range(bins))


def equal_count_bins(confidence: ArrayLike, right: ArrayLike, bins: int = BINS) -> tuple[Bin, ...]:
    """Return predictions in up to M bins of equal counts, as far as ties allow; empty bins are left out.

    A prediction of midrank r among n by confidence goes to bin floor((r - 1/2) M / n): equal confidences stay together,
    so the bins do not depend on the order of the images. Source: Nguyen & O'Connor 2015, arXiv 1508.05154, adaptive
    binning; Nixon et al. 2019, arXiv 1904.01685.
    """
    p, hit = np.asarray(confidence), np.asarray(right)
    index = np.floor((scipy.stats.rankdata(p) - 0.5) * bins / p.size).astype(np.int64)
    groups = [index == m for m in np.unique(index)]
    return tuple(_bin(p[own], hit[own], float(p[own].min()), float(p[own].max())) for own in groups)


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error over bins: ``sum_m n_m / n |accuracy_m - confidence_m|``.

    It is biased upwards where bins hold few predictions, as their accuracy then strays by chance. Source: Naeini,
    Cooper & Hauskrecht, AAAI 2015; Guo et al. 2017, arXiv 1706.04599.
    """
    gaps = [b.count * abs((b.accuracy or 0.0) - (b.confidence or 0.0)) for b in bins]  # an empty one has neither
    return math.fsum(gaps) / sum(b.count for b in bins)


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


def _bin(p: NDArray[np.float64], hit: NDArray[np.bool_], low: float, high: float) -> Bin:
    if not p.size:
        return Bin(low, high, 0, None, None)
    return Bin(low, high, int(p.size), math.fsum(p) / p.size, float(np.count_nonzero(hit)) / p.size)
