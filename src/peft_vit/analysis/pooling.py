"""One difference out of several studies': each study's mean counts the same, and seeds vary within studies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

from peft_vit.statistics import Interval, interquartile_mean_interval
from peft_vit.statistics.checked import has_spread

LEAST_STUDIES = 3  # for an interquartile mean: of two studies it says nothing that their means do not


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


def interquartile_over_studies(by_seed: Sequence[Mapping[int, float]]) -> tuple[Interval | None, str]:
    """Return the interquartile mean over pairs and studies, with its stratified bootstrap interval.

    Needs as many pairs of each study, so it takes the seeds that all studies have.

    Args:
        by_seed: of each study, seed -> value.

    Returns:
        The interval and what restricts it; None with the reason why there is none.
    """
    if len(by_seed) < LEAST_STUDIES:
        return None, f"takes {LEAST_STUDIES} studies"
    seeds = sorted(set.intersection(*(set(values) for values in by_seed)))
    if len(seeds) < 2:
        return None, "the studies have fewer than 2 seeds in common"
    scores = np.array([[values[seed] for values in by_seed] for seed in seeds])  # (seeds, studies)
    dropped = sum(len(values) - len(seeds) for values in by_seed)
    note = f"over the {len(seeds)} seeds that all studies have; {dropped} other pairs left out" if dropped else ""
    generator = np.random.default_rng(0)  # of the resampling alone: the same records give the same interval
    return interquartile_mean_interval(scores, generator), note
