"""Group-sequential bounds: how large a normal statistic must be at each look so that all looks together keep a level.

Information is given in fractions of the largest, (K,) rising to 1. The statistics Z_k of the looks are standard normal
with covariances ``sqrt(t_j / t_k)``, j <= k, as those of a mean of more and more independent values are. Levels are
one-sided. Sources: Lan & DeMets, Biometrika 70 (1983); Armitage, McPherson & Rowe, JRSS A 132 (1969), for the
integration; Jennison & Turnbull, Group Sequential Methods (2000), 7 and 19.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import scipy

Spending = Literal["obrien-fleming", "pocock"]

_REACH = 9.0  # standard deviations beyond which nothing is integrated: 1e-19
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(10)
_SCORES = np.linspace(-2.25, 8.0, 42)  # normal scores of the levels, 0.99 to 6e-16, between which p-values are sought


def spent(fractions: Sequence[float], level: float, form: Spending) -> np.ndarray:
    """Return the share of the level that may be spent up to each look: (K,) fractions to (K,), the last is the level.

    O'Brien and Fleming's shape is ``2 - 2 Phi(z(1 - level/2) / sqrt(t))``, Pocock's ``level log(1 + (e - 1) t)``.
    Source: Lan & DeMets (1983).
    """
    t = np.asarray(fractions, dtype=np.float64)
    if form == "pocock":
        return level * np.log1p((math.e - 1) * t)
    return 2 * scipy.special.ndtr(scipy.special.ndtri(level / 2) / np.sqrt(t))


def boundaries(fractions: Sequence[float], level: float, form: Spending = "obrien-fleming") -> np.ndarray:
    """Return the bounds (K,) of the normal statistic; infinity where less than 1e-300 may be spent."""
    return np.array(_boundaries(tuple(map(float, fractions)), float(level), form))


@lru_cache(maxsize=4096)  # one for a design and level; a table of p-values takes 42
def _boundaries(fractions: tuple[float, ...], level: float, form: Spending) -> tuple[float, ...]:
    increments = np.diff(spent(fractions, level, form), prepend=0.0)
    points, mass, bounds = np.zeros(1), np.ones(1), []
    for k, (time, step) in enumerate(zip(fractions, np.diff(fractions, prepend=0.0), strict=True)):
        bound = _bound(points, mass, time, step, increments[k])
        bounds.append(bound)
        if k + 1 < len(fractions):
            smoothness = min(step, fractions[k + 1] - time)
            points, mass = _advance(points, mass, time, step, bound, smoothness)
    return tuple(bounds)


def _bound(points: np.ndarray, mass: np.ndarray, time: float, step: float, increment: float) -> float:
    """Return the bound that paths of this mass (N,) at these points (N,) cross with a probability of `increment`."""
    if increment < 1e-300:
        return math.inf
    with np.errstate(divide="ignore"):  # a density of zero has a logarithm of minus infinity
        logs, wanted = np.log(mass), math.log(increment)

    def excess(bound: float) -> float:
        tails = scipy.special.log_ndtr((points - bound * math.sqrt(time)) / math.sqrt(step))
        return float(scipy.special.logsumexp(logs + tails)) - wanted

    return float(scipy.optimize.brentq(excess, -_REACH, 40.0, xtol=1e-12))


def _advance(
    points: np.ndarray, mass: np.ndarray, time: float, step: float, bound: float, smoothness: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return points (M,) below the bound of a look and the mass (M,) there of the paths that continue from it.

    Paths are those of ``Z sqrt(t)``, whose increments are independent, with the variance `step`. Gauss-Legendre on
    pieces as wide as twice the standard deviation of an increment.
    """
    root = math.sqrt(time)
    low, high = -_REACH * root, min(bound, 40) * root
    pieces = max(1, math.ceil((high - low) / (2 * math.sqrt(smoothness))))
    edges = np.linspace(low, high, pieces + 1)
    half = (high - low) / pieces / 2
    new = (edges[:-1, None] + half * (1 + _NODES)).ravel()  # (M,)
    distance = new[:, None] - points  # (M, N)
    density = np.exp(-(distance**2) / (2 * step)) @ mass / math.sqrt(2 * math.pi * step)
    return new, density * np.tile(half * _WEIGHTS, pieces)


def repeated_p_values(statistics: np.ndarray, fractions: Sequence[float], form: Spending) -> np.ndarray:
    """Return the smallest level at which a bound was crossed up to each look: statistics (..., K') to (..., K').

    K' <= K looks were made. At most a level with at most its probability, whatever look one stops at, so Holm's
    procedure may use them (Liu & Anderson, JASA 103 (2008); Maurer & Bretz, Statistics in Biopharmaceutical Research
    5 (2013)). A statistic that is not a number counts as no evidence. Found between bounds at 42 levels, to four
    digits; 1 above 0.99.
    """
    values = np.asarray(statistics, dtype=np.float64)
    p_values = np.ones_like(values)
    for k, score_of in enumerate(_score_of(tuple(map(float, fractions)), form)[: values.shape[-1]]):
        low, high = score_of.x[0], score_of.x[-1]
        seen = values[..., k] > low
        p_values[..., k][seen] = scipy.special.ndtr(-score_of(np.minimum(values[..., k][seen], high)))
    return np.minimum.accumulate(p_values, axis=-1)


@lru_cache(maxsize=64)
def _score_of(fractions: tuple[float, ...], form: Spending) -> tuple[scipy.interpolate.PchipInterpolator, ...]:
    """Return for each look what turns a bound into the normal score of the level that it belongs to."""
    table = np.array([_boundaries(fractions, float(level), form) for level in scipy.special.ndtr(-_SCORES)])  # (42, K)
    finite = np.isfinite(table)
    return tuple(
        scipy.interpolate.PchipInterpolator(column[known], _SCORES[known])
        for column, known in zip(table.T, finite.T, strict=True)
    )
