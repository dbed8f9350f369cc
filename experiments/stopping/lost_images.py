"""What so many images can tell of the share of them that a model loses: a limit to what folds without spread claim.

Of N images a share `loss` is lost, net of those that are gained: minus the mean difference. It scatters least if
nothing is gained: then ``N loss`` is binomial, and its test against a margin is exact (Clopper & Pearson, Biometrika 26
(1934)); with no image lost p is ``(1 - margin)^N``, and three over N is nearly the upper 95 % limit (Hanley &
Lippman-Hand, JAMA 249 (1983)). What is gained makes it scatter more, which the spread of the folds shows.

If no image is lost and k are gained, p is ``(1 - margin)^N 2^-k``: where a share g is gained and g + margin or more is
lost, nothing is lost and k gained with at most ``C(N, k) g^k (1 - margin - 2 g)^(N - k)``. With
``x = g / (1 - margin)`` that is ``(1 - margin)^N 2^-k C(N, k) (2 x)^k (1 - 2 x)^(N - k)``, whose last three factors are
a binomial probability.

Counts need not be whole: binomial sums are continued by the beta function. Assumption: images are independent.
"""

from __future__ import annotations

import numpy as np
import scipy
from numpy.typing import ArrayLike


def loss_p_values(means: ArrayLike, images: int, margin: float) -> np.ndarray:
    """Return p-values of "loses less than the margin" and of "loses more", of mean differences (...): (2, ...).

    Args:
        means: differences, -1 to 1; below 0 images are lost.
        images: N, each counted once however often it is predicted.
        margin: a share, above 0.
    """
    lost = -images * np.asarray(means, dtype=np.float64)
    some = np.clip(lost, 0.0, images)
    none_lost = (1 - margin) ** images * np.exp2(np.minimum(lost, 0.0))
    with np.errstate(invalid="ignore"):  # of parameters 0, where the other branch is taken
        less = np.where(lost > 0, scipy.special.betainc(images - some, some + 1, 1 - margin), none_lost)
        more = np.where(lost > 0, scipy.special.betainc(some, images - some + 1, margin), 1.0)
    return np.array([np.where(some < images, less, 1.0), more])


def loss_bounds(images: int, margin: float, levels: tuple[float, float]) -> tuple[float, float]:
    """Return the mean differences from which on, and up to which, p-values of `loss_p_values` are at most levels."""
    none_lost = (1 - margin) ** images
    if none_lost <= levels[0]:
        less = float(scipy.special.bdtrik(levels[0], images, margin))
    else:
        less = float(np.log2(levels[0] / none_lost))  # below 0: so many have to be gained
    more = float(scipy.special.bdtrik(1 - levels[1], images, margin)) + 1
    return -less / images, -more / images


def difference_limits(mean: float, images: int, levels: tuple[float, float]) -> tuple[float, float]:
    """Return the ends of the mean difference that so many images allow, each with an error of its level.

    The lower end is above ``-margin`` exactly where `loss_p_values` is below the level; it is at most 0.
    """
    lost, gained = (float(np.clip(sign * images * mean, 0.0, images)) for sign in (-1, 1))
    if lost > 0 or gained == 0:
        low = -_upper(lost, images, levels[0])
    else:
        low = min(0.0, float((levels[0] * np.exp2(gained)) ** (1 / images)) - 1)
    high = -float(scipy.special.betaincinv(lost, images - lost + 1, levels[1])) if lost > 0 else 0.0
    return low, high if lost > 0 else _upper(gained, images, levels[1])


def _upper(count: float, images: int, level: float) -> float:
    """Return Clopper and Pearson's upper limit of a share."""
    return 1.0 if count >= images else float(scipy.special.betaincinv(count + 1, images - count, 1 - level))
