"""What every function here asks of its arrays, and the comparisons that rounding must not decide."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

ROUNDING = 1e-12  # differences of accuracies carry rounding errors of about 1e-14 of their size


def finite(values: ArrayLike, name: str = "values") -> np.ndarray:
    """Return values as a float array of shape (n,).

    Raises:
        ValueError: for another shape, no values, or one that is not finite, which is named by its position.
    """
    data = np.asarray(values, dtype=np.float64)
    expected = f"{name}: expected a non-empty one-dimensional array of finite values"
    if data.ndim != 1 or data.size == 0:
        raise ValueError(f"{expected}, got the shape {data.shape}")
    bad = np.flatnonzero(~np.isfinite(data))
    if bad.size:
        raise ValueError(f"{expected}, got {data[bad[0]]} at position {bad[0]} ({bad.size} of {data.size} are not)")
    return data


def check_level(value: float, name: str) -> None:
    """Refuse a level or a coverage.

    Raises:
        ValueError: unless 0 < value < 1.
    """
    if not 0 < value < 1:
        raise ValueError(f"expected 0 < {name} < 1, got {value}")


def has_spread(data: np.ndarray) -> bool:
    """Return whether values differ by more than rounding: (n,) to a bool.

    0.82 - 0.81 and 0.81 - 0.80 are one difference that floats write in two ways; a t test would call that proof.
    """
    return data.size > 1 and float(np.ptp(data)) > ROUNDING * float(np.abs(data).max())


def shifted(values: ArrayLike, center: float) -> np.ndarray:
    """Return (n,) values minus a center: zero where both are one number but for rounding, equal where the values are.

    0.82 - 0.81 misses a margin of 0.01 by 1e-17. Beside nothing but such remains, a test would take them for
    differences that all point one way. Raises as `finite`.
    """
    data = finite(values)
    return data if center == 0 else without_rounding(data - center, max(float(np.abs(data).max()), abs(center)))


def without_rounding(data: np.ndarray, unit: float | None = None) -> np.ndarray:
    """Return (n,) values with those equal that differ by rounding only, and zero where they are zero but for rounding.

    Sizes that lie closer together than a 1e-12th of the unit, or else of the largest, take the smallest one's size;
    signs stay. The unit is the size of the numbers that these are differences of.
    """
    sizes = np.abs(data)
    order = np.argsort(sizes, kind="stable")
    ascending = sizes[order]
    room = ROUNDING * (ascending[-1] if unit is None else unit)
    new = np.diff(ascending, prepend=0.0) > room  # (n,) where a new size begins
    starts = np.concatenate([[0.0], ascending[new]])  # before the first new one everything is zero
    merged = np.empty_like(sizes)
    merged[order] = starts[np.cumsum(new)]
    return np.copysign(merged, data) + 0.0  # + 0.0 turns -0.0 into 0.0
