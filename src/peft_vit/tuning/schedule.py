"""What fits the time: which kinds of methods are tried, how many steps a run takes, and how many runs race.

A run on a fold starts, takes its steps, and passes its validation images at each validation and its test images once.
Learning rates take a run of half the steps at each rate, then two whole ones, for each kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peft_vit.backbones import BackboneShape
from peft_vit.errors import UserError
from peft_vit.forecasting.estimate import Throughput
from peft_vit.forecasting.time_limit import fit, validate_every
from peft_vit.training import FLIP_AXES
from peft_vit.tuning.candidates import KINDS, Kind
from peft_vit.tuning.context import FOLDS, TuningContext
from peft_vit.tuning.rates import RATES, WHOLE_RUNS

LEAST_STEPS, _MOST_STEPS = 24, 200
_FORMS, _COMPARED = 3, 128  # of the model that are written, and images on which each is compared
_TIMINGS, _CALLS = 3, 23  # processes of each form that is timed, and calls in each
# Kinds, runs that race, and the steps that each run has at least, from ample time to the least: more steps gain more
# than more kinds of methods do.
_LEVELS = ((5, 20, 120), (3, 12, 96), (2, 10, 72), (2, 8, 48), (2, 4, LEAST_STEPS))


@dataclass(frozen=True)
class Schedule:
    """What runs of a size take.

    Attributes:
        kinds: of methods whose rates are looked for.
        races: runs with adapters that fit the race, about.
        steps: of a run, at most.
        validate_every: steps.
        run_s: seconds of a run.
        ending_s: seconds of the last training and of the output.
    """

    kinds: tuple[Kind, ...]
    races: int
    steps: int
    validate_every: int
    run_s: float
    ending_s: float = 0.0


def step_s(context: TuningContext, machine: Throughput, shape: BackboneShape) -> float:
    """Return the seconds of a step with adapters."""
    return machine.step_s(shape, "lora", context.batch_size)


def run_s(context: TuningContext, machine: Throughput, shape: BackboneShape, steps: int) -> float:
    """Return the seconds of a run on a fold."""
    validations = 1 + -(-steps // validate_every(context.validation_images, context.batch_size))
    passed = validations * context.validation_images + context.test_images
    return machine.start_s + steps * step_s(context, machine, shape) + passed * machine.image_s(shape)


def features_s(context: TuningContext, machine: Throughput, shape: BackboneShape) -> float:
    """Return the seconds of the features of all images as training shows them, which runs of one backbone share."""
    return len(FLIP_AXES[context.flips]) * context.images * machine.image_s(shape)


def ending_s(context: TuningContext, machine: Throughput, shape: BackboneShape, steps: int) -> float:
    """Return the seconds of the last training, of two models, and of the output, as far as they can be foreseen.

    The output writes the model in some forms, compares each with the run's model, and times them beside float32; where
    none is as fast as was asked for, activations in 8 bits are measured on folds.
    """
    image_s = machine.image_s(shape)
    grown = steps * context.images / context.train_images
    trained = machine.start_s + grown * step_s(context, machine, shape) + context.sealed_images * image_s
    forms, folds = (_FORMS, 0) if context.request.max_latency is None else (_FORMS + 1, FOLDS)
    written = 2 * machine.start_s + 2 * min(context.images, _COMPARED) * image_s
    measured = 2 * machine.start_s + 2 * context.test_images * image_s
    timed = _TIMINGS * (forms + 1) * (machine.process_s + _CALLS * image_s)
    ended = machine.process_s + features_s(context, machine, shape) + 2 * trained
    return ended + forms * written + folds * measured + timed


def _beyond_s(context: TuningContext, ending: float) -> float:
    """Return the seconds that the end takes beyond its share, and the look and the measuring have taken beyond theirs.

    Rates and race have so much less.
    """
    limit, share_s = context.state.limit, context.state.share_s
    spent = 0.0 if context.state.begun else limit.clock() - limit.started
    return max(0.0, ending - share_s("final", "output")) + max(0.0, spent - share_s("look", "machine"))


def schedule(
    context: TuningContext, machine: Throughput, shape: BackboneShape, allowed: tuple[Kind, ...]
) -> Schedule | None:
    """Return what fits the time at an image size; None: not even the least does.

    Args:
        context: of the tuning.
        machine: what runs take.
        shape: of the backbone at that size.
        allowed: kinds whose files keep within the limit, and float LoRA.
    """
    there = context.state.share_s("rates", "race")
    for kinds, races, least in _LEVELS:
        steps = _steps(context, machine, shape, there, min(kinds, len(allowed)), races)
        if steps >= least:
            taken = tuple(kind for kind in KINDS if kind in allowed)[:kinds]
            own_s, end_s = (of(context, machine, shape, steps) for of in (run_s, ending_s))
            return Schedule(
                taken, races, steps, validate_every(context.validation_images, context.batch_size), own_s, end_s
            )
    return None


def _seconds(
    context: TuningContext, machine: Throughput, shape: BackboneShape, steps: int, kinds: int, races: int
) -> float:
    """Return the seconds of learning rates and race together."""
    whole = (kinds * WHOLE_RUNS + races) * run_s(context, machine, shape, steps)
    half = kinds * len(RATES) * run_s(context, machine, shape, steps // 2)
    return whole + half + kinds * features_s(context, machine, shape) + 2 * machine.process_s


def _steps(
    context: TuningContext, machine: Throughput, shape: BackboneShape, there_s: float, kinds: int, races: int
) -> int:
    """Return the most steps that fit; 0: the least do not."""

    def seconds(steps: int) -> float:
        beyond_s = _beyond_s(context, ending_s(context, machine, shape, steps))
        return _seconds(context, machine, shape, steps, kinds, races) + beyond_s

    return fit(range(_MOST_STEPS, LEAST_STEPS - 1, -8), seconds, there_s) or 0


def refuse_little_time(context: TuningContext, machine: Throughput, shapes: Sequence[BackboneShape]) -> UserError:
    """Return what to say if there is no time for a single comparison, with the least that would do."""
    race, end = (context.state.share_s(*names) for names in (("rates", "race"), ("final", "output")))
    whole = 60 * context.request.minutes

    def least_s(shape: BackboneShape) -> float:
        raced = _seconds(context, machine, shape, LEAST_STEPS, *_LEVELS[-1][:2])
        ended = ending_s(context, machine, shape, LEAST_STEPS)
        return max(raced * whole / race, (raced + ended) * whole / (race + end))

    least = max(math.ceil(min(map(least_s, shapes)) / 60), math.floor(context.request.minutes) + 1)
    problem = f"{context.request.minutes:g} are too few for a single comparison on this machine"
    return UserError(f"{problem}, even of the smallest images; give at least {least}", field="--minutes")
