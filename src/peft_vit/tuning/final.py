"""The last training: the recipe that was taken, on all images that are not for the test, which are read once, here.

It ends as on the folds, at the last of so many steps, as many times more as there are more images to train on; where
more steps gain on folds, up to twice as many, four times if they were few; half of them, if steps took longer than
planned. The penalty of the probe that it starts from is chosen on training images that are left out of its fit.
Temperature and sets of classes come from what the folds' runs say, in the form that is delivered; what is unlike, from
training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from peft_vit.errors import UserError
from peft_vit.forecasting.time_limit import fit
from peft_vit.records import Calibrated, Decision, RunRecord
from peft_vit.runs.held_out import Outputs, tested_on
from peft_vit.studies.within_time import Outcome, covered_on_folds
from peft_vit.tasks import meaning_fields
from peft_vit.tuning.costs import LONGEST, MOST_STEPS, SHORTEST
from peft_vit.tuning.folds import Folds
from peft_vit.tuning.recipe import Recipe

_ENDLESS_S = 1e8
_LONGER = (4.0, 3.0, LONGEST, 1.5)  # steps are few if the machine was busy when they were planned
_SHORTER = (1.0, 0.75)  # and too many if it has become so


def times_longer(folds: Folds, recipe: Recipe) -> float:
    """Return how many times the steps that follow from the folds the last training has."""
    if recipe.is_probe:
        return 1.0
    longer = _LONGER if folds.gains_by_steps(recipe) else ()
    options = [times for times in longer if times * recipe.steps <= LONGEST * max(MOST_STEPS, recipe.steps)]
    possible = fit(options, partial(folds.ending_s, recipe), folds.context.state.limit.left_s)
    return possible or next((times for times in _SHORTER if folds.ends_in_time(recipe, times)), SHORTEST)


def train_finally(folds: Folds, recipe: Recipe, longer: float) -> tuple[Outcome, Outcome]:
    """Train a recipe on everything that is not for the test, so many times longer than on folds.

    Returns:
        What it came to on the test images, and what the same run came to before its weights were rounded; where
        nothing is rounded after training, twice the same.

    Raises:
        UserError: if it failed.
    """
    context, trained = folds.context, replace(recipe.trained, steps=folds.costs.last_steps(recipe, longer))
    name, seed = f"final-{recipe.place}", context.request.seed
    study = context.study(name, recipe.model, recipe.image_size, [seed], [folds.experiment(trained)], folds=None)
    study["measures"] |= {"features": True}
    done = context.runner(study, context.state.until(-_ENDLESS_S), None)  # it has to be brought to its end
    if (trained.name, seed) not in done:
        problem = "the last training failed, see above; the same command tries it again"
        raise UserError(problem, file=context.state.studies / name / trained.name)
    outcome = done[trained.name, seed]
    if recipe.when != "after" or recipe.bits is None:
        return outcome, outcome
    logits = folds.rounded_logits(outcome.folder, [recipe.bits])[recipe.bits]
    return replace(outcome, logits=np.asarray(logits, dtype=np.float64)), outcome


def in_form(
    record: RunRecord, final: Outcome, meaning: Calibrated | Decision, folds: Sequence[Outcome] = ()
) -> RunRecord:
    """Return the last training's record with what the delivered form says of the test images, and of those of folds."""
    assert record.predictions is not None
    logits, task, labels = final.logits.astype(np.float32), final.learned, final.labels
    found = meaning_fields(meaning)
    decision = found["decision"]
    same = np.array_equal(record.predictions.logits or [], final.logits)  # of a rounded model nobody has counted them
    flagged = record.tested_calibration.unlike if same and record.tested_calibration else None
    held = tested_on(found["calibrated"], decision, Outputs(logits, labels, None), task, flagged)
    on_folds = {"covered_on_folds": covered_on_folds(folds, task)}
    predictions = task.predictions(logits, labels, final.images, keep_logits=True, decision=decision)
    return record.model_copy(
        update=found
        | {
            "test": task.measure(logits, labels, decision),
            "predictions": predictions.model_copy(update={"files": record.predictions.files}),
            "tested_calibration": held.model_copy(update=on_folds),
        }
    )
