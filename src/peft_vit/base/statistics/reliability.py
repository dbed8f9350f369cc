"""Reliability bins: how often predictions are right, by how sure they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions of similar confidence, one at least."""

    low: float  # the smallest confidence
    high: float  # the largest
    count: int  # predictions in it
    confidence: float  # their mean
    accuracy: float  # share of right ones among them


def equal_count_bins(confidence: ArrayLike, right: ArrayLike, bins: int) -> tuple[ReliabilityBin, ...]:
    """Return predictions in up to M bins of equal counts, as far as ties allow; empty bins are left out.

    A prediction of midrank r among n by confidence goes to bin floor((r - 1/2) M / n): equal confidences stay together,
    so the bins do not depend on the order of the images. Source: Nguyen & O'Connor 2015, arXiv 1508.05154, adaptive
    binning; Nixon et al. 2019, arXiv 1904.01685.
    """
    p, hit = np.asarray(confidence), np.asarray(right)
    index = np.floor((scipy.stats.rankdata(p) - 0.5) * bins / p.size).astype(np.int64)
    return tuple(
        ReliabilityBin(
            float(sure.min()), float(sure.max()), int(sure.size), math.fsum(sure) / sure.size, float(of.mean())
        )
        for sure, of in ((p[index == m], hit[index == m]) for m in np.unique(index))
    )
