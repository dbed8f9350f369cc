"""Reliability bins and the calibration error: how often predictions are right, by how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

BINS = 15  # as for the ECE of the records


@dataclass(frozen=True)
class Bin:
    """Predictions of similar confidence."""

    low: float  # no confidence in it lies below; the bin's own end, or with equal counts its smallest confidence
    high: float  # likewise above
    count: int  # predictions in it
    confidence: float | None  # their mean; None in an empty bin
    accuracy: float | None  # share of right ones among them; None in an empty bin


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


def _bin(p: NDArray[np.float64], hit: NDArray[np.bool_], low: float, high: float) -> Bin:
    if not p.size:
        return Bin(low, high, 0, None, None)
    return Bin(low, high, int(p.size), math.fsum(p) / p.size, float(np.count_nonzero(hit)) / p.size)
