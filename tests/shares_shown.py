"""How the shares of `shares_task.py` are shown: as classes are, so a browser knows how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_vit.core.tasks import TASKS, Meaning
from peft_vit.deploy.presentation import LabelledOutputs, Prediction, Presentation, of_ranking, ranked


class Shares(Presentation):
    """See `Presentation`."""

    task = TASKS["shares"]
    promise = ("", "", "", "")

    def prediction(
        self, outputs: NDArray[np.floating], names: Sequence[str], meaning: Meaning, coverage: float | None, top: int
    ) -> Prediction:
        """Return the largest shares."""
        return of_ranking(ranked(names, self.task.predicted(outputs[None])[0]), top)

    def for_browser(self, meaning: Meaning, coverage: float | None) -> dict[str, Any]:
        """Return that outputs are as classes' are."""
        return {"says": "shares of {}", "kind": "classes", "temperature": 1.0, "set": None}

    def measures(self, outputs: LabelledOutputs) -> list[dict[str, Any]]:
        """Return the mean of each share, in truth and as predicted."""
        pairs = zip(outputs.names, outputs.labels.mean(0).tolist(), outputs.predicted.mean(0).tolist(), strict=True)
        return [{"Share": name, "Mean": true, "Predicted": predicted} for name, true, predicted in pairs]
