"""What a tuning does, stage by stage; each takes the `Fit`, says what it finds, and can be killed.

- look, machine (5 % of the minutes): a fifth of the images, or the folder's own test split, is set aside for the test;
  the others make five folds. How fast this machine is, is measured: it says how many steps a run has (`costs`).
- sizes (15 %): regressions on frozen features rise by about a factor of 1.4 while they fit. How training images are
  flipped is decided at the first one: digits are not to be flipped, and cells of a panel may be upside down. The best
  is a candidate, and LoRA trains at two sizes, or at each model's best.
- search: LoRA over sizes, rates and steps by successive halving over folds (arXiv 1502.07943). The default, the usual
  rate with the most steps at the most promising size, always continues, and what may have been lucky does not displace
  it. Where the best has the highest or the lowest rate of all, or the most steps, what lies beyond is tried.
- folds: the best LoRA comes first. Its folds also give its forms rounded after training, and half of its steps, by
  which it is known whether a longer last training gains: then that is reserved. What is left goes to its other folds,
  to the second-best LoRA, AdaLoRA, a rank of 2 and QA-LoRA, and to other folds for what was taken and what it is
  compared with. QA-LoRA comes earlier where less than 4 bits are allowed.
- final: the recipe that was taken, on all images that are not for the test, which are read once, here. It ends as on
  folds, at the last of so many steps, as many times more as there are more images to train on; where more steps gain
  on folds, up to twice as many, four times if they were few; half of them, if steps took longer than planned.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from peft_vit.base.errors import UserError, is_out_of_memory
from peft_vit.base.files import read_bytes
from peft_vit.base.statistics import Interval, proportion_interval
from peft_vit.base.statistics.more_labels import gain_of_doubling
from peft_vit.base.statistics.odds import resolvable_difference
from peft_vit.core.backbones import architecture_of
from peft_vit.core.config import Flips, QuantizationType
from peft_vit.core.tasks import expected_gain
from peft_vit.data import existing, find_images
from peft_vit.deploy.page.formatting import bounds_in_percent, joined, megabytes
from peft_vit.fit.costs import LEAST_STEPS, LENGTHS, LONGEST, MOST_STEPS, SHORTEST, FitCosts, throughput_of
from peft_vit.fit.decide import (
    LEAST_FOLDS,
    NO_MODEL,
    ModelDecision,
    best_of,
    clearly_better,
    decide_model,
    gains_by_steps,
    posterior_by_size,
    standing,
)
from peft_vit.fit.fit import MEMORY_OPTION, Fit
from peft_vit.fit.intake import IMAGES_FILE, take_in
from peft_vit.fit.outcomes import Outcome
from peft_vit.fit.recipe import DEFAULT_RATE, ROUNDED, Recipe, lora, rate_of, shared_training
from peft_vit.fit.regressions import sizes_to_try
from peft_vit.runs.costs.time_limit import FEWEST_FOLDS, FOLDS, Limit, Pace, first_that_fits
from peft_vit.runs.this_machine.machine import cpu_count

# --- look, machine ----------------------------------------------------------------------------------------------------

_SURE_S = 3.0  # of decoding, until it is known how long it takes


def look(fit: Fit) -> None:
    """Look at the images, and set some aside for the test.

    Raises:
        UserError: see `inspect_images`; if the folder has other images than when the output was begun; and if
            images.json is there already and holds something else.
    """
    place = fit.request.output / IMAGES_FILE
    found = find_images(existing(str(fit.request.images)), fit.request.task)
    images = take_in(fit.request, found, place, seed=fit.request.seed, on_progress=telling_if_slow(fit))
    for line in images.inspection.lines(images.asked):
        fit.tell(f"  {line}")
    if fit.begun:
        images.refuse_others()
    if fit.begun or not place.exists():
        images.write()
    elif read_bytes(place) != images.content.model_dump_json(indent=1).encode():
        raise UserError("exists already, of other images; move it away, or choose another --output", file=place)
    split = (
        "the folder's own test split" if images.inspection.holdout is not None else f"a fifth of {images.task.fifth_of}"
    )
    choices = f"choices use the other {images.num_dev:,}"
    fit.tell(f"  test set, read at the end: {images.num_test:,} images, {split}; {choices}")
    fit.begin(images)


def telling_if_slow(fit: Fit) -> Callable[[int, int], None]:
    """Return what says once, soon after the beginning, that reading so many images takes more than its share.

    Raises:
        UserError: if it takes all the time that there is.
    """
    clock = fit.limit.clock
    started, told = clock(), False

    def on_progress(done: int, count: int) -> None:
        nonlocal told
        spent_s = clock() - started
        whole_s = spent_s * count / done
        if told or spent_s < _SURE_S or whole_s <= fit.share_s("look"):
            return
        told = True
        about = f"reading {count:,} images takes about {whole_s / 60:.1f} minutes"
        if whole_s > 60 * fit.request.minutes:
            raise UserError(f"{about} here; give more than {math.ceil(whole_s / 60)}", field="--minutes")
        fit.tell(f"  {about}, more than its share; less is trained")

    return on_progress


def look_at_machine(fit: Fit) -> dict[str, list[int]]:
    """Refuse limits that nothing meets, measure what runs take, and return the image sizes that are allowed by model.

    Raises:
        UserError: for such a limit, and if there is no time for a single model.
    """
    request, file_bytes = fit.request, {}
    sizes = {model: _sizes_of(fit, model) for model in fit.backbones}
    for model, own in sizes.items():
        try:
            lora(model, own[0], LEAST_STEPS).sections(fit.shape(model, own[0]), request.max_adapter_bytes)
        except UserError as error:
            raise error.about("--max-adapter-bytes") from None
        for plain in (Recipe(model, size) for size in own):
            for form in (plain, *map(plain.rounded, ROUNDED)):
                shape = fit.shape(model, plain.image_size)
                file_bytes[form] = form.file_bytes(shape, fit.images.num_outputs, fit.images.num_dev)
    sizes = _within_latency(fit, within_bytes(fit, file_bytes))
    first = next(iter(sizes))
    middle = sizes[first][(len(sizes[first]) - 1) // 2]  # steps at the largest would take the time of measuring alone
    fit.costs = FitCosts(fit, throughput_of(fit, lora(first, middle, LEAST_STEPS)))
    smallest = min((Recipe(model, own[0]) for model, own in sizes.items()), key=fit.costs.image_s)
    if not fit.begun:
        fit.costs.refuse_little_time(smallest)
    if (fault := _memory_fault(fit, smallest)) is not None:
        raise fault
    return sizes


def _sizes_of(fit: Fit, model: str) -> list[int]:
    """Return the image sizes that are worth a thought, rising; what was asked for, if anything was."""
    for size in fit.request.image_sizes:
        fit.shape(model, size)  # raises UserError if the model does not take it
    return sorted(fit.request.image_sizes) or sizes_to_try(architecture_of(fit.backbones[model]))


def within_bytes(fit: Fit, forms: Mapping[Recipe, int]) -> dict[str, list[int]]:
    """Return the sizes of each model at which some form keeps within the limit; 2 bits alone do if no size has more.

    Raises:
        UserError: if none does, with the least that would do.
    """
    limit = math.inf if fit.request.max_bytes is None else fit.request.max_bytes
    best, found = defaultdict[str, dict[int, int]](dict), dict[str, list[int]]()
    for form, size in forms.items():  # sizes in pixels by what keeps within: nothing, 2 bits alone, more
        own = 0 if size > limit else 1 if form.bits == "int2" else 2
        best[form.model][form.image_size] = max(own, best[form.model].get(form.image_size, 0))
    for model, by_size in best.items():
        if kept := [size for size, own in by_size.items() if own == max(by_size.values()) > 0]:
            found[model] = kept
        if left := [f"{size} px" for size in by_size if size not in kept]:
            fit.tell(f"  {model} at {joined(left)}: left out, more than --max-bytes, but for 2 bits at most")
    if not found:
        least = min(forms, key=forms.__getitem__)
        raise UserError(
            f"{round(limit / 1e5) / 10:g} MB is less than any model here takes; the least that would do is "
            f"{math.ceil(forms[least] / 1e5) / 10:g} MB, {least.bits or 'float'} weights of {least.model}",
            field="--max-bytes",
        )
    return found


def _within_latency(fit: Fit, sizes: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Return the sizes of each model at which an exported one is fast enough, by its architecture with any weights.

    The largest is timed; of the others those that multiply so much less that they should be fast enough, from the
    largest down until one is.

    Raises:
        UserError: if none is at any size, with the least that would do.
    """
    limit_s = fit.request.max_latency
    if limit_s is None:
        return {model: list(own) for model, own in sizes.items()}
    found, timed = dict[str, list[int]](), list[tuple[float, str, int]]()
    for model, own in sizes.items():
        architecture = architecture_of(fit.backbones[model])
        products = {size: fit.shape(model, size).multiply_adds for size in own}
        pace = 0.0  # seconds a product, at the fastest size so far
        for size in sorted(own, reverse=True):
            if size > min(own) and pace * products[size] > limit_s:
                continue
            names = fit.images.index.class_names
            time = partial(fit.environment.time_export, architecture, size, names, cpu_count())  # as what is left is
            seconds = fit.once(fit.decisions.latency_s, f"{model} {size}", time)
            fit.tell(f"  {model} at {size} px: {1000 * seconds:.1f} ms an image")
            timed.append((seconds, model, size))
            pace = seconds / products[size]
            if seconds <= limit_s:
                found[model] = [other for other in own if other <= size]
                break
    if not found:
        seconds, model, size = min(timed)
        raise UserError(
            f"{1000 * limit_s:g} ms is less than any model here takes; the least that would do is "
            f"{math.ceil(1000 * seconds)} ms, {model} at {size} px",
            field="--max-latency",
        )
    return found


def _memory_fault(fit: Fit, recipe: Recipe) -> UserError | None:
    """Return why LoRA does not train within the limit of memory at a recipe's size; None: it does."""
    try:
        fit.experiment(lora(recipe.model, recipe.image_size, LEAST_STEPS))
    except UserError as error:
        if error.field != MEMORY_OPTION:
            raise
        fit.tell(f"  {recipe.model} at {recipe.image_size} px: {error}")
        return error
    return None


def tell_forecast(fit: Fit, sizes: Mapping[str, list[int]]) -> None:
    """Say what the whole will take, stage by stage."""
    images, costs, scores = fit.images, fit.costs, fit.images.scores
    probes = [Recipe(model, size) for model, own in sizes.items() for size in own]
    parts, last = costs.forecast(probes, fit.limit.clock() - fit.limit.started)
    tested = costs.tested_images(last)
    if scores.metric.counts_images:
        alike = max(1, round(images.alike * images.num_different))
        apart = f"{100 * resolvable_difference(alike):.1f} points, if all have five folds"
        fit.tell(f"  {images.num_different:,} images tell models apart that differ by {apart}")
        as_many = max(1, round(images.alike * tested))
        eighty = bounds_in_percent(proportion_interval(0.8 * as_many, as_many))
        fit.tell(f"  {tested:,} test images of which 80.0 % are right: {eighty} on new images")
    if scores.metric.has_unit:
        lost, value = fit.request.margin_share, fit.request.margin_share * scores.deviation
        fit.tell(f"  a smaller model may lose {scores.hundredths(lost)}, which is {scores.metric.plain(value)}")
    said = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in parts.items())
    fit.tell(f"  about {sum(parts.values()) / 60:.0f} minutes in all: {said}")
    fit.tell(costs.test_line(last, tested))


# --- sizes ------------------------------------------------------------------------------------------------------------

NO_TIME = "no time for it"
_WAYS: tuple[Flips, ...] = ("horizontal", "none", "both")  # of equal ones the first
_FLIPPED: Mapping[Flips, str] = {"horizontal": "flipped left-right", "none": "as they are", "both": "flipped both ways"}


@dataclass(frozen=True)
class SizeResult:
    """A model at an image size.

    Attributes:
        model: of the backbone.
        image_size: in pixels.
        score: of the regression; None: it was not tried, `why` says why.
        steps: of LoRA that fit a run on a fold, at most.
        why: it was not tried; empty: it was.
        expected: of the score, on other images, see `posterior_by_size`.
        longer: times the steps, of the last training that fits.
    """

    model: str
    image_size: int
    score: float | None
    steps: int
    why: str = ""
    expected: float = 0.0
    longer: float = LONGEST

    @property
    def promise(self) -> float:
        """Return the sum of what a regression may have and what training may add in the steps of the last one."""
        return self.expected + expected_gain(round(self.longer * self.steps))

    @property
    def probe(self) -> Recipe:
        """Return the regression as a recipe."""
        return Recipe(self.model, self.image_size)


def try_all_sizes(fit: Fit, sizes: Mapping[str, Sequence[int]], limit: Limit) -> list[SizeResult]:
    """Fit a regression at every size that fits the time, the smallest first; what earlier calls have tried is known.

    There is one in any case.

    Raises:
        UserError: see `regress`.
    """
    costs, pace, clock = fit.costs, Pace(), fit.limit.clock
    results, too_large = list[SizeResult](), set[str]()
    every = [Recipe(model, size) for model, own in sizes.items() for size in own]
    for probe in sorted(every, key=costs.image_s):
        why = ""
        if probe.place not in fit.decisions.sizes:
            tried = [result for result in results if result.score is not None]
            expected_s = costs.regression_s(probe)
            if tried and max(1.0, pace.factor) * expected_s > limit.left_s:
                why = NO_TIME
            elif probe.model in too_large:
                why = "a smaller one took more memory than is free"
            else:
                began, flips_known = clock(), fit.decisions.flips is not None
                try:
                    fit.once(fit.decisions.sizes, probe.place, partial(_score_of, fit, probe))
                except Exception as error:
                    if not is_out_of_memory(error) or not tried:
                        raise
                    too_large.add(probe.model)
                    why = "it needs more memory than is free"
                if flips_known:  # else it was fitted three times
                    pace.add(clock() - began, expected_s)
        score = fit.decisions.sizes.get(probe.place)
        steps, longer = costs.most_steps(probe.model, probe.image_size)
        results.append(SizeResult(probe.model, probe.image_size, score, steps, why, longer=longer))
        if score is not None:
            fits = f"{steps} steps fit a run" if steps else "no time to train"
            fit.tell(f"  {probe.model} at {probe.image_size} px: {fit.images.scores.text(score)}, {fits}")
    compared = fit.images.alike * costs.compared_images(min(every, key=costs.image_s))
    for model in sizes:
        observed = {own.image_size: own.score for own in results if own.model == model and own.score is not None}
        posterior = posterior_by_size(observed, compared, fit.images.side) if observed else {}
        results = [
            replace(own, expected=posterior[own.image_size])
            if own.model == model and own.image_size in posterior
            else own
            for own in results
        ]
    return results


def _score_of(fit: Fit, probe: Recipe) -> float:
    scores = fit.images.scores
    if fit.decisions.flips is None:
        found = {way: _regress(fit, probe, way).value / scores.deviation for way in _WAYS}
        best = max(_WAYS, key=lambda way: (found[way], -_WAYS.index(way)))
        fit.decisions.flips = best
        compared = ", ".join(f"{_FLIPPED[way]} {scores.text(score)}" for way, score in found.items())
        fit.tell(f"  training images {_FLIPPED[best]}: {compared} at {probe.image_size} px")
        return found[best]
    return _regress(fit, probe, fit.flips).value / scores.deviation


def _regress(fit: Fit, probe: Recipe, flips: Flips, *, half: bool = False) -> Any:
    compared = fit.costs.compared_images(probe)
    training = shared_training(fit.batch_size, flips, fit.images.metric)
    experiment = {"name": "linear", "method": "linear", "training": training}
    some = {"train_images": compared} if compared < fit.images.num_dev else {}
    study = fit.study("sizes", probe, [fit.request.seed], [experiment], folds=None, **some)
    return fit.environment.regress(study, fit.studies, half)


def gain_of_labels(fit: Fit, probe: Recipe) -> Interval | None:
    """Return by what share of its error twice as many labels lower a regression's; None: there are too few to tell."""

    def forecast() -> Interval | None:
        found, scores = _regress(fit, probe, fit.flips, half=True), fit.images.scores
        if found.by_image_of_half is None:
            return None
        of_half, of_all = (scores.best - own / scores.deviation for own in (found.by_image_of_half, found.by_image))
        return gain_of_doubling(of_half, of_all, scores.image_weights(found.labels), share=1 - 1 / FOLDS, error=1.0)

    try:
        return fit.once(fit.decisions.more_labels, probe.place, forecast)
    except UserError:  # a class has one image in a half
        return None


def worth_training(fit: Fit, sizes: Sequence[SizeResult]) -> list[SizeResult]:
    """Return the sizes at which LoRA is trained, each model's best first; none if there is no time for it."""
    fitting = [size for size in sorted(sizes, key=lambda size: -size.promise) if size.score is not None and size.steps]
    best = {size.model: size for size in reversed(fitting)}  # of each model
    fitting.sort(key=lambda size: size is not best[size.model])
    possible = (size for size in fitting if _memory_fault(fit, size.probe) is None)
    promising = list(islice(possible, max(2, len(best))))
    if promising:
        of = "{0.model} at {0.image_size} px" if len(best) > 1 else "{0.image_size} px"
        first, *more = map(of.format, promising)
        fit.tell(f"  LoRA is trained at {first}{''.join(f', if there is time at {size}' for size in more)}")
    else:
        fit.tell(f"  no time to train: {LEAST_STEPS} steps on {FEWEST_FOLDS} folds do not fit; give more --minutes")
    return promising


# --- search -----------------------------------------------------------------------------------------------------------

RATES = (DEFAULT_RATE, 3 * DEFAULT_RATE, 3e-4)  # in the order in which time goes to them
_GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def candidate_recipes(sizes: Sequence[SizeResult]) -> list[Recipe]:
    """Return what is worth a try, the likeliest first: the default, then what differs from it in one thing, in two, ...

    Args:
        sizes: the most promising first.
    """
    weights = []
    for (size, result), (rate, value), half in itertools.product(enumerate(sizes), enumerate(RATES), (False, True)):
        steps = result.steps // 2 if half else result.steps
        if steps >= LEAST_STEPS:
            weights.append((size + 1.5 * rate + half, lora(result.model, result.image_size, steps, value)))
    return [recipe for _, recipe in sorted(weights, key=lambda pair: pair[0])]  # stable


def search(fit: Fit, sizes: Sequence[SizeResult], limit: Limit) -> tuple[list[Recipe], list[Recipe]]:
    """Return what was tried, the best first, and what there was no time for.

    Args:
        fit: the fit.
        sizes: at which LoRA is trained, the most promising first, at least one.
        limit: when the search ends, but for the default on its first fold.
    """
    recipes, frame = candidate_recipes(sizes), fit.frame
    count = 1
    while count < len(recipes) and _bracket_seconds(fit, recipes[: count + 1]) <= limit.left_s:
        count += 1
    tried, left = recipes[:count], recipes[count:]
    if len(tried) > 1:
        fit.tell(f"  {len(tried)} recipes of LoRA by successive halving over folds")
        _successive_halving(fit, tried, limit)
    best = best_of(frame, tried)
    while (further := _extend_grid(fit, best, tried)) is not None:
        seeds = frame.seeds(best)
        if not seeds or fit.seconds(further, seeds) > limit.left_s:
            left.insert(0, further)
            break
        fit.tell(f"  the best so far has {best.settings}, at the end of what was tried; next are {further.settings}")
        fit.run([further], seeds, limit)
        tried.append(further)
        best = best_of(frame, [best, further])
    return sorted(tried, key=lambda recipe: (recipe != best, -standing(frame, recipe))), left


def _bracket_seconds(fit: Fit, recipes: Sequence[Recipe]) -> float:
    """Return what successive halving takes: all on the first fold, half of them on the next, in the end one."""
    going, seconds = list(recipes), 0.0
    for seed in range(FOLDS):
        seconds += sum(fit.seconds(recipe, [seed]) for recipe in going)
        going = going[: (len(going) + 1) // 2]
    return seconds


def _successive_halving(fit: Fit, recipes: Sequence[Recipe], limit: Limit) -> None:
    """Give the next fold to the better half of what had the last one, and to the first recipe."""
    going = list(recipes)
    for seed in range(FOLDS):
        if len(going) == 1 or (seed and sum(fit.seconds(recipe, [seed]) for recipe in going) > limit.left_s):
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
    needed_s = fit.seconds(longer, range(FOLDS)) + fit.ending_s(longer)
    if gains_by_steps(fit.frame, best) and needed_s <= fit.limit.left_s:
        options.append(longer)
    return next((option for option in options if option not in tried), None)


# --- folds ------------------------------------------------------------------------------------------------------------

_FEWEST, _FIRST, _SECOND = range(FEWEST_FOLDS), range(FOLDS), range(2 * FOLDS)  # seeds: a repetition's, of both
_HALVED = range(2)  # seeds of half of the steps
_SMALL_RANK = 2


def find_model(
    fit: Fit, allowed: Mapping[str, list[int]]
) -> tuple[ModelDecision, list[SizeResult], Interval | None, list[Recipe]]:
    """Return what is taken of all that fits the time, the sizes, what more labels bring, and what was left out.

    Raises:
        UserError: if time ends before there is a single model.
    """
    costs, frame = fit.costs, fit.frame
    with fit.stage("sizes"):
        reserved_s = max(fit.training_s, fit.limit.left_s) - fit.share_s("sizes")
        sizes = try_all_sizes(fit, allowed, fit.until(reserved_s))
        tried = [size for size in sizes if size.score is not None]
        ending = [size for size in tried if fit.ends_in_time(costs.longest_form(size.probe))] or tried[:1]
        probe = max(ending, key=lambda size: size.expected).probe
        labels = gain_of_labels(fit, probe)
    with fit.stage("search"):
        fit.run([probe], range(FEWEST_FOLDS), fit.limit)
        if not frame.seeds(probe):  # without it there is no answer
            raise UserError(NO_MODEL, field="--minutes")
        trained, untried, ranked = worth_training(fit, sizes), list[Recipe](), list[Recipe]()
        if trained:
            first = lora(trained[0].model, trained[0].image_size, trained[0].steps)
            reserved_s = fit.ending_s(costs.longest_form(first), LONGEST)
            reserved_s += FEWEST_FOLDS * costs.rounding_s(first, costs.allowed_bits(first))
            reserved_s += sum(fit.seconds(recipe, range(FEWEST_FOLDS)) for recipe in _low_bits(fit, first))
            ranked, untried = search(fit, trained, fit.until(reserved_s))
    with fit.stage("folds"):
        untried += _compare(fit, probe, ranked)
        decision = decide_model(fit)
        taken = decision.taken
        fit.tell(f"  chosen: {taken.recipe.title}, {megabytes(taken.bytes)}, of {len(decision.candidates)} models")
    return decision, sizes, labels, [recipe for recipe in untried if not frame.seeds(recipe)]


def _compare(fit: Fit, probe: Recipe, ranked: Sequence[Recipe]) -> list[Recipe]:
    """Bring the finalists to folds, and return those that there was no time for.

    Args:
        fit: the fit.
        probe: the best regression, on the fewest folds already.
        ranked: of LoRA, the best first; none: there is no time to train.
    """
    best, costs, frame = ranked[0] if ranked else probe, fit.costs, fit.frame
    for fold in _FEWEST:  # each says more about how long the last training takes
        longer, over_s = (SHORTEST, fit.over_s) if fold < LEAST_FOLDS else (1.0, 0.0)
        limit = fit.until(fit.ending_s(costs.longest_form(best), longer) - over_s)
        _do(fit, best, [fold], limit)
    forms = costs.allowed_bits(probe)
    fits = not ranked or FEWEST_FOLDS * costs.rounding_s(probe, forms) <= limit.left_s
    alone = len(frame.seeds(best)) < LEAST_FOLDS  # then nothing else may be small enough
    if alone or (fits and not clearly_better(frame, best, probe)):
        fit.quantize(probe, forms, limit)
    if ranked and fit.seconds(best.half, _HALVED) <= limit.left_s:
        fit.run([best.half], _HALVED, limit)
    if gains_by_steps(frame, best) and not clearly_better(frame, probe, best):
        limit = fit.until(fit.ending_s(costs.longest_form(best), LONGEST))
    left = [
        recipe
        for recipe in _in_turn(fit, probe, ranked)
        if not any(_done_in_time(fit, [recipe], seeds, limit) for seeds in (_FIRST, _FEWEST))
    ]
    decision = decide_model(fit)
    again = list(dict.fromkeys((decision.taken.recipe.trained, decision.reference)))
    if not left:
        _done_in_time(fit, again, _SECOND, limit)
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
    best, first = ranked[0], _low_bits(fit, ranked[0])
    ranks = [replace(best, method="adalora", rate=rate_of("adalora", best.rate)), replace(best, rank=_SMALL_RANK)]
    second = [recipe for recipe in ranked[1:] if recipe != best.half][:1]
    others = [best, probe, *second, *(ranks if fit.request.max_adapter_bytes is None else ())]
    return [*first, *others] if first else [*others, *_packed(fit, best)]


def _low_bits(fit: Fit, best: Recipe) -> list[Recipe]:
    """Return QA-LoRA with the best recipe of LoRA, where less than 4 bits are allowed."""
    return _packed(fit, best) if "int2" in fit.costs.allowed_bits(best) else []


def _packed(fit: Fit, best: Recipe) -> list[Recipe]:
    most, rate = fit.request.max_bytes, rate_of("qa_lora", best.rate)
    both = [replace(best, method="qa_lora", rate=rate, bits=bits, when="training") for bits in ("nf4", "int2")]
    return [recipe for recipe in both if most is None or fit.costs.bytes_of(recipe) <= most][:1]


# --- final ------------------------------------------------------------------------------------------------------------

_ENDLESS_S = 1e8


def times_longer(fit: Fit, recipe: Recipe) -> float:
    """Return how many times the steps that follow from the folds the last training has."""
    if recipe.is_probe:
        return 1.0
    longest = LENGTHS[0] if gains_by_steps(fit.frame, recipe) else 1.0
    options = [times for times in LENGTHS if 1 < times <= longest]
    few = [times for times in options if times * recipe.steps <= LONGEST * max(MOST_STEPS, recipe.steps)]
    possible = first_that_fits(few, partial(fit.ending_s, recipe), fit.limit.left_s)
    shorter = (times for times in LENGTHS if times <= 1 and fit.ends_in_time(recipe, times))
    return max(possible or next(shorter, SHORTEST), fit.longest_done(recipe, longest))


def train_finally(fit: Fit, recipe: Recipe, longer: float) -> tuple[Outcome, Outcome]:
    """Train a recipe on everything that is not for the test, so many times longer than on folds.

    The test comes on top of the minutes, on images drawn at random where not all of them fit their share. Once for a
    size, since its other models are read on the same images; a call with more minutes reads no others.

    Returns:
        What it came to on the test images, and what the same run came to before its weights were rounded; where
        nothing is rounded after training, twice the same.

    Raises:
        EveryRunFailedError: if it failed.
    """
    trained, every, decisions = fit.final_recipe(recipe, longer), fit.images.num_test, fit.decisions
    is_done = trained.done_as in decisions.trained
    tested = fit.once(
        decisions.tested_images, recipe.place, lambda: every if is_done else fit.costs.tested_images(recipe)
    )
    if not is_done:
        fit.tell(fit.costs.test_line(recipe, tested))
    some = {"tested_images": tested} if tested < every else {}
    seed, experiments = fit.request.seed, [fit.experiment(trained)]
    study = fit.study(f"final-{recipe.place}", recipe, [seed], experiments, folds=None, **some)
    study["measures"] |= {"features": True}
    outcome = fit.run_alone(study, fit.until(-_ENDLESS_S))  # it has to be brought to its end
    if not is_done:
        decisions.trained.append(trained.done_as)
        fit.save()
    if recipe.when != "after" or recipe.bits is None:
        return outcome, outcome
    logits = fit.rounded_logits(outcome.folder, [recipe.bits])[recipe.bits]
    return replace(outcome, logits=np.asarray(logits, dtype=np.float64)), outcome
