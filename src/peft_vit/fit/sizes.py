"""Regressions on frozen features over image sizes: where training is worth its time, and what it has to beat.

Sizes rise by about the square root of 2 while they fit their share of the time. How training images are flipped is
decided at the first one: digits are not to be flipped, and cells of a panel may be upside down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft_vit.base.errors import UserError, is_out_of_memory
from peft_vit.base.statistics import Interval
from peft_vit.base.statistics.more_labels import gain_of_twice
from peft_vit.core.backbones import architecture_of
from peft_vit.core.config import Flips
from peft_vit.core.tasks import expected_gain
from peft_vit.fit.context import TuningContext
from peft_vit.fit.costs import LONGEST, Costs
from peft_vit.fit.image_sizes import Regression, on_new_images, sizes_to_try
from peft_vit.fit.recipe import Recipe, shared_training
from peft_vit.runs.costs.time_limit import FOLDS, Limit, Pace

NO_TIME = "no time for it"
_WAYS: tuple[Flips, ...] = ("horizontal", "none", "both")  # of equal ones the first
_FLIPPED: Mapping[Flips, str] = {"horizontal": "flipped left-right", "none": "as they are", "both": "flipped both ways"}
Regress = Callable[[Mapping[str, Any], Path, bool], Regression]


@dataclass(frozen=True)
class SizeResult:
    """A model at an image size."""

    model: str
    image_size: int
    score: float | None  # of the regression; None: it was not tried, `why` says why
    steps: int  # of LoRA that fit a run on a fold, at most
    why: str = ""  # it was not tried; empty: it was
    expected: float = 0.0  # of the score, on other images, see `on_new_images`
    longer: float = LONGEST  # times the steps, of the last training that fits

    @property
    def promise(self) -> float:
        """Return the sum of what a regression may have and what training may add in the steps of the last one."""
        return self.expected + expected_gain(round(self.longer * self.steps))

    @property
    def probe(self) -> Recipe:
        """Return the regression as a recipe."""
        return Recipe(self.model, self.image_size)


def sizes_of(context: TuningContext, model: str) -> list[int]:
    """Return the image sizes that are worth a thought, rising; what was asked for, if anything was.

    Raises:
        UserError: if the model does not take a size that was asked for.
    """
    for size in context.request.image_sizes:
        context.shape(model, size)
    return sorted(context.request.image_sizes) or sizes_to_try(architecture_of(context.backbones[model]))


def try_sizes(costs: Costs, sizes: Mapping[str, Sequence[int]], regress: Regress, limit: Limit) -> list[SizeResult]:
    """Fit a regression at every size that fits the time, the smallest first; what earlier calls have tried is known.

    There is one in any case.

    Raises:
        UserError: see `regress`.
    """
    context, pace = costs.context, Pace()
    state, results, too_large = context.state, list[SizeResult](), set[str]()
    every = [Recipe(model, size) for model, own in sizes.items() for size in own]
    for probe in sorted(every, key=costs.image_s):
        name, clock, why = f"size {probe.place}", state.clock, ""
        if name not in state.file.decided:
            tried = [result for result in results if result.score is not None]
            expected_s = costs.regression_s(probe)
            if tried and max(1.0, pace.factor) * expected_s > limit.left_s:
                why = NO_TIME
            elif probe.model in too_large:
                why = "a smaller one took more memory than is free"
            else:
                began, flips_known = clock(), "flips" in state.file.decided
                try:
                    state.once(name, partial(_value, costs, probe, regress))
                except Exception as error:
                    if not is_out_of_memory(error) or not tried:
                        raise
                    too_large.add(probe.model)
                    why = "it needs more memory than is free"
                if flips_known:  # else it was fitted three times
                    pace.add(clock() - began, expected_s)
        score = state.file.decided.get(name)
        steps, longer = costs.most_steps(probe.model, probe.image_size)
        results.append(SizeResult(probe.model, probe.image_size, score, steps, why, longer=longer))
        if score is not None:
            fits = f"{steps} steps fit a run" if steps else "no time to train"
            state.tell(f"  {probe.model} at {probe.image_size} px: {context.scores.text(score)}, {fits}")
    compared = context.alike * costs.compared_images(min(every, key=costs.image_s))
    for model in sizes:
        scores = {own.image_size: own.score for own in results if own.model == model and own.score is not None}
        told = on_new_images(scores, compared, context.seen.shorter_side) if scores else {}
        results = [
            replace(own, expected=told[own.image_size]) if own.model == model and own.image_size in told else own
            for own in results
        ]
    return results


def _value(costs: Costs, probe: Recipe, regress: Regress) -> float:
    context, studies, deviation = costs.context, costs.context.state.studies, costs.context.scores.deviation
    if "flips" not in context.state.file.decided:
        scores = {way: regress(_study(costs, probe, way), studies, False).value / deviation for way in _WAYS}
        best = max(_WAYS, key=lambda way: (scores[way], -_WAYS.index(way)))
        context.state.once("flips", lambda: best)
        compared = ", ".join(f"{_FLIPPED[way]} {context.scores.text(score)}" for way, score in scores.items())
        context.state.tell(f"  training images {_FLIPPED[best]}: {compared} at {probe.image_size} px")
        return scores[best]
    return regress(_study(costs, probe, context.flips), studies, False).value / deviation


def _study(costs: Costs, probe: Recipe, flips: Flips) -> dict[str, Any]:
    context, compared = costs.context, costs.compared_images(probe)
    training = shared_training(context.batch_size, flips, context.metric)
    experiment = {"name": "linear", "method": "linear", "training": training}
    some = {"train_images": compared} if compared < context.images else {}
    seed = context.request.seed
    return context.study("sizes", probe.model, probe.image_size, [seed], [experiment], folds=None, **some)


def gain_of_labels(costs: Costs, probe: Recipe, regress: Regress) -> Interval | None:
    """Return by what share of its error twice as many labels lower a regression's; None: there are too few to tell."""

    def forecast() -> dict[str, Any] | None:
        found = regress(_study(costs, probe, costs.context.flips), costs.context.state.studies, True)
        if found.brought_by_half is None:
            return None
        scores = costs.context.scores
        of_half, of_all = (scores.best - own / scores.deviation for own in (found.brought_by_half, found.brought))
        weights = scores.image_weights(found.labels)
        return asdict(gain_of_twice(of_half, of_all, weights, share=1 - 1 / FOLDS, error=1.0))

    try:
        kept = costs.context.state.once(f"more labels {probe.place}", forecast)
    except UserError:  # a class has one image in a half
        return None
    return None if kept is None else Interval(**kept)
