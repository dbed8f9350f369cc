"""How far an image is from those that a model was trained on, by features of both.

It is the distance to the nearest neighbour, each feature in units of its standard deviation. Source: Sun, Ming, Zhu and
Li 2022, arXiv 2204.06507, who take features in front of the head and unit vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

STEPS = 16  # of a stored feature in a standard deviation: one byte holds 8 of these to either side
_CHUNK = 256


@dataclass(frozen=True)
class Neighbours:
    """Features of n reference images, as they are stored: one image's are ``mean + spread * codes / STEPS``."""

    mean: NDArray[np.float32]  # (D,)
    spread: NDArray[np.float32]  # (D,), above 0
    codes: NDArray[np.int8]  # (n, D)

    @classmethod
    def of(cls, features: ArrayLike) -> Neighbours:
        """Return what is stored of features (n, D)."""
        values = np.asarray(features, dtype=np.float32)
        mean, spread = values.mean(0), values.std(0)
        spread[spread <= 1e-6 * np.abs(mean)] = 1.0  # a constant feature tells nothing, and must not divide
        spread[spread == 0] = 1.0
        codes = np.rint((values - mean) / spread * STEPS).clip(-127, 127).astype(np.int8)
        return cls(mean, spread, codes)

    def leave_one_out_distances(self) -> NDArray[np.float64]:
        """Return the distance of each reference image to the nearest other one, (n,), as `distances`."""
        reference = self.codes.astype(np.float64) / STEPS  # (n, D)
        squares = (reference**2).sum(1)
        between = squares[:, None] + squares - 2 * reference @ reference.T  # (n, n)
        np.fill_diagonal(between, np.inf)
        return np.asarray(np.sqrt(between.min(1).clip(0) / reference.shape[1]))

    def distances(self, features: ArrayLike) -> NDArray[np.float64]:
        """Return the distance of each image (m, D) to its nearest neighbour, (m,): root of the mean square over D."""
        z = (np.asarray(features, dtype=np.float32) - self.mean) / self.spread  # (m, D)
        reference = self.codes.astype(np.float32) / STEPS  # (n, D)
        nearest = [
            ((part**2).sum(1)[:, None] + (reference**2).sum(1) - 2 * part @ reference.T).min(
                1
            )  # (<= CHUNK, n) -> (<= CHUNK,)
            for part in (z[start : start + _CHUNK] for start in range(0, len(z), _CHUNK))
        ]
        return np.sqrt(np.concatenate(nearest).clip(0).astype(np.float64) / z.shape[1])
