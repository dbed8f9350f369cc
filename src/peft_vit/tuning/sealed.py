"""The last training's model on the sealed images, in the form that is delivered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peft_vit.evaluation import calibrate
from peft_vit.records import Calibrated, RunRecord
from peft_vit.runs.held_out import Outputs, checked_on
from peft_vit.statistics import Interval, paired_proportions
from peft_vit.tasks.classification import CLASSIFICATION
from peft_vit.tuning.running import Outcome


def calibrated_on(folds: Sequence[Outcome]) -> Calibrated:
    """Return how far a model can be believed, from what its recipe's runs on folds said of their test images."""
    logits, labels, images = (
        np.concatenate([getattr(fold, of) for fold in folds]) for of in ("logits", "labels", "images")
    )
    return calibrate(logits, labels, images.tolist())


def in_form(record: RunRecord, final: Outcome, calibrated: Calibrated) -> RunRecord:
    """Return the last training's record with what the delivered form says of the sealed images.

    Args:
        record: of the run.
        final: what it came to, in that form.
        calibrated: what was found on folds.
    """
    assert record.predictions is not None
    logits = final.logits.astype(np.float32)
    predictions = CLASSIFICATION.predictions(logits, final.labels, final.images, keep_logits=True)
    return record.model_copy(
        update={
            "test": CLASSIFICATION.measure(logits, final.labels),
            "predictions": predictions.model_copy(update={"files": record.predictions.files}),
            "calibrated": calibrated,
            "tested_calibration": checked_on(calibrated, Outputs(logits, final.labels, None)),
        }
    )


def changed_by_rounding(final: Outcome, before: Outcome) -> Interval | None:
    """Return what rounding changed of the share that is right; None: nothing was rounded after training."""
    if before is final:
        return None
    gains, losses = int((final.right & ~before.right).sum()), int((before.right & ~final.right).sum())
    return paired_proportions(gains, losses, len(final.labels))
