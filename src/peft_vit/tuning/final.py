"""The last training: the chosen model and the reference on all images that are not sealed, which are read once, here.

Nothing validates any more, so the last step's model is taken. On the folds it was compared with the probe from which
training started: where that was better on average, the probe is trained. A run between the two would end where the
learning rate is high, and may be worse than both. Else the steps are those of the folds, as many times more as there
are more images to train on. The strength of the probe's penalty is the folds' median.
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
        gain = statistics.fmean(one.gain for one in folds[own])
        stays = own in rates and gain <= 0
        if stays:
            changed = f"on the folds training changed validation by {100 * gain:+.1f} points"
            context.state.tell(f"  {own}: {changed}, so it is the linear probe that it starts from")
        steps = backbone.schedule.steps
        training = fixed_training(context, None if stays else rates.get(own), steps, folds[own], memory)
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
    context: TuningContext, rate: float | None, steps: int, folds: Sequence[Outcome], memory: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the section `training` of a run in which nothing validates; rate None: of a probe; steps: on the folds."""
    strengths = [one.l2 for one in folds if one.l2 is not None]
    training = shared_training(context.batch_size, context.flips, metric=context.metric)
    training["probe_l2"] = statistics.median_low(strengths)
    if rate is None:
        return training
    return {
        **training,
        "learning_rate": rate,
        "head_start": "probe",
        "steps": max(_LEAST_STEPS, round(steps * context.images / context.train_images)),
        **memory,
    }
