"""The last training: the recipe that was taken, on all images that are not for the test, which are read once, here.

It ends as on the folds, at the last of so many steps, as many times more as there are more images to train on; where
more steps gain on folds, up to twice as many, four times if they were few; half of them, if steps took longer than
planned. The penalty of the probe that it starts from is chosen on training images that are left out of its fit.
Temperature and sets of classes come from what the folds' runs say, in the form that is delivered; what is unlike, from
training images.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from peft_vit.fit.costs import LENGTHS, LONGEST, MOST_STEPS, SHORTEST
from peft_vit.fit.folds import Folds
from peft_vit.fit.outcomes import Outcome
from peft_vit.fit.recipe import Recipe
from peft_vit.runs.costs.time_limit import fit

_ENDLESS_S = 1e8


def times_longer(folds: Folds, recipe: Recipe) -> float:
    """Return how many times the steps that follow from the folds the last training has."""
    if recipe.is_probe:
        return 1.0
    longest = LENGTHS[0] if folds.gains_by_steps(recipe) else 1.0
    options = [times for times in LENGTHS if 1 < times <= longest]
    few = [times for times in options if times * recipe.steps <= LONGEST * max(MOST_STEPS, recipe.steps)]
    possible = fit(few, partial(folds.ending_s, recipe), folds.context.state.limit.left_s)
    shorter = (times for times in LENGTHS if times <= 1 and folds.ends_in_time(recipe, times))
    return max(possible or next(shorter, SHORTEST), folds.longest_done(recipe, longest))


def train_finally(folds: Folds, recipe: Recipe, longer: float) -> tuple[Outcome, Outcome]:
    """Train a recipe on everything that is not for the test, so many times longer than on folds.

    The test comes on top of the minutes, on images drawn at random where not all of them fit their share.

    Returns:
        What it came to on the test images, and what the same run came to before its weights were rounded; where
        nothing is rounded after training, twice the same.

    Raises:
        EveryRunFailedError: if it failed.
    """
    context, trained = folds.context, folds.last(recipe, longer)
    name, seed = f"final-{recipe.place}", context.request.seed
    every, is_done = context.sealed_images, trained.done_as in context.state.file.decided
    # Once for a size, since its other models are read on the same images; a call with more minutes reads no others.
    tested = context.state.once(
        f"tested {recipe.place}", lambda: every if is_done else folds.costs.tested_images(recipe)
    )
    if not is_done:
        context.state.tell(folds.costs.test_line(recipe, tested))
    some = {"tested_images": tested} if tested < every else {}
    experiments = [folds.experiment(trained)]
    study = context.study(name, recipe.model, recipe.image_size, [seed], experiments, folds=None, **some)
    study["measures"] |= {"features": True}
    done = context.runner(study, context.state.until(-_ENDLESS_S), None)  # it has to be brought to its end
    outcome = done[trained.name, seed]
    context.state.once(trained.done_as, lambda: True)
    if recipe.when != "after" or recipe.bits is None:
        return outcome, outcome
    logits = folds.rounded_logits(outcome.folder, [recipe.bits])[recipe.bits]
    return replace(outcome, logits=np.asarray(logits, dtype=np.float64)), outcome
