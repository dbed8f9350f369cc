"""The last training: the chosen model and the reference on all images that are not sealed, which are read once, here.

Nothing validates any more, so what validation has chosen on the folds is fixed: the steps, as many times more as there
are more images to train on, and the strength of the probe's penalty, both at their medians. Where that is no step at
all, the probe is trained from which the runs on the folds began: nothing else was shown.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_vit.errors import UserError
from peft_vit.tuning.candidates import Design, shared_training
from peft_vit.tuning.context import TuningContext
from peft_vit.tuning.probes import BackboneChoice
from peft_vit.tuning.running import Outcome

_LEAST_STEPS = 12  # of ranks that move


def train_finally(
    context: TuningContext,
    backbone: BackboneChoice,
    designed: Callable[[int], Sequence[Design]],
    names: Sequence[str],
    rates: Mapping[str, float],
    folds: Mapping[str, Sequence[Outcome]],
    memory: Mapping[str, Any],
) -> dict[str, Path]:
    """Train some candidates on everything that is not sealed, and return their runs' folders by name.

    Args:
        context: of the tuning.
        backbone: model and image size.
        designed: everything that could be trained, in so many steps.
        names: of the candidates, one or two.
        rates: learning rate of each that takes steps, by name.
        folds: what came of each on the folds.
        memory: settings that keep within a limit of memory.

    Raises:
        UserError: if one of them failed.
    """
    experiments = {}
    for own in names:
        stays = own in rates and statistics.median(one.chosen_step for one in folds[own]) == 0
        if stays:
            context.state.tell(
                f"  {own}: on the folds no step was a gain, so it is the linear probe that it starts from"
            )
        training = fixed_training(context, None if stays else rates.get(own), folds[own], memory)
        design = next(one for one in designed(training.get("steps", _LEAST_STEPS)) if one.name == own)
        if stays:
            design = design.without_adapters()
        plain = json.dumps([training, design.sections], sort_keys=True)
        experiments[own] = design.experiment(training, f"{own}-{hashlib.sha256(plain.encode()).hexdigest()[:6]}")
    study = context.study(
        "final", backbone.model, backbone.image_size, [context.request.seed], list(experiments.values())
    )
    study["data"] = {name: value for name, value in study["data"].items() if name != "folds"} | {"validation_images": 0}
    study["measures"] = {"logits": True}  # the page tells how far probabilities on sealed images can be believed
    done = context.runner(study, context.state.unlimited)
    for name, one in experiments.items():
        if (one["name"], context.request.seed) not in done:
            problem = f"the last training of {name} failed, as is told above; the same command tries it again"
            raise UserError(problem, file=context.state.studies / "final" / one["name"])
    return {name: done[one["name"], context.request.seed].folder for name, one in experiments.items()}


def fixed_training(
    context: TuningContext, rate: float | None, folds: Sequence[Outcome], memory: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the section `training` of a run in which nothing validates; rate None: of a probe."""
    strengths = [one.l2 for one in folds if one.l2 is not None]
    training = shared_training(context.batch_size, context.flips, class_weights=context.class_weights)
    training["probe_l2"] = statistics.median_low(strengths)
    if rate is None:
        return training
    steps = statistics.median(one.chosen_step for one in folds) * context.images / context.train_images
    return {
        **training,
        "learning_rate": rate,
        "head_start": "probe",
        "steps": max(_LEAST_STEPS, round(steps)),
        **memory,
    }
