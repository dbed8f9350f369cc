"""From images and limits to a model, stage by stage; each is reported, and each can be killed.

- look, machine (5 % of the minutes): a fifth of the images, or the folder's own test split, is set aside for the test;
  the others make five folds. How fast this machine is, is measured: it says how many steps a run has (`costs`).
- sizes (15 %): regressions on frozen features; the best is a candidate, and LoRA trains at two, or each model's best.
- search, folds: LoRA over sizes, rates and steps; the best also rounded after training, and with half of its steps.
- the decision: the smallest model within the limits that loses little, see `statistics.odds.choose_model`.
- final, output: that recipe on all that is not for the test, its fastest form, a page. Test images are read once.

What was done is kept by the name of its recipe. A later call finds it, and tries with its own minutes more sizes,
rates, steps and candidates. Only the test images, the folds, flips and how products are computed stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from peft_vit.base.errors import UserError
from peft_vit.base.extras import require_extra
from peft_vit.base.statistics import Interval, proportion_interval
from peft_vit.base.statistics.odds import resolvable
from peft_vit.core.config import named_as_typed
from peft_vit.core.tasks import DecidingMetric
from peft_vit.deploy.measures.timing import time_random
from peft_vit.deploy.page.formatting import bounds_in_percent, megabytes
from peft_vit.deploy.post_training import logits_by_type
from peft_vit.fit.context import IMAGES_FILE, MakeRunner, TuningContext, context_of
from peft_vit.fit.costs import LEAST_STEPS, LONGEST, Costs, MeasureThroughput, throughput_of
from peft_vit.fit.final import times_longer, train_finally
from peft_vit.fit.finalists import NO_MODEL, Decision, compare, decide, low_bits
from peft_vit.fit.folds import Folds, RoundRun
from peft_vit.fit.image_sizes import regress
from peft_vit.fit.limits import MEMORY_LIMIT, TimeExport, within_bytes, within_latency
from peft_vit.fit.outcomes import Runner, StudyRunner
from peft_vit.fit.output import check_output, write_output
from peft_vit.fit.recipe import ROUNDED, Recipe, lora
from peft_vit.fit.result import Choice, what_more_buys
from peft_vit.fit.search import search
from peft_vit.fit.sizes import Regress, SizeResult, gain_of_labels, sizes_of, try_sizes
from peft_vit.fit.state import State
from peft_vit.fit.tune_request import TuneRequest
from peft_vit.runs.costs.time_limit import FEWEST_FOLDS
from peft_vit.runs.records.progress import study_lock
from peft_vit.runs.scheduling.profiling import measure_throughput

_SIZES_TRAINED = 2


def study_runner(state: State, metric: DecidingMetric) -> Runner:
    """Return what does runs as studies below the output."""
    return StudyRunner(state.studies, metric, state.request.executor, state.tell)


@dataclass(frozen=True)
class Environment:
    """How the outside world is asked; simulations have another one."""

    make_runner: MakeRunner = study_runner  # does runs
    measure: MeasureThroughput = measure_throughput  # see `measure_throughput`
    time_export: TimeExport = time_random  # see `time_random`
    regress: Regress = regress  # see `image_sizes.regress`
    round_run: RoundRun = logits_by_type  # see `runs.post_training.logits_by_type`
    write_output: Callable[[Choice, Path, Callable[[str], None]], Any] = write_output  # writes model, card and report
    clock: Callable[[], float] = time.monotonic  # in seconds


say = partial(print, flush=True)  # a line at once


def tune(request: TuneRequest, tell: Callable[[str], None] = say, environment: Environment | None = None) -> Choice:
    """Find the best model in the given minutes, within limits, and how sure that is.

    Raises:
        UserError: for bad input, before anything is trained; see `inspect_images`, `limits`, `check_output` and
            `State.opened`. Also if another command works on the same output.
        KeyboardInterrupt: after Ctrl-C; the same request continues.
    """
    require_extra("tune", "tune")
    check_output(request)
    with named_as_typed(TuneRequest), study_lock(request.output):
        return _tune(request, tell, environment or Environment())


def _tune(request: TuneRequest, tell: Callable[[str], None], environment: Environment) -> Choice:
    state = State.opened(request, tell, environment.clock)
    was_there = (request.output / IMAGES_FILE).exists()
    with state.stage("look"):
        context = context_of(state, environment.make_runner)
    try:
        with state.stage("machine"):
            costs, allowed = _look_at_machine(context, environment)
            state.begun = True
            state.save()
            _tell_forecast(costs, allowed)
    finally:
        if not (state.begun or was_there):  # refused: another limit can be asked for
            context.images_file.unlink(missing_ok=True)
    folds = Folds(costs, environment.round_run)
    folds.recall()
    decision, sizes, labels, untried = choose(folds, allowed, environment.regress)
    recipe = decision.taken.recipe
    longer, steps = times_longer(folds, recipe), folds.gain_of_steps(recipe)
    error = context.scores.best - decision.odds.score.estimate
    with state.stage("final"):
        final, before_rounding = train_finally(folds, recipe, longer)
    choice = Choice(
        request=state.request,
        seen=context.seen,
        images_file=context.images_file,
        metric=context.metric,
        sizes=tuple(sizes),
        decision=decision,
        folds=tuple(outcome for _, outcome in sorted(folds.outcomes[recipe].items())),
        final=final,
        before_rounding=before_rounding,
        longer=longer,
        more=what_more_buys(labels, error, steps, longer, sizes, untried, request.minutes, context.scores.unit),
        stages=tuple(state.file.seconds.items()),
        scores=context.scores,
    )
    for sentence in choice.more:
        tell(f"  {sentence}")
    with state.stage("output"):
        environment.write_output(choice, request.output, tell)
    return choice


def choose(
    folds: Folds, allowed: Mapping[str, list[int]], regress: Regress
) -> tuple[Decision, list[SizeResult], Interval | None, list[Recipe]]:
    """Return what is taken of all that fits the time, the sizes, what more labels bring, and what was left out.

    Raises:
        UserError: if time ends before there is a single model.
    """
    costs, state = folds.costs, folds.context.state
    with state.stage("sizes"):
        reserved_s = max(state.training_s, state.limit.left_s) - state.share_s("sizes")
        sizes = try_sizes(costs, allowed, regress, state.until(reserved_s))
        tried = [size for size in sizes if size.score is not None]
        ending = [size for size in tried if folds.ends_in_time(costs.longest_form(size.probe))] or tried[:1]
        probe = max(ending, key=lambda size: size.expected).probe
        labels = gain_of_labels(costs, probe, regress)
    with state.stage("search"):
        folds.run([probe], range(FEWEST_FOLDS), state.limit)
        if not folds.seeds(probe):  # without it there is no answer
            raise UserError(NO_MODEL, field="--minutes")
        trained, untried, ranked = _worth_training(folds, sizes), list[Recipe](), list[Recipe]()
        if trained:
            first = lora(trained[0].model, trained[0].image_size, trained[0].steps)
            reserved_s = folds.ending_s(costs.longest_form(first), LONGEST)
            reserved_s += FEWEST_FOLDS * costs.rounding_s(first, costs.allowed_bits(first))
            reserved_s += sum(folds.seconds(recipe, range(FEWEST_FOLDS)) for recipe in low_bits(folds, first))
            ranked, untried = search(folds, trained, state.until(reserved_s))
    with state.stage("folds"):
        untried += compare(folds, probe, ranked)
        decision = decide(folds)
        taken = decision.taken
        state.tell(f"  chosen: {taken.recipe.title}, {megabytes(taken.bytes)}, of {len(decision.candidates)} models")
    return decision, sizes, labels, [recipe for recipe in untried if not folds.seeds(recipe)]


def _look_at_machine(context: TuningContext, environment: Environment) -> tuple[Costs, Mapping[str, list[int]]]:
    """Refuse limits that nothing meets, measure what runs take, and return the image sizes that are allowed by model.

    Raises:
        UserError: for such a limit, and if there is no time for a single model.
    """
    sizes = {model: sizes_of(context, model) for model in context.backbones}
    forms = {}
    for model, own in sizes.items():
        try:
            lora(model, own[0], LEAST_STEPS).sections(context.shape(model, own[0]), context.request.max_adapter_bytes)
        except UserError as error:
            raise error.about("--max-adapter-bytes") from None
        for plain in (Recipe(model, size) for size in own):
            for form in (plain, *map(plain.rounded, ROUNDED)):
                forms[form] = form.file_bytes(context.shape(model, plain.image_size), context.outputs, context.images)
    sizes = within_latency(context, within_bytes(context, forms), environment.time_export)
    first = next(iter(sizes))
    middle = sizes[first][(len(sizes[first]) - 1) // 2]  # steps at the largest would take the time of measuring alone
    costs = Costs(context, throughput_of(context, lora(first, middle, LEAST_STEPS), environment.measure))
    smallest = min((Recipe(model, own[0]) for model, own in sizes.items()), key=costs.image_s)
    if not context.state.begun:
        costs.refuse_little_time(smallest)
    if (fault := _memory_fault(Folds(costs, environment.round_run), smallest)) is not None:
        raise fault
    return costs, sizes


def _memory_fault(folds: Folds, recipe: Recipe) -> UserError | None:
    """Return why LoRA does not train within the limit of memory at a recipe's size; None: it does."""
    try:
        folds.experiment(lora(recipe.model, recipe.image_size, LEAST_STEPS))
    except UserError as error:
        if error.field != MEMORY_LIMIT:
            raise
        folds.context.state.tell(f"  {recipe.model} at {recipe.image_size} px: {error}")
        return error
    return None


def _tell_forecast(costs: Costs, sizes: Mapping[str, list[int]]) -> None:
    """Say what the whole will take, stage by stage."""
    context, state = costs.context, costs.context.state
    images = context.different or context.images
    probes = [Recipe(model, size) for model, own in sizes.items() for size in own]
    parts, last = costs.forecast(probes, state.clock() - state.limit.started)
    tested = costs.tested_images(last)
    if context.metric.counts_images:
        apart = f"{100 * resolvable(max(1, round(context.alike * images))):.1f} points, if all have five folds"
        state.tell(f"  {images:,} images tell models apart that differ by {apart}")
        as_many = max(1, round(context.alike * tested))
        eighty = bounds_in_percent(proportion_interval(0.8 * as_many, as_many))
        state.tell(f"  {tested:,} test images of which 80.0 % are right: {eighty} on new images")
    if (scores := context.scores).metric.has_unit:
        lost, value = context.request.margin_share, context.request.margin_share * scores.deviation
        state.tell(f"  a smaller model may lose {scores.hundredths(lost)}, which is {scores.metric.plain(value)}")
    said = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in parts.items())
    state.tell(f"  about {sum(parts.values()) / 60:.0f} minutes in all: {said}")
    state.tell(costs.test_line(last, tested))


def _worth_training(folds: Folds, sizes: list[SizeResult]) -> list[SizeResult]:
    """Return the sizes at which LoRA is trained, each model's best first; none if there is no time for it."""
    tell = folds.context.state.tell
    fitting = [size for size in sorted(sizes, key=lambda size: -size.promise) if size.score is not None and size.steps]
    best = {size.model: size for size in reversed(fitting)}  # of each model
    fitting.sort(key=lambda size: size is not best[size.model])
    possible = (size for size in fitting if _memory_fault(folds, size.probe) is None)
    promising = list(islice(possible, max(_SIZES_TRAINED, len(best))))
    if promising:
        of = "{0.model} at {0.image_size} px" if len(best) > 1 else "{0.image_size} px"
        first, *more = map(of.format, promising)
        tell(f"  LoRA is trained at {first}{''.join(f', if there is time at {size}' for size in more)}")
    else:
        tell(f"  no time to train: {LEAST_STEPS} steps on {FEWEST_FOLDS} folds do not fit; give more --minutes")
    return promising
