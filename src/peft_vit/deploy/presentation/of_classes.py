"""One class an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from peft_vit.base.statistics import prediction_sets, probabilities
from peft_vit.core.records import Calibrated
from peft_vit.core.tasks import CLASSIFICATION, Meaning
from peft_vit.core.tasks.metric import Outputs
from peft_vit.deploy.presentation.presentation import Prediction, Presentation, of_ranking, ranked


class Classes(Presentation):
    """See `Presentation`."""

    task = CLASSIFICATION
    promise = (
        "Prediction sets",
        "Sets that hold the class",
        "Classes in a set",
        "On the test images, which chose nothing. `predict --coverage` gives such sets: the classes that an image may "
        "be of. They hold about as often as asked.",
    )
    holds = "The set at {0:g} % holds the true class of about {0:g} in 100 images"

    def prediction(
        self, outputs: Outputs, names: Sequence[str], meaning: Meaning, coverage: float | None, top: int
    ) -> Prediction:
        """Return the most probable classes, and with a coverage the set of those that the image may be of."""
        calibrated = cast("Calibrated | None", meaning)
        p = probabilities(outputs[None], 1.0 if calibrated is None else calibrated.temperature)  # (1, classes)
        in_set = np.zeros(p.shape, dtype=bool)
        if coverage is not None and calibrated is not None:
            in_set = prediction_sets(p, calibrated.threshold(coverage))
        return of_ranking(ranked(names, p[0]), top, classes=ranked(names, p[0], in_set[0]))

    def for_browser(self, meaning: Meaning, coverage: float | None) -> dict[str, Any]:
        """Return the temperature, and the threshold of sets."""
        calibrated = cast("Calibrated | None", meaning)
        sets = None
        if calibrated is not None and coverage is not None:
            sets = {"coverage": coverage, "threshold": calibrated.threshold(coverage)}
        return {
            "says": "which of {} classes it is of",
            "kind": "classes",
            "temperature": 1.0 if calibrated is None else calibrated.temperature,
            "set": sets,
        }
