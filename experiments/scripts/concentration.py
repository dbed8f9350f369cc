"""How unevenly a budget is spread over sites."""

from __future__ import annotations

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
