"""What a file knows of how far its model can be believed: a temperature, and thresholds of prediction sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from peft_vit.errors import UserError
from peft_vit.statistics import class_scores, conformal_quantile, fit_temperature, prediction_sets, probabilities

COVERAGES = tuple(percent / 100 for percent in range(80, 100))
_Share = Annotated[float, Field(ge=0, le=1)]


class Calibrated(BaseModel):
    """Found on images of which the models that predicted them were not trained; see `statistics.conformal`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    images: int = Field(ge=1)
    temperature: float = Field(gt=0)  # probabilities are softmax(logits / temperature)
    coverages: tuple[_Share, ...]  # rising
    thresholds: tuple[_Share, ...]  # of each coverage: a class with 1 - p up to it is in the set

    @model_validator(mode="after")
    def _one_a_coverage(self) -> Self:
        if len(self.coverages) != len(self.thresholds) or list(self.coverages) != sorted(set(self.coverages)):
            raise ValueError("expected rising coverages and a threshold for each")
        return self

    @classmethod
    def on(cls, logits: ArrayLike, labels: ArrayLike, images: Sequence[int]) -> Self:
        """Fit a temperature, and thresholds to the probabilities that it makes.

        One number on so many images hardly fits to them, so the thresholds take the same images
        (docs/explanation/tuning.md has how far coverage then is from what was asked).

        Args:
            logits: (m, classes), held out; an image has a row for each time that it was.
            labels: (m,) true classes.
            images: (m,) which image each row is of.

        Raises:
            ValueError: as `statistics.fit_temperature`.
        """
        temperature = fit_temperature(logits, labels)
        scores = class_scores(probabilities(logits, temperature), labels)
        found = {coverage: conformal_quantile(scores, coverage, images) for coverage in COVERAGES}
        kept = {coverage: quantile for coverage, quantile in found.items() if math.isfinite(quantile)}
        return cls(
            images=len(set(images)), temperature=temperature, coverages=tuple(kept), thresholds=tuple(kept.values())
        )

    def probabilities(self, logits: ArrayLike) -> NDArray[np.float64]:
        """Return (N, classes) of logits of the same shape."""
        return probabilities(logits, self.temperature)

    def sets(self, probability: ArrayLike, coverage: float) -> NDArray[np.bool_]:
        """Return which classes belong to each image's set, (N, classes), by the next coverage that is stored.

        Raises:
            UserError: if that coverage is outside what is stored.
        """
        return prediction_sets(probability, self.threshold(coverage))

    def threshold(self, coverage: float) -> float:
        """Return the threshold of the least stored coverage that is not below one.

        Raises:
            UserError: if there is none, or all are above it.
        """
        if not self.coverages:
            raise UserError(
                f"the model was calibrated on {self.images} images, too few for any; leave it out", field="coverage"
            )
        if not self.coverages[0] - 1e-9 <= coverage <= self.coverages[-1] + 1e-9:  # also NaN
            raise UserError(
                f"expected {self.coverages[0]:g} to {self.coverages[-1]:g}, for which the model has thresholds; got "
                f"{coverage:g}",
                field="coverage",
            )
        place = next(place for place, stored in enumerate(self.coverages) if stored >= coverage - 1e-9)
        return self.thresholds[place]
