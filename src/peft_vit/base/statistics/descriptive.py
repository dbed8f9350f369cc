"""Descriptions of the values given, without an interval: how unevenly a budget is spread, whether two orders agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import scipy
from numpy.typing import ArrayLike


def gini(amounts: ArrayLike) -> float:
    """Return the Gini coefficient of (n,) amounts: 0 for equal ones, (n - 1) / n if one site has everything.

    ``sum_ij |x_i - x_j| / (2 n^2 mean)``, computed from sorted values as ``2 sum_i i x_(i) / (n sum x) - (n +
    1) / n``. Source: Gini (1912); the sorted form: Sen, On Economic Inequality (1973), 2.
    Amounts are not negative, and one is above 0.
    """
    data = np.sort(amounts)
    n = data.size
    position = np.arange(1, n + 1)
    return float(2 * np.sum(position * data) / (n * np.sum(data)) - (n + 1) / n)


def normalized_entropy(amounts: ArrayLike) -> float:
    """Return Shannon's entropy of (n,) shares over its largest value, log n: 1 for equal amounts, 0 for one site.

    Source: Shannon, Bell System Technical Journal 27 (1948); the ratio is Pielou's evenness (1966).
    Amounts as in `gini`, of two sites or more: for one, evenness has no meaning.
    """
    return float(scipy.stats.entropy(amounts) / np.log(np.size(amounts))) + 0.0  # + 0.0 turns -0.0 into 0.0


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
