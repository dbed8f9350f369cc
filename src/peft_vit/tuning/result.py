"""What a tuning came to: everything that is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_vit.report.formatting import bounds_in_percent, fixed, joined, margin_in_points, megabytes, percent, points
from peft_vit.statistics import Interval
from peft_vit.studies.within_time import Outcome
from peft_vit.tasks import DecidingMetric
from peft_vit.tuning.finalists import Decision
from peft_vit.tuning.recipe import Recipe
from peft_vit.tuning.sizes import NO_TIME, SizeResult
from peft_vit.tuning.tune_request import TuneRequest

_NAMED = 4  # recipes that are named in a sentence


@dataclass(frozen=True)
class Choice:
    """The chosen model and what it was chosen by.

    Attributes:
        request: what was asked for.
        seen: what `data.inspect_images` saw of the images.
        images_file: which images are sealed, left out, or copies of one another.
        metric: what decides.
        sizes: every model and image size.
        decision: what was compared, what was taken, and the odds.
        folds: of the chosen recipe, in the form that was taken.
        final: of its last training, on the sealed images, in that form.
        before_rounding: the same run in float; where nothing was rounded after training, the same as `final`.
        more: what more labels and more minutes would buy, sentences.
        stages: name and seconds of each stage, of all calls together.
    """

    request: TuneRequest
    seen: Any
    images_file: Path
    metric: DecidingMetric
    sizes: tuple[SizeResult, ...]
    decision: Decision
    folds: tuple[Outcome, ...]
    final: Outcome
    before_rounding: Outcome
    more: tuple[str, ...]
    stages: tuple[tuple[str, float], ...]

    @property
    def recipe(self) -> Recipe:
        """Return what was taken."""
        return self.decision.taken.recipe


def answer(decision: Decision, metric: DecidingMetric, margin_share: float) -> str:
    """Return what was taken and its odds, in sentences."""
    taken, odds = decision.taken, decision.odds
    right = f"{metric.words} on new images" if metric.equal_classes else "right on new images"
    head = f"{taken.recipe.title}, {megabytes(taken.bytes)}: {percent(odds.score.estimate)} {right}"
    head += f" ({bounds_in_percent(odds.score)})."
    if taken.recipe == decision.reference:
        return f"{head} It is the best float model found."
    margin, gap = margin_in_points(margin_share), f"{fixed(100 * abs(odds.loss), 1)} points"
    than = f"The best float model found ({decision.reference.title}) is expected to be {gap}"
    chance = "below 1 %" if odds.chance_of_loss < 0.01 else f"{fixed(100 * odds.chance_of_loss, 0)} %"
    shown = f" Shown: it does not lose more than {margin}." if odds.shown else ""
    better = "better" if odds.loss > 0 else "worse"
    return f"{head} {than} {better}; the chance that it is more than {margin} better is {chance}.{shown}"


def what_more_buys(
    labels: Interval | None,
    steps: Interval | None,
    sizes: Sequence[SizeResult],
    untried: Sequence[Recipe],
    minutes: float,
) -> tuple[str, ...]:
    """Return what more labels and more minutes would buy, in sentences.

    Args:
        labels: what twice as many bring a regression, a share; None: unknown.
        steps: what twice as many bring the model that was taken; None: unknown.
        sizes: every model and image size.
        untried: recipes that there was no time for.
        minutes: of this call.
    """
    sentences = []
    if labels is None:
        sentences.append("What more labels would bring is unknown: there are too few to learn from half of them.")
    else:
        sentences.append(
            f"Twice as many labels: {_gain(labels)}, as the regression learns with half and with all of them."
        )
    if steps is not None:
        learns = f"as it learns with half and all of its steps, on {steps.n} images of folds"
        sentences.append(f"Twice the steps, in about twice the minutes: {_gain(steps)}, {learns}.")
    left = [f"{size.model} at {size.image_size} px" for size in sizes if size.why == NO_TIME]
    left += [f"{recipe.title} ({recipe.settings})" for recipe in untried]
    if not left:
        sentences.append("More minutes: nothing was left out for want of time.")
    else:
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        sentences.append(
            f"Not tried for lack of time: {joined(left[:_NAMED])}{more}. The same command with --minutes "
            f"{2 * minutes:g} tries some of it, and keeps what was done."
        )
    return tuple(sentences)


def _gain(expected: Interval) -> str:
    low, high = (points(end or 0.0) for end in (expected.low, expected.high))
    return f"about {points(expected.estimate)} points ({low} to {high})"
