"""What a tuning came to: everything that is shown of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from peft_vit.base.statistics import Interval
from peft_vit.core.records import Calibrated
from peft_vit.core.records import Decision as Meaning
from peft_vit.core.tasks import DecidingMetric, Scores
from peft_vit.deploy.page.formatting import bounds_of, fixed, joined, megabytes, points, scaled, value_of
from peft_vit.fit.finalists import Decision
from peft_vit.fit.outcomes import Outcome, meaning_on
from peft_vit.fit.recipe import Recipe
from peft_vit.fit.sizes import NO_TIME, SizeResult
from peft_vit.fit.tune_request import TuneRequest

_NAMED = 4  # recipes that are named in a sentence


@dataclass(frozen=True)
class Choice:
    """The chosen model and what it was chosen by."""

    request: TuneRequest  # what was asked for
    seen: Any  # what `data.inspect_images` saw of the images
    images_file: Path  # which images are sealed, left out, or copies of one another
    metric: DecidingMetric  # what decides
    sizes: tuple[SizeResult, ...]  # every model and image size
    decision: Decision  # what was compared, what was taken, and the odds
    folds: tuple[Outcome, ...]  # of the chosen recipe, in the form that was taken
    final: Outcome  # of its last training, on the sealed images, in that form
    before_rounding: Outcome  # the same run in float; where nothing was rounded after training, the same as `final`
    longer: float  # times the steps that follow from the folds, of the last training
    more: tuple[str, ...]  # what more labels and more minutes would buy, sentences
    stages: tuple[tuple[str, float], ...]  # name and seconds of each stage, of all calls together
    scores: Scores = field(default_factory=Scores)  # by which models were compared

    @property
    def recipe(self) -> Recipe:
        """Return what was taken."""
        return self.decision.taken.recipe

    @cached_property
    def meaning(self) -> Calibrated | Meaning:
        """Return what the model's outputs mean, from what its recipe's runs on folds said of their test images."""
        return meaning_on(self.folds, self.final.learned)

    @property
    def score(self) -> Interval:
        """Return what decides, on the test images."""
        return self.metric.interval(self.final.labels, *self.final.told(self.meaning))

    @property
    def changed_by_rounding(self) -> Interval | None:
        """Return what rounding changed of that; None: nothing was rounded after training."""
        (before, least), (after, _) = (own.told(self.meaning) for own in (self.before_rounding, self.final))
        rounded = self.before_rounding is not self.final
        return self.metric.gain(self.final.labels, before, after, least, least) if rounded else None


def answer(choice: Choice, written: int | None = None) -> str:
    """Return what was taken, what it has on the test images, and its odds: a line; `written` is the file's bytes."""
    taken, odds, metric, score = choice.decision.taken, choice.decision.odds, choice.metric, choice.score
    right, value = "right" if metric.name == "accuracy" else metric.words, value_of(metric, score.estimate)
    by = f"{bounds_of(metric, score)}, by {score.n:,} test images"
    head = f"{taken.recipe.title}, {megabytes(written or taken.bytes)}: {value} {right} on new images ({by})."
    if taken.recipe == choice.decision.reference:
        return f"{head} It is the best float model found."
    scores, margin = choice.scores, choice.scores.hundredths(choice.request.margin_share)
    amount, better = fixed(100 * abs(odds.loss), 1), "better" if odds.loss > 0 else "worse"
    gap = f"{amount} {scores.unit} {better}" if float(amount) else "as good"
    than = f"The best float model found ({choice.decision.reference.title}) is expected to be {gap}"
    chance = "below 1 %" if odds.chance_of_loss < 0.01 else f"{fixed(100 * odds.chance_of_loss, 0)} %"
    shown = f" Shown: it does not lose more than {margin}." if odds.shown else ""
    return f"{head} {than}; the chance that it is more than {margin} better is {chance}.{shown}"


def what_more_buys(
    labels: Interval | None,
    error: float,
    steps: Interval | None,
    longer: float,
    sizes: Sequence[SizeResult],
    untried: Sequence[Recipe],
    minutes: float,
    unit: str = "points",
) -> tuple[str, ...]:
    """Return what more labels and more minutes would bring, in sentences.

    Args:
        labels: by what share of its error twice as many lower the regression's; None: unknown.
        error: that is expected of what was taken, a share.
        steps: by how much twice as many lower that, a share; None: unknown.
        longer: times as many steps the last training has had.
        sizes, untried: sizes, and recipes that there was no time for.
        minutes: of this call.
        unit: of a hundredth of a share, see `Scores`.
    """
    sentences = []
    if labels is None:
        sentences.append("What more labels would bring is unknown: there are too few to learn from half of them.")
    else:
        learns = "if errors fall as the regression's do with half and with all of them"
        sentences.append(f"Twice as many labels: {_gain(scaled(labels, error), unit)}, {learns}.")
    if steps is not None:
        learns = f"as it learns with half and all of its steps, on {steps.n} images of folds"
        had = f" The last training has had {longer:g} times the steps of the folds." if longer != 1 else ""
        sentences.append(f"Twice the steps of the folds: {_gain(steps, unit)}, {learns}.{had}")
    left = ["all steps of the last training"] if longer < 1 else []
    left += [f"{size.model} at {size.image_size} px" for size in sizes if size.why == NO_TIME]
    left += [f"{recipe.title} ({recipe.settings})" for recipe in untried]
    if not left:
        sentences.append("Nothing was left out for lack of time.")
    else:
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        sentences.append(
            f"Not tried for lack of time: {joined(left[:_NAMED])}{more}. The same command with --minutes "
            f"{2 * minutes:g} tries some of it, and keeps what was done."
        )
    return tuple(sentences)


def _gain(expected: Interval, unit: str) -> str:
    low, high = (points(end or 0.0) for end in (expected.low, expected.high))
    return f"about {points(expected.estimate)} {unit} ({low} to {high})"
