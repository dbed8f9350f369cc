"""How far a model's probabilities can be believed, from images that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from numpy.typing import ArrayLike

from peft_vit.base.statistics import TemperaturePrior, class_scores, conformal_quantile, fit_temperature, probabilities
from peft_vit.core.records import Calibrated
from peft_vit.core.tasks.task import coverage_thresholds

_WORST = 0.01  # share above chance, at least, and below all


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


def usual_temperature(accuracy: float, num_classes: int, most_images: float = math.inf) -> TemperaturePrior:
    """Return what is known of a classifier's temperature before held-out images, if it learned from smoothed labels.

    ln T = 0.24 - 0.29 x, x the logit of the accuracy above chance, (a - 1/K) / (1 - 1/K), between -1 and 4: the more
    of new images are right, the more too careful a model is whose labels were smoothed by 0.1. Fitted to the best T on
    60 to 400 test images of 11 trainings by LoRA, 56 to 592 steps, on digits, clothing and solar cells (20 to 256
    labels a class); ln T has a standard deviation of 0.11 around it, twice that as the accuracy is only expected.

    Args:
        accuracy: expected on new images.
        num_classes: K.
        most_images: see `TemperaturePrior`.
    """
    share = (accuracy - 1 / num_classes) / (1 - 1 / num_classes)
    share = min(max(share, _WORST), 1 - _WORST)
    x = min(max(math.log(share / (1 - share)), -1.0), 4.0)
    return TemperaturePrior(math.exp(0.24 - 0.29 * x), 0.22, most_images)
