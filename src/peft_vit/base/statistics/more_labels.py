"""What twice as many labels, or steps, would bring: a power law through the errors with half and with all of them.

The error of a model that is trained on n images is taken as ``c n^-a``, a >= 0 (Hestness et al., arXiv 1712.00409; of
small data sets Mahmood et al., arXiv 2207.01725). Two points determine c and a; resampled images say how surely.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peft_vit.base.statistics.intervals import CONFIDENCE, Interval

_RESAMPLED = 2000


def gain_of_doubling(
    wrong_half: ArrayLike,
    wrong_all: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    share: float,
    error: float | None = None,
) -> Interval:
    """Return how much lower the error is expected to be with twice as many, with a percentile interval.

    Args:
        wrong_half: (N,), 1 for an image that a model of half as many has wrong, else 0.
        wrong_all: (N,), likewise of a model of `share` of all.
        weights: (N,) of images; None: all count the same.
        share: of labels 0.8 on five folds; of steps 1.
        error: with all, of another model whose error falls in the same ratio; None: of these models.
    """
    wrong = np.stack([np.asarray(wrong_half, float), np.asarray(wrong_all, float)])  # (2, N)
    weight = np.ones(wrong.shape[1]) if weights is None else np.asarray(weights, float)
    counts = np.random.default_rng(0).multinomial(len(weight), np.full(len(weight), 1 / len(weight)), size=_RESAMPLED)
    drawn = counts * weight  # (B, N)
    errors = drawn @ wrong.T / drawn.sum(1, keepdims=True)  # (B, 2)
    low, high = np.quantile(_gain(errors, share, error), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    estimate = _gain((wrong @ weight / weight.sum())[None], share, error)[0]
    return Interval(float(estimate), float(low), float(high), len(weight), CONFIDENCE)


def _gain(errors: NDArray[np.float64], share: float, error: float | None) -> NDArray[np.float64]:
    """Return error(N) - error(2 N), where errors (B, 2) are those with half of share * N and with share * N.

    Where `error` is given, it is error(N).
    """
    half, whole = errors.T
    ratio = np.divide(whole, half, out=np.ones_like(half), where=half > 0).clip(0, 1)  # 2^-a
    now = whole * ratio ** math.log2(1 / share) if error is None else error  # with all
    gained: NDArray[np.float64] = now * (1 - ratio)
    return gained
