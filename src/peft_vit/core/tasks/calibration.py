"""How far a model's probabilities can be believed, from images that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.typing import ArrayLike

from peft_vit.base.statistics import TemperaturePrior, class_scores, conformal_quantile, fit_temperature, probabilities
from peft_vit.core.records import Calibrated
from peft_vit.core.tasks.task import coverage_thresholds


def calibrate(
    logits: ArrayLike, labels: ArrayLike, images: Sequence[int] | None = None, prior: TemperaturePrior | None = None
) -> Calibrated:
    """Fit a temperature, and thresholds of prediction sets to the probabilities that it makes.

    One number on so many images hardly fits to them, so the thresholds take the same images
    (docs/explanation/tuning.md has how far coverage then is from what was asked).

    Args:
        logits: (m, classes), held out; an image has a row for each time that it was.
        labels: (m,) true classes.
        images: (m,) which image each row is of; None: each of another.
        prior: of the temperature; None: the images decide alone.
    """
    which = range(len(logits)) if images is None else images  # type: ignore[arg-type]
    temperature = fit_temperature(logits, labels, prior, images)
    scores = class_scores(probabilities(logits, temperature), labels)
    coverages, thresholds = coverage_thresholds(lambda coverage: conformal_quantile(scores, coverage, which))
    return Calibrated(images=len(set(which)), temperature=temperature, coverages=coverages, thresholds=thresholds)
