"""Linear probes over models and image sizes, on the folds: which backbone, at which size, and how images are flipped.

Features are cached, so a probe costs one pass over the images. The best mean over the folds' test images wins; a
smaller size within half the margin of it is taken in its place, for it leaves time to the race. Whether training images
are flipped is decided at the first size: digits are not to be, and cells of a panel may be upside down.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peft_vit.backbones import architecture_of, native_size, size_step_of
from peft_vit.config import Flips
from peft_vit.errors import UserError
from peft_vit.forecasting.estimate import Throughput
from peft_vit.forecasting.time_limit import Limit
from peft_vit.tuning.candidates import training_of
from peft_vit.tuning.context import FOLDS, TuningContext
from peft_vit.tuning.result import ProbeResult
from peft_vit.tuning.schedule import Schedule, features_s

_SIDES = (2, 3, 4, 5, 6, 8, 10, 12, 16)  # patches a side
_USUAL = 5  # fewer only where images are that small, or time is short
_LARGEST_PIXELS = 224
_FITS_S = 1.0  # of a probe on a fold
_WAYS: tuple[Flips, ...] = ("horizontal", "none", "both")  # of equal ones the first
_FLIPPED: Mapping[Flips, str] = {"horizontal": "flipped left-right", "none": "as they are", "both": "flipped both ways"}


@dataclass(frozen=True)
class BackboneChoice:
    """A model at a size, with what fits the time there."""

    model: str
    image_size: int
    schedule: Schedule


def sizes_of(context: TuningContext, model: str) -> list[int]:
    """Return the image sizes that are worth a thought, rising; what was asked for, if anything was.

    Raises:
        UserError: if the model does not take a size that was asked for.
    """
    if context.request.image_sizes:
        for size in context.request.image_sizes:
            context.shape(model, size)
        return sorted(context.request.image_sizes)
    architecture = architecture_of(context.backbones[model])
    patch, native = size_step_of(architecture), native_size(architecture)
    largest = max(min(_LARGEST_PIXELS, _side_of(context)), _SIDES[5] * patch)
    sizes = [side * patch for side in _SIDES if 14 <= side * patch <= min(largest, max(native, patch))]
    return sizes or [native]


def _side_of(context: TuningContext) -> int:
    """Return the median of the shorter sides in pixels, of the images outside the folder's own test split."""
    return int(statistics.median(context.seen.sides[context.seen.chosen_on, 0]))


def worth_trying(
    context: TuningContext, machine: Throughput, fitting: Mapping[str, Mapping[int, Schedule]]
) -> dict[str, dict[int, Schedule]]:
    """Return the sizes of each model that are probed: the smallest of those that fit the time, the middle, the largest.

    Larger images leave fewer steps to a run; whether they are worth it is what the probes say.

    Args:
        context: of the tuning.
        machine: what runs take.
        fitting: what fits the time, by model and size.
    """
    left_s = context.state.share_s("probes")
    taken: dict[str, dict[int, Schedule]] = {}
    for model, schedules in fitting.items():
        patch = context.shape(model, min(schedules)).size_step
        usual = sorted(size for size in schedules if size >= _USUAL * patch) or sorted(schedules)
        taken[model] = {}
        for size in dict.fromkeys((usual[0], usual[len(usual) // 2], usual[-1])):
            shape = context.shape(model, size)
            seconds = features_s(context, machine, shape) + machine.process_s + FOLDS * (_FITS_S + machine.start_s / 2)
            if seconds > left_s and any(taken.values()):
                break
            left_s -= seconds
            taken[model][size] = schedules[size]
    return {model: sizes for model, sizes in taken.items() if sizes}


def probe_all(
    context: TuningContext, machine: Throughput, tried: Mapping[str, Mapping[int, Schedule]], limit: Limit
) -> tuple[BackboneChoice, tuple[ProbeResult, ...], Flips]:
    """Fit the probes, and return the model and the size that are gone on with, the table, and how images are flipped.

    Raises:
        UserError: if time ends before there is a single one.
    """
    rows: list[ProbeResult] = []
    choices: list[BackboneChoice] = []
    flips: Flips | None = None
    for model, sizes in tried.items():
        for size, schedule in sorted(sizes.items()):
            ways: tuple[Flips, ...] = _WAYS if flips is None else (flips,)
            study = context.study(
                study_name(model, size), model, size, range(FOLDS), [_probe(context, way) for way in ways]
            )
            done = context.runner(study, limit if choices else context.state.limit)  # without one nothing goes on
            scores = {way: [one.test for (name, _), one in done.items() if name == f"linear_{way}"] for way in ways}
            means = {way: statistics.fmean(some) for way, some in scores.items() if len(some) == FOLDS}
            image_s = machine.image_s(context.shape(model, size))
            if not means:
                rows.append(ProbeResult(model, size, None, image_s, chosen=False, why="no time for it"))
                continue
            if flips is None:
                best: Flips = max(means, key=lambda way: (means[way], -_WAYS.index(way)))
                context.state.tell(
                    f"  training images {_FLIPPED[best]}: {_compared(means)} over {FOLDS} folds at {size} px"
                )
                flips = best
            rows.append(ProbeResult(model, size, means[flips], image_s, chosen=False, why="", flips=flips))
            choices.append(BackboneChoice(model, size, schedule))
            context.state.tell(
                f"  {model} at {size} px: {means[flips]:.1%} over {FOLDS} folds, {schedule.steps} steps fit a run"
            )
    if flips is None:
        raise UserError(
            "ended before a single linear probe; give more, and the same command goes on", field="--minutes"
        )
    return *_chosen(context, rows, choices), flips


def _probe(context: TuningContext, flips: Flips) -> dict[str, Any]:
    training = training_of(
        None,
        learning_rate=None,
        steps=0,
        validate_every=1,
        batch_size=context.batch_size,
        metric=context.metric,
        flips=flips,
        memory={},
    )
    return {"name": f"linear_{flips}", "method": "linear", "training": training}


def _compared(means: Mapping[Flips, float]) -> str:
    return ", ".join(f"{_FLIPPED[way]} {mean:.1%}" for way, mean in means.items())


def _chosen(
    context: TuningContext, rows: list[ProbeResult], choices: list[BackboneChoice]
) -> tuple[BackboneChoice, tuple[ProbeResult, ...]]:
    scores = {(one.model, one.image_size): one.score for one in rows if one.score is not None}
    best = max(scores, key=lambda at: (scores[at], -at[1]))
    close = [at for at in scores if at[0] == best[0] and scores[best] - scores[at] <= context.request.margin_share / 2]
    taken = min(close, key=lambda at: at[1])
    why = "best over the folds" if taken == best else f"within half the margin of {best[1]} px, and faster"
    table = tuple(replace(one, chosen=True, why=why) if (one.model, one.image_size) == taken else one for one in rows)
    return next(one for one in choices if (one.model, one.image_size) == taken), table


def study_name(model: str, image_size: int) -> str:
    """Return the name of a probe's study."""
    plain = re.sub(r"[^a-z0-9_]+", "-", model.lower()).strip("-_")
    if plain != model or len(plain) > 40:
        plain = f"{plain[:40]}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"
    return f"probe-{plain}-{image_size}"
