"""One difference out of several studies': each study's mean counts the same, and seeds vary within studies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

from peft_vit.statistics import Interval
from peft_vit.statistics.checked import has_spread


@dataclass(frozen=True)
class Pooled:
    """A mean over studies."""

    interval: Interval  # estimate and interval; n counts all pairs
    p_value: float | None  # two-sided, of "the mean is 0"; None without an interval


def stratified_mean(strata: Sequence[ArrayLike], confidence: float = 0.95) -> Pooled:
    """Return the mean over S studies of each study's (n_s,) mean, with a t interval over seeds within studies.

    ``m = sum_s m_s / S``, ``v = sum_s s_s^2 / n_s / S^2``, and Satterthwaite's degrees of freedom ``v^2 / sum_s (s_s^2
    / n_s / S^2)^2 / (n_s - 1)``. Studies are strata, not draws: the interval describes what other seeds would change on
    these very studies. It says nothing about another data set or backbone.

    Assumption: values are independent between and within studies and roughly normal; variances may differ. Source:
    Cochran, Sampling Techniques (1977), 5.4; Satterthwaite, Biometrics Bulletin 2 (1946).
    """
    values = [np.asarray(stratum, dtype=np.float64) for stratum in strata]
    number = len(values)
    means = [math.fsum(one) / one.size for one in values]
    estimate, n = math.fsum(means) / number, sum(one.size for one in values)
    if any(one.size < 2 for one in values):
        reason = "a study has a single pair, which has no spread"
        return Pooled(Interval(estimate, None, None, n, confidence, reason), None)
    parts = [
        math.fsum((one - mean) ** 2) / (one.size - 1) / one.size / number**2
        for one, mean in zip(values, means, strict=True)
    ]
    variance = math.fsum(parts)
    if not any(has_spread(one) for one in values):
        reason = "the pairs of no study differ, so there is no spread"
        return Pooled(Interval(estimate, None, None, n, confidence, reason), None)
    degrees = variance**2 / math.fsum(part**2 / (one.size - 1) for part, one in zip(parts, values, strict=True))
    error = math.sqrt(variance)
    half = float(scipy.stats.t.ppf(0.5 + confidence / 2, degrees)) * error
    p_value = 2 * float(scipy.stats.t.sf(abs(estimate) / error, degrees))
    return Pooled(Interval(estimate, estimate - half, estimate + half, n, confidence), p_value)
