"""`peft-vit tune`: from images and limits to the smallest model that is shown to be good enough.

It begins as `train` does, see there, but writes a linear probe before a first training that takes some minutes, so that
there is a model soon. It continues while there is time:

- search: LoRA over sizes, rates and steps by successive halving over folds (arXiv 1502.07943). The default, the usual
  rate with the most steps at the most promising size, always continues, and what may have been lucky does not displace
  it. Where the best has the highest or the lowest rate of all, or the most steps, what lies beyond is tried. Folds of
  the best also give its forms rounded after training, and half of its steps, by which it is known whether a longer last
  training gains. What is left goes to its other folds, to the second-best LoRA, one with the other `--augment`,
  AdaLoRA, a rank of 2 and QA-LoRA, and to other folds for what was taken and what it is compared with. Where only 2
  bits are small enough, QA-LoRA takes LoRA's place from the beginning.
- final: the last training of what was taken.

What was done is kept by the name of its recipe. A later call finds it, and tries with its own minutes more sizes,
rates, steps and candidates. Only the test images, the folds, flips, how images become square and how products are
computed stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

from peft_vit.core.config import QuantizationType, named_as_typed
from peft_vit.fit.costs import LEAST_STEPS, LONG_S
from peft_vit.fit.decide import (
    best_of,
    clearly_better,
    decide_model,
    gain_of_steps,
    gains_by_steps,
    meaning_of_last,
    standing,
    times_longer,
)
from peft_vit.fit.fit import Environment, Fit
from peft_vit.fit.intake import IMAGES_FILE, keep_images, look
from peft_vit.fit.outcomes import EveryRunFailedError
from peft_vit.fit.output import Tuning, check_output, what_more_buys, write_output
from peft_vit.fit.recipe import DEFAULT_RATE, Recipe, lora, rate_of
from peft_vit.fit.request import Emit, TuneRequest, print_event
from peft_vit.fit.sizes import SizeResult, allowed_sizes, best_linear_probe, gain_of_labels, within_memory
from peft_vit.fit.train import begin, know_by_folds, train_last
from peft_vit.runs.costs.time_limit import FEWEST_FOLDS, FOLDS, Limit, first_that_fits, makespan
from peft_vit.runs.records.progress import study_lock
from peft_vit.runs.records.storage import tuned_model


def tune(
    request: TuneRequest, emit: Emit = print_event, environment: Environment | None = None, started: float | None = None
) -> Tuning | None:
    """Find the best model in the given minutes, within limits, and how sure that is.

    Soon after the image sizes are compared, there is a model in the output, and what is found later only replaces it.

    Args:
        request: what was asked for.
        emit: gets what happens.
        environment: how the outside world is asked.
        started: when it was called, by `time.monotonic`, from when its minutes count; None: now.

    Returns:
        What was chosen, and by what; None: the same call came to its end before, and its model lies in the output.

    Raises:
        UserError: for bad input, before anything is trained; see `allowed_sizes`, `check_output` and `Fit.enter`. Also
            if another command works on the same output.
        KeyboardInterrupt: after Ctrl-C; the same request continues.
    """
    check_output(request)
    with named_as_typed(TuneRequest), study_lock(request.output):
        fit = Fit(request, emit, environment, started)
        fit.enter(request.output)
        was_there = (fit.folder / IMAGES_FILE).exists()
        with fit.opened:
            with fit.stage("look"):
                look(fit)
                keep_images(fit)
            if fit.file.finished >= request.minutes and (model := tuned_model(fit.folder)) is not None:
                fit.emit(f"This call was done before, its model is {model}. With more --minutes it tries more.")
                return None
            try:
                allowed = allowed_sizes(fit)
                fit.begun = True
            finally:
                if not (fit.begun or was_there):  # refused: another limit can be asked for
                    fit.images.file.unlink(missing_ok=True)
            return fitted(fit, request, allowed)


def fitted(fit: Fit, request: TuneRequest, allowed: Mapping[str, Sequence[int]]) -> Tuning:
    """Do what is not done of a tuning of images that were looked at, at the image sizes that are allowed by model."""
    sizes, first, longer = begin(fit, allowed)
    probe = best_linear_probe(fit, sizes).probe

    def trained(recipe: Recipe, longer: float) -> Tuning:
        """Return a tuning whose model, trained now, is the only one so far."""
        form = within_limits(fit, recipe)
        final, before = train_last(fit, form, longer)
        meaning = meaning_of_last(fit, form, form, longer, final.learned)
        return Tuning(request, fit.images, tuple(sizes), form, final, before, longer=longer, meaning=meaning)

    first_s = fit.costs.last_s(first, fit.costs.last_steps(first, longer))
    if fit.decisions.delivered is None and not first.is_probe and first_s > LONG_S:
        with fit.stage("probe"):
            done = trained(probe, 1.0)
        _write(fit, done)
    with fit.stage("first"):
        try:
            done = trained(first, longer)
        except EveryRunFailedError as error:
            if first.is_probe:
                raise
            fit.emit(f"  {first.title} failed: {error.message}")
            fit.failed.add(first)
            first = probe
            done = trained(first, 1.0)
    early = fit.decisions.delivered  # a probe that no call has chosen in the end came before this
    if early is None or (early[0].is_probe and not done.recipe.is_probe and not fit.file.finished):
        _write(fit, done)
    with fit.stage("folds"):
        limit = fit.until(fit.costs.output_s(fit.costs.longest_form(first)) - fit.over_s)
        known = know_by_folds(fit, first, probe, limit)
        if done.recipe.rounded_to:
            fit.quantize(known, [done.recipe.rounded_to], limit)
    on_folds = replace(done.recipe, steps=known.steps)
    if fit.frame.seeds(first) and fit.frame.seeds(probe):
        done = _better_model(fit, done, first, probe)
        on_folds = done.recipe
    else:
        again = f"The same command with --minutes {2 * request.minutes:g} continues"
        done = replace(done, more=(f"There was no time to compare it with others. {again}.",))
    meaning = meaning_of_last(fit, done.recipe, on_folds, done.longer, done.final.learned)
    done = replace(done, folds=tuple(fit.frame.of(on_folds)), meaning=meaning)
    for sentence in done.more:
        fit.emit(f"  {sentence}")
    if done.decision is not None or done.folds:  # else it is written already
        _write(fit, done)
    fit.file.finished = request.minutes
    fit.save()
    return done


def _better_model(fit: Fit, done: Tuning, first: Recipe, probe: Recipe) -> Tuning:
    """Search for a better model than the first one, and return the tuning with what was decided and trained for it."""
    with fit.stage("search"):
        labels = gain_of_labels(fit, probe)
        untried = look_further(fit, done.sizes, first, probe)
        decision = decide_model(fit)
        recipe = decision.taken.recipe
        fit.emit(f"  chosen of {len(decision.candidates)} models: {recipe.title}")
    longer, steps = times_longer(fit, recipe), gain_of_steps(fit.frame, recipe)
    with fit.stage("final"):
        final, before = train_last(fit, recipe, longer)
    error, unit = done.images.scores.best - decision.odds.score.estimate, done.images.scores.unit
    more = what_more_buys(labels, error, steps, longer, done.sizes, untried, done.request.minutes, unit)
    return replace(
        done, recipe=recipe, decision=decision, longer=longer, more=more, final=final, before_rounding=before
    )


def _write(fit: Fit, tuning: Tuning) -> None:
    with fit.stage("output"):
        tuning = replace(tuning, stage_seconds=tuple(fit.file.seconds.items()))
        started = fit.limit.clock()
        (fit.environment.write_output or write_output)(tuning, fit.folder, fit.emit)
        fit.output_pace.add(fit.limit.clock() - started, fit.costs.written_s(tuning.recipe))
    fit.decisions.delivered = tuning.recipe, tuning.longer


def within_limits(fit: Fit, recipe: Recipe) -> Recipe:
    """Return a recipe, rounded after training as little as the limit of bytes asks for."""
    most = fit.request.max_bytes
    if most is None or fit.costs.bytes_of(recipe) <= most:
        return recipe
    return recipe.rounded((fit.costs.allowed_bits(recipe) or ["int2"])[0])


# --- search -----------------------------------------------------------------------------------------------------------

LEARNING_RATES = (DEFAULT_RATE, 3 * DEFAULT_RATE, 3e-4)  # in the order in which time goes to them
_GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def candidate_recipes(sizes: Sequence[SizeResult]) -> list[Recipe]:
    """Return what is worth a try, the likeliest first: the default, then what differs from it in one thing, in two, ...

    Args:
        sizes: the most promising first.
    """
    places = itertools.product(enumerate(sizes), enumerate(LEARNING_RATES), range(2))
    by_distance = sorted(places, key=lambda place: place[0][0] + 1.5 * place[1][0] + place[2])  # stable
    default, *others = (
        lora(at.model, at.image_size, at.steps // (1 + half), rate) for (_, at), (_, rate), half in by_distance
    )
    return [default, *(recipe for recipe in others if recipe.steps >= LEAST_STEPS)]


def worth_search(fit: Fit, sizes: Sequence[SizeResult], first: Recipe) -> list[SizeResult]:
    """Return the sizes at which LoRA is tried, that of the first training first, then each model's best.

    Args:
        fit: the fit.
        sizes: with lengths that fit.
        first: what was trained first.
    """
    fitting = sorted((size for size in sizes if size.score is not None and size.steps), key=lambda size: -size.promise)
    own = [replace(size, steps=first.steps) for size in fitting if size.probe.place == first.place]
    best = {size.model: size for size in reversed(fitting)}  # of each model
    others = sorted((size for size in fitting if size.probe.place != first.place), key=lambda s: s is not best[s.model])
    possible = (size for size in others if within_memory(fit, size.probe))
    return [*own, *islice(possible, max(2, len(best)) - len(own))]


def search(fit: Fit, sizes: Sequence[SizeResult], limit: Limit) -> tuple[list[Recipe], list[Recipe]]:
    """Return what was tried, the best first, and what there was no time for.

    Args:
        fit: the fit.
        sizes: at which LoRA is trained, the most promising first, at least one.
        limit: when the search ends, but for the default on its first fold.
    """
    recipes, frame = candidate_recipes(sizes), fit.frame
    brackets = [recipes[:count] for count in range(len(recipes), 1, -1)]

    def bracket_s(recipes: Sequence[Recipe]) -> float:
        """Return what successive halving takes: all on the first fold, half of them on the next, in the end one."""
        going = [recipes[: -(-len(recipes) // 2**seed)] for seed in range(FOLDS)]
        return sum(_side_by_side_s(fit, of_seed, seed) for seed, of_seed in enumerate(going))

    tried = first_that_fits(brackets, bracket_s, limit.left_s) or recipes[:1]
    left = recipes[len(tried) :]
    if len(tried) > 1:
        fit.emit(f"  {len(tried)} recipes of LoRA by successive halving over folds")
        _successive_halving(fit, tried, limit)
    best = best_of(frame, tried)
    while (further := _extend_grid(fit, best, tried)) is not None:
        seeds = frame.seeds(best)
        if not seeds or fit.seconds(further, seeds) > limit.left_s:
            left.insert(0, further)
            break
        fit.emit(f"  the best so far has {best.settings}, at the end of what was tried; next are {further.settings}")
        fit.run([further], seeds, limit)
        tried.append(further)
        best = best_of(frame, [best, further])
    return sorted(tried, key=lambda recipe: (recipe != best, -standing(frame, recipe))), left


def _side_by_side_s(fit: Fit, recipes: Sequence[Recipe], seed: int) -> float:
    return makespan([fit.seconds(recipe, [seed]) for recipe in recipes], fit.at_once)


def _successive_halving(fit: Fit, recipes: Sequence[Recipe], limit: Limit) -> None:
    """Give the next fold to the better half of what had the last one, and to the first recipe."""
    going = list(recipes)
    for seed in range(FOLDS):
        if len(going) == 1 or (seed and _side_by_side_s(fit, going, seed) > limit.left_s):
            return
        fit.run(going, [seed], limit)
        values = {recipe: fit.frame.value(recipe, range(seed + 1)) for recipe in going}
        done = [recipe for recipe in going if values[recipe] is not None]  # others failed, or had no time
        better = sorted(done, key=lambda recipe: -(values[recipe] or 0.0))[: max(1, len(going) // 2)]
        going = [recipe for recipe in done if recipe in better or recipe == recipes[0]]


def _extend_grid(fit: Fit, best: Recipe, tried: Sequence[Recipe]) -> Recipe | None:
    """Return what lies beyond the best at an end of what was tried, and is not tried yet; None: nothing."""
    rates = sorted(recipe.rate for recipe in tried if replace(recipe, rate=best.rate) == best)
    options = []
    if best.rate != DEFAULT_RATE and best.rate in (rates[0], rates[-1]):
        place = _GRID.index(best.rate) + (1 if best.rate == rates[-1] else -1)
        options += [replace(best, rate=rate) for rate in _GRID[max(0, place) : place + 1]]
    longer = replace(best, steps=2 * best.steps)
    needed_s = fit.seconds(longer, range(FOLDS)) + fit.costs.ending_s(longer)
    if gains_by_steps(fit.frame, best) and needed_s <= fit.limit.left_s:
        options.append(longer)
    return next((option for option in options if option not in tried), None)


# --- folds ------------------------------------------------------------------------------------------------------------

_FEWEST, _FIRST, _SECOND = range(FEWEST_FOLDS), range(FOLDS), range(2 * FOLDS)  # seeds: a repetition's, of both
_HALVED = range(2)  # seeds of half of the steps
_SMALL_RANK = 2


def look_further(fit: Fit, sizes: Sequence[SizeResult], first: Recipe, probe: Recipe) -> list[Recipe]:
    """Try other recipes while there is time to train them for the last time, too; return what it was too short for.

    Args:
        fit: the fit.
        sizes: with lengths that fit.
        first: what was trained first, on folds already, as the regression is.
        probe: the best regression.
    """
    costs = fit.costs
    trained = [] if first.is_probe or first.bits is not None else worth_search(fit, sizes, first)
    untried, ranked = list[Recipe](), list[Recipe]()
    if trained:
        reserved_s = costs.ending_s(costs.longest_form(first), fit.longest_done(first))
        ranked, untried = search(fit, trained, fit.until(reserved_s))
    untried += _compare(fit, probe, ranked or ([] if first.is_probe else [first]))
    return [recipe for recipe in untried if not fit.frame.seeds(recipe)]


def _compare(fit: Fit, probe: Recipe, ranked: Sequence[Recipe]) -> list[Recipe]:
    """Bring the finalists to folds, and return those that there was no time for.

    Args:
        fit: the fit.
        probe: the best regression, on the fewest folds already.
        ranked: of LoRA, the best first; none: there is no time to train.
    """
    best, costs, frame = ranked[0] if ranked else probe, fit.costs, fit.frame
    again_s = 0.0 if fit.longest_done(best) else costs.ending_s(costs.longest_form(best))
    limit = fit.until(again_s or costs.output_s(costs.longest_form(best)))
    _do(fit, best, _FEWEST, limit)
    forms = costs.allowed_bits(probe)
    fits = not ranked or FEWEST_FOLDS * costs.rounding_s(probe, forms) <= limit.left_s
    if fits and not clearly_better(frame, best, probe):
        fit.quantize(probe, forms, limit)
    if ranked and fit.seconds(best.half, _HALVED) <= limit.left_s:
        fit.run([best.half], _HALVED, limit)
    if (times := times_longer(fit, best)) > fit.longest_done(best) and not clearly_better(frame, probe, best):
        limit = fit.until(costs.ending_s(costs.longest_form(best), times))
    left = [
        recipe
        for recipe in _in_turn(fit, probe, ranked)
        if not any(_done_in_time(fit, [recipe], seeds, limit) for seeds in (_FIRST, _FEWEST))
    ]
    if not left:
        decision = decide_model(fit)
        again = dict.fromkeys((decision.taken.recipe.trained, decision.reference))
        _done_in_time(fit, list(again), _SECOND, limit)
    return left


def _done_in_time(fit: Fit, recipes: Sequence[Recipe], seeds: Sequence[int], limit: Limit) -> bool:
    """Do what is missing of some recipes' runs, if there is time for all, and return whether there was."""
    needed_s = 0.0
    for recipe in recipes:
        forms = _forms(fit, recipe)
        missing = {seed for form in (recipe, *map(recipe.rounded, forms)) for seed in fit.frame.missing(form, seeds)}
        needed_s += fit.seconds(recipe, seeds) + len(missing) * fit.costs.rounding_s(recipe, forms)
    if needed_s > limit.left_s:
        return False
    for recipe in recipes:
        _do(fit, recipe, seeds, limit)
    return True


def _do(fit: Fit, recipe: Recipe, seeds: Sequence[int], limit: Limit) -> None:
    fit.run([recipe], seeds, limit)
    fit.quantize(recipe, _forms(fit, recipe), limit)


def _forms(fit: Fit, recipe: Recipe) -> list[QuantizationType]:
    """Return the formats to which a recipe is rounded on its folds; a probe, if it is compared so at all."""
    allowed = [] if recipe.bits else fit.costs.allowed_bits(recipe)
    return [bits for bits in allowed if not recipe.is_probe or fit.frame.seeds(recipe.rounded(bits))]


def _in_turn(fit: Fit, probe: Recipe, ranked: Sequence[Recipe]) -> list[Recipe]:
    """Return what goes to all folds, in the order in which time goes to it."""
    if not ranked:
        return [probe]
    best = ranked[0]
    if best.bits is not None:
        return [best, probe]
    ranks = [replace(best, method="adalora", rate=rate_of("adalora", best.rate)), replace(best, rank=_SMALL_RANK)]
    second = [recipe for recipe in ranked[1:] if recipe != best.half][:1]
    packed = replace(best, method="qa_lora", rate=rate_of("qa_lora", best.rate), bits="nf4", when="training")
    if fit.request.augment is None:
        second.append(replace(best, augment="flip" if fit.usual_augment == "light" else "light"))
    return [best, probe, *second, *(ranks if fit.request.max_adapter_bytes is None else ()), packed]
