"""E-process of the t test: evidence that may be looked at after every pair, without a number of looks or a maximum.

The likelihood of effect sizes ``delta = mean / sd`` above zero, mixed over a half-normal distribution, against that
of zero, both with the scale integrated out. Under a mean of zero it is a martingale that starts at one, so it exceeds
``1 / level`` at any time with at most the probability `level` (Ville); adding a constant to all values only raises it,
so the same holds for means below zero. Sources: Lai, Annals of Statistics 4 (1976); Wang & Ramdas, arXiv 2310.03722.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import scipy
from numpy.typing import ArrayLike

from peft_vit.statistics.checked import check_level

SCALE = 1.0  # of the half-normal distribution of effect sizes, in standard deviations of the differences


def log_e_value(t: ArrayLike, pairs: ArrayLike, scale: float = SCALE) -> np.ndarray:
    """Return the logarithm of the e-value of t statistics (...) of so many pairs (...), for a mean above zero.

    With ``c = 1 / scale``, sum S and sum of squares V of the n values, and ``A = V - S^2 / (n + c^2)``, it is
    ``sqrt(c^2 / (n + c^2)) (V / A)^(n / 2) 2 F_n(S sqrt(n / (A (n + c^2))))``, F_n being Student's distribution with n
    degrees of freedom: what the half-normal mixture over the effect size and ``d sigma / sigma`` integrate to.

    Raises:
        ValueError: for fewer than 2 pairs or a scale that is not positive.
    """
    values, n = np.broadcast_arrays(np.asarray(t, dtype=np.float64), np.asarray(pairs, dtype=np.float64))
    if np.any(n < 2) or not scale > 0:
        raise ValueError(f"expected at least 2 pairs and a scale above 0, got {n.min() if n.size else n} and {scale}")
    own = n + scale**-2
    # in the unit of the values' standard deviation: S = t sqrt(n), V = n - 1 + t^2
    rest = n - 1 + values**2 * (scale**-2 / own)
    two_sided = (n / 2) * (np.log(n - 1 + values**2) - np.log(rest)) - np.log(own * scale**2) / 2
    return np.asarray(two_sided + math.log(2) + np.log(scipy.special.stdtr(n, values * n / np.sqrt(rest * own))))


def anytime_p_values(t: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return p-values that hold at any time, one over the largest e-value so far: t (..., K), pairs (K,) to (..., K).

    A statistic that is not a number counts as no evidence.
    """
    logs = np.zeros_like(t, dtype=np.float64)
    seen = np.broadcast_to(pairs >= 2, t.shape) & np.isfinite(t)
    logs[seen] = log_e_value(t[seen], np.broadcast_to(pairs, t.shape)[seen])
    return np.exp(-np.maximum.accumulate(np.maximum(logs, 0.0), axis=-1))


@lru_cache(maxsize=4096)  # comparisons of one family ask for the same
def anytime_bound(pairs: int, level: float) -> float:
    """Return the t statistic from which on the e-value is at least ``1 / level``; infinity if none is.

    Raises:
        ValueError: for a level outside 0 to 1.
    """
    check_level(level, "level")
    if pairs < 2 or float(log_e_value(1e9, pairs)) < -math.log(level):
        return math.inf
    excess = lambda t: float(log_e_value(t, pairs)) + math.log(level)  # noqa: E731
    return float(scipy.optimize.brentq(excess, 0.0, 1e9, xtol=1e-10))
