"""Descriptions of the values given, without an interval: whether two orders agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import scipy
from numpy.typing import ArrayLike


def spearman(left: ArrayLike, right: ArrayLike) -> float | None:
    """Return Spearman's rank correlation of (n,) values each, midranks under ties; None if one side is constant.

    A description of the n values given. No p-value: the sites of one network are not independent, so
    the usual null distribution does not hold for them. Source: Spearman, American Journal of Psychology 15 (1904).
    """
    ranks = scipy.stats.rankdata([left, right], axis=1)  # (2, n)
    centered = ranks - (ranks.shape[1] + 1) / 2
    product = centered @ centered.T  # (2, 2) multiples of 1/4, so exact, and equal lists have a rho of exactly 1
    outer = float(np.sqrt(product[0, 0] * product[1, 1]))
    return float(np.clip(product[0, 1] / outer, -1.0, 1.0)) if outer > 0 else None


def grouped(pairs: Iterable[tuple[_Key, _Value]]) -> dict[_Key, list[_Value]]:
    """Return key -> all its values, by the first one of each."""
    groups: dict[_Key, list[_Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


_Key = TypeVar("_Key")

_Value = TypeVar("_Value")
