"""`peft-vit tune`: from images and limits to the smallest model that is shown to be good enough, see `stages`.

What was done is kept by the name of its recipe. A later call finds it, and tries with its own minutes more sizes,
rates, steps and candidates. Only the test images, the folds, flips and how products are computed stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from peft_vit.base.extras import require_extra
from peft_vit.base.statistics import Interval, TemperaturePrior
from peft_vit.core.config import named_as_typed
from peft_vit.core.records import Calibrated
from peft_vit.core.records import Decision as Meaning
from peft_vit.core.tasks import DecidingMetric, Scores
from peft_vit.deploy.page.formatting import bounds_of, fixed, joined, megabytes, points, scaled, value_of
from peft_vit.fit import stages
from peft_vit.fit.decide import ModelDecision, decide_model, gain_of_steps, temperature_before
from peft_vit.fit.events import Emit, print_event
from peft_vit.fit.fit import Environment, Fit
from peft_vit.fit.intake import LabelledSet
from peft_vit.fit.outcomes import EveryRunFailedError, Outcome, meaning_on
from peft_vit.fit.recipe import Recipe
from peft_vit.fit.request import TuneRequest
from peft_vit.fit.stages import NO_TIME, SizeResult
from peft_vit.runs.records.progress import study_lock
from peft_vit.runs.records.storage import tuned_model


def tune(request: TuneRequest, emit: Emit = print_event, environment: Environment | None = None) -> Tuning | None:
    """Find the best model in the given minutes, within limits, and how sure that is.

    Once the first training is done, there is a model in the output, and what is found later only replaces it.

    Returns:
        What was chosen, and by what; None: the same call came to its end before, and its model lies in the output.

    Raises:
        UserError: for bad input, before anything is trained; see `stages`, `check_output` and `Fit.enter`. Also if
            another command works on the same output.
        KeyboardInterrupt: after Ctrl-C; the same request continues.
    """
    require_extra("tune", "tune")
    from peft_vit.fit.output import check_output

    check_output(request)
    with named_as_typed(TuneRequest), study_lock(request.output):
        fit = Fit(request, emit, environment or Environment())
        fit.enter(request.output)
        with fit.opened:
            return _carry_out(fit, request)


def _carry_out(fit: Fit, request: TuneRequest) -> Tuning | None:
    was_there = (fit.folder / stages.IMAGES_FILE).exists()
    with fit.stage("look"):
        stages.look(fit)
        stages.keep_images(fit)
    if fit.file.finished >= request.minutes and (model := tuned_model(fit.folder)) is not None:
        fit.tell(f"This call was done before, its model is {model}. With more --minutes it tries more.")
        return None
    try:
        allowed = stages.allowed_sizes(fit)
        fit.begun = True
    finally:
        if not (fit.begun or was_there):  # refused: another limit can be asked for
            fit.images.file.unlink(missing_ok=True)
    return fitted(fit, request, allowed)


def fitted(fit: Fit, request: TuneRequest, allowed: Mapping[str, Sequence[int]]) -> Tuning:
    """Do what is not done of a tuning of images that were looked at, at the image sizes that are allowed by model."""
    fit.load_earlier()
    with fit.stage("sizes"):
        sizes = stages.with_lengths(fit, stages.try_sizes(fit, allowed))
        first, longer = stages.choose_first(fit, sizes)
    probe = stages.best_linear_probe(fit, sizes).probe
    first, longer, final = _first_model(fit, first, longer, probe)
    form = stages.within_limits(fit, first)
    if fit.decisions.delivered is None:
        usual = temperature_before(fit, form, form, longer)
        _write(fit, Tuning(request, fit.images, tuple(sizes), form, *final, longer=longer, usual=usual))
        fit.decisions.delivered = form, longer
    with fit.stage("folds"):
        limit = fit.until(fit.costs.written_s(fit.costs.longest_form(first)) - fit.over_s)
        known = stages.know_by_folds(fit, first, probe, limit)
        if form.when == "after" and form.bits is not None:
            fit.quantize(known, [form.bits], limit)
    recipe, decision, on_folds = form, None, replace(form, steps=known.steps)
    if fit.frame.seeds(first) and fit.frame.seeds(probe):
        with fit.stage("search"):
            labels = stages.gain_of_labels(fit, probe)
            untried = stages.look_further(fit, sizes, first, probe)
            decision = decide_model(fit)
            recipe = on_folds = decision.taken.recipe
            fit.tell(f"  chosen of {len(decision.candidates)} models: {recipe.title}")
        longer, steps = stages.times_longer(fit, recipe), gain_of_steps(fit.frame, recipe)
        with fit.stage("final"):
            final = stages.train_last(fit, recipe, longer)
        expected = fit.frame.scores.best - decision.odds.score.estimate
        unit = fit.frame.scores.unit
        more = what_more_buys(labels, expected, steps, longer, sizes, untried, request.minutes, unit)
    else:
        again = f"The same command with --minutes {2 * request.minutes:g} continues"
        more = (f"There was no time to compare it with others. {again}.",)
    folds = tuple(outcome for _, outcome in sorted(fit.frame.rows.get(on_folds, {}).items()))
    usual = temperature_before(fit, recipe, on_folds, longer)
    done = Tuning(request, fit.images, tuple(sizes), recipe, *final, decision, folds, longer, more, usual=usual)
    for sentence in more:
        fit.tell(f"  {sentence}")
    if decision is not None or folds:  # else it is written already
        _write(fit, done)
        fit.decisions.delivered = recipe, longer
    fit.file.finished = request.minutes
    fit.save()
    return done


def _first_model(
    fit: Fit, first: Recipe, longer: float, probe: Recipe
) -> tuple[Recipe, float, tuple[Outcome, Outcome]]:
    """Train the first model, or a linear probe if that fails; return what was trained, see `train_last`."""
    with fit.stage("first"):
        try:
            return first, longer, stages.train_last(fit, stages.within_limits(fit, first), longer)
        except EveryRunFailedError as error:
            if first.is_probe:
                raise
            fit.tell(f"  {first.title} failed: {error.message}")
            fit.failed.add(first)
            return probe, 1.0, stages.train_last(fit, stages.within_limits(fit, probe), 1.0)


def _write(fit: Fit, tuning: Tuning) -> None:
    from peft_vit.fit.output import write_output

    with fit.stage("output"):
        tuning = replace(tuning, stages=tuple(fit.file.seconds.items()))
        (fit.environment.write_output or write_output)(tuning, fit.folder, fit.tell)


_NAMED = 4  # recipes that are named in a sentence


@dataclass(frozen=True)
class Tuning:
    """A model that a tuning writes, and what it was chosen by."""

    request: TuneRequest  # what was asked for
    images: LabelledSet  # that it was fitted to
    sizes: tuple[SizeResult, ...]  # every model and image size
    recipe: Recipe  # what was taken
    final: Outcome  # of its last training, on the sealed images, in that form
    before_rounding: Outcome  # the same run in float; where nothing was rounded after training, the same as `final`
    decision: ModelDecision | None = None  # what was compared, and the odds; None: nothing was yet
    folds: tuple[Outcome, ...] = ()  # of the chosen recipe, in the form that was taken
    longer: float = 1.0  # times the steps that follow from the folds, of the last training
    more: tuple[str, ...] = ()  # what more labels and more minutes would buy, sentences
    stages: tuple[tuple[str, float], ...] = ()  # name and seconds of each stage, of all calls together
    usual: TemperaturePrior | None = None  # temperature, before folds' images

    @property
    def metric(self) -> DecidingMetric:
        """Return what decides."""
        return self.images.metric

    @cached_property
    def scores(self) -> Scores:
        """Return by what models were compared."""
        return self.images.scores

    @cached_property
    def meaning(self) -> Calibrated | Meaning | None:
        """Return what the model's outputs mean, from what its recipe's runs on folds said of their test images."""
        return meaning_on(self.folds, self.final.learned, self.usual)

    @property
    def score(self) -> Interval:
        """Return what decides, on the test images."""
        return self.metric.interval(self.final.labels, *self.final.predictions(self.meaning))

    @property
    def changed_by_rounding(self) -> Interval | None:
        """Return what rounding changed of that; None: nothing was rounded after training."""
        (before, least), (after, _) = (own.predictions(self.meaning) for own in (self.before_rounding, self.final))
        rounded = self.before_rounding is not self.final
        return self.metric.gain(self.final.labels, before, after, least, least) if rounded else None


def answer(choice: Tuning, written: int | None = None) -> str:
    """Return what was taken, what it has on the test images, and its odds: a line; `written` is the file's bytes."""
    decision, metric, score = choice.decision, choice.metric, choice.score
    right, value = "right" if metric.name == "accuracy" else metric.words, value_of(metric, score.estimate)
    by = f"{bounds_of(metric, score)}, by {score.n:,} test images"
    size = written or (0 if decision is None else decision.taken.bytes)
    head = f"{choice.recipe.title}{f', {megabytes(size)}' if size else ''}: {value} {right} on new images ({by})."
    if decision is None:
        return f"{head} It is the first model; nothing else was compared with it."
    odds = decision.odds
    if choice.recipe == decision.reference:
        return f"{head} It is the best float model found."
    scores, margin = choice.scores, choice.scores.hundredths(choice.request.margin_share)
    amount, better = fixed(100 * abs(odds.loss), 1), "better" if odds.loss > 0 else "worse"
    gap = f"{amount} {scores.unit} {better}" if float(amount) else "as good"
    than = f"The best float model found ({decision.reference.title}) is expected to be {gap}"
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
        had = f" The last training has had {longer:.2g} times the steps of the folds." if longer != 1 else ""
        sentences.append(f"Twice the steps of the folds: {_gain(steps, unit)}, {learns}.{had}")
    left = ["all steps of the last training"] if longer < 1 else []
    left += [f"{size.model} at {size.image_size} px" for size in sizes if size.why == NO_TIME]
    left += [f"{recipe.title} ({recipe.settings})" for recipe in untried]
    if left:
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        sentences.append(
            f"Not tried for lack of time: {joined(left[:_NAMED])}{more}. The same command with --minutes "
            f"{2 * minutes:g} tries some of it, and keeps what was done."
        )
    return tuple(sentences)


def _gain(expected: Interval, unit: str) -> str:
    low, high = (points(end or 0.0) for end in (expected.low, expected.high))
    return f"about {points(expected.estimate)} {unit} ({low} to {high})"
