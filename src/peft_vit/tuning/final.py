"""The last training: the recipe that was taken, on all images that are not sealed, which are read once, here.

It ends as on the folds, at the last of so many steps, as many times more as there are more images to train on; the
penalty of the probe that it starts from is chosen in the same way, on training images that are left out of its fit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from peft_vit.errors import UserError
from peft_vit.tuning.folds import Folds
from peft_vit.tuning.recipe import Recipe
from peft_vit.tuning.running import Outcome


def train_finally(folds: Folds, recipe: Recipe) -> tuple[Outcome, Outcome]:
    """Train a recipe on everything that is not sealed.

    Returns:
        What it came to on the sealed images, and what the same run came to before its weights were rounded; where
        nothing is rounded after training, twice the same.

    Raises:
        UserError: if it failed.
    """
    context, trained = folds.context, recipe.trained
    name, seed = f"final-{recipe.place}", context.request.seed
    experiment = folds.experiment(trained, folds.costs.last_steps(recipe))
    study = context.study(name, recipe.model, recipe.image_size, [seed], [experiment], folds=None)
    done = context.runner(study, context.state.unlimited, None)
    if (trained.name, seed) not in done:
        problem = "the last training failed, as is told above; the same command tries it again"
        raise UserError(problem, file=context.state.studies / name / trained.name)
    outcome = done[trained.name, seed]
    if recipe.when != "after" or recipe.bits is None:
        return outcome, outcome
    logits = folds.rounded_logits(outcome.folder, [recipe.bits])[recipe.bits]
    return replace(outcome, logits=np.asarray(logits, dtype=np.float64)), outcome
