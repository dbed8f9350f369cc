"""What a fit does, stage by stage; each takes the `Fit`, says what it finds, and can be killed.

- look: a fifth of the images, or the folder's own test split, is set aside for the test; the others make five folds.
- sizes (15 % of the minutes): regressions on frozen features of some of the images rise by about a factor of 1.4 while
  they fit. At the first one it is decided how training images are flipped, since digits are not to be flipped, and
  cells of a panel may be upside down; and whether heads read four blocks.
- first: one training where regressions, and what training usually adds in the steps that fit, promise the most. It is
  a model that can be delivered; all else looks for a better one.
- folds: the same without a fold of the images each, beside the best regression: how good it is, what its outputs
  mean, and whether the regression is better.

A tuning continues while there is time:

- search: LoRA over sizes, rates and steps by successive halving over folds (arXiv 1502.07943). The default, the usual
  rate with the most steps at the most promising size, always continues, and what may have been lucky does not displace
  it. Where the best has the highest or the lowest rate of all, or the most steps, what lies beyond is tried. Folds of
  the best also give its forms rounded after training, and half of its steps, by which it is known whether a longer last
  training gains. What is left goes to its other folds, to the second-best LoRA, AdaLoRA, a rank of 2 and QA-LoRA, and
  to other folds for what was taken and what it is compared with. Where only 2 bits are small enough, QA-LoRA takes
  LoRA's place from the beginning.
- final: the recipe that was taken, if it is another one than was trained first, on all images that are not for the
  test. It ends as on folds, at the last of so many steps, as many times more as there are more images to train on;
  where more steps gain on folds, up to twice as many, four times if they were few.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from peft_vit.base.console import duration
from peft_vit.base.errors import UserError, is_out_of_memory
from peft_vit.base.files import read_bytes
from peft_vit.base.statistics import Interval
from peft_vit.base.statistics.more_labels import gain_of_doubling
from peft_vit.core.backbones import architecture_of, supports_head_blocks
from peft_vit.core.config import Flips, HeadBlocks, QuantizationType, study_from_mapping, type_of_bits
from peft_vit.core.methods import METHODS
from peft_vit.core.tasks import expected_gain
from peft_vit.deploy.page.formatting import joined
from peft_vit.fit.costs import LEAST_STEPS, SIZES_SHARE
from peft_vit.fit.decide import (
    best_of,
    clearly_better,
    decide_model,
    gains_by_steps,
    posterior_by_size,
    standing,
    times_longer,
)
from peft_vit.fit.events import Advanced
from peft_vit.fit.fit import MEMORY_OPTION, Fit
from peft_vit.fit.intake import IMAGES_FILE, pixel_store, take_in
from peft_vit.fit.outcomes import Outcome
from peft_vit.fit.recipe import DEFAULT_RATE, ROUNDED, Recipe, lora, peak_of, rate_of
from peft_vit.fit.regressions import Regression, regress, sizes_to_try
from peft_vit.runs.costs.time_limit import FEWEST_FOLDS, FOLDS, Limit, first_that_fits
from peft_vit.runs.scheduling.plan import plan_study
from peft_vit.runs.this_machine.machine import check_devices, cpu_count

# --- look -------------------------------------------------------------------------------------------------------------


_SURE_S = 10.0  # of reading, until it is known how long it takes


def look(fit: Fit) -> None:
    """Look at the images, and set some aside for the test; nothing is written.

    Raises:
        UserError: see `inspect_images`; and for more devices than there are here.
    """
    request = fit.request
    if request.devices > 1 and request.executor == "local":
        check_devices(request.devices, request.device)
    found = request.found
    pixels = fit.opened.enter_context(pixel_store(request, found))
    images = take_in(request, found, fit.folder / IMAGES_FILE, pixels, partial(_read, fit))
    if images.inspection.images.taken:
        fit.tell(images.inspection.images.taken)
    for line in images.inspection.lines(images.asked):
        fit.tell(f"  {line}")
    fit.begin(images)
    split = "a fifth of them"
    if images.inspection.holdout is not None:
        split = "the folder's own test split"
    elif request.test_images is not None:
        split = "as you asked" if request.group is None else "about as you asked: groups stay whole"
    elif images.split_of is not None:
        split = f"those that tested in {images.split_of} among them"
    validate = f", {fit.num_validation:,} to validate" if fit.num_validation else ""
    fit.tell(f"  {fit.num_train:,} to train{validate}, {images.num_test:,} to test ({split})")


def _read(fit: Fit, done: int, count: int) -> None:
    """Say how many images are read, and refuse so many that reading them takes all the minutes."""
    fit.emit(Advanced("reading images", done, count))
    spent_s = fit.limit.clock() - fit.limit.started
    if spent_s > _SURE_S and (whole_s := spent_s * count / done) > 60 * fit.request.minutes:
        about = f"reading {count:,} images takes about {whole_s / 60:.1f} minutes here"
        raise UserError(f"{about}; give more than {math.ceil(whole_s / 60)}", field="--minutes")


def keep_images(fit: Fit) -> None:
    """Write which images are used in the fit's folder, or refuse others than it was begun with.

    Raises:
        UserError: if the folder has other images than when the fit was begun; and if the file is there already and
            holds something else.
    """
    fit.images = images = replace(fit.images, file=(fit.folder / IMAGES_FILE).absolute())
    if fit.begun:
        images.refuse_others()
    if fit.begun or not images.file.exists():
        images.write()
    elif read_bytes(images.file) != images.content.model_dump_json(indent=1).encode():
        raise UserError("exists already, of other images; move it away, or choose another --output", file=images.file)


# --- sizes ------------------------------------------------------------------------------------------------------------

NO_TIME = "no time for it"
_SLOWER = 2  # times, of a regression on four blocks
_FITTED_RUNS = 8  # that fit a head, usually: on folds, and the last, of what is trained and of the regression
_OTHER_WAYS: Mapping[Flips, int] = {"horizontal": 2, "both": 4}  # times as many images
_FLIPPED: Mapping[Flips, str] = {"horizontal": "flipped left-right", "none": "as they are", "both": "flipped both ways"}


@dataclass(frozen=True)
class SizeResult:
    """A model at an image size.

    Attributes:
        model: of the backbone.
        image_size: in pixels.
        score: of the regression; None: it was not tried, `why` says why.
        steps: of a training that fit a run on a fold, at most; 0: none does.
        longer: times those that follow from them, of a last training that fits.
        last_steps: of that.
        why: it was not tried; empty: it was.
        expected: of the score, on other images, see `posterior_by_size`.
    """

    model: str
    image_size: int
    score: float | None
    steps: int
    longer: float = 1.0
    last_steps: int = 0
    why: str = ""
    expected: float = 0.0

    @property
    def promise(self) -> float:
        """Return the sum of what a regression may have and what training may add in the steps of the last one."""
        return self.expected + expected_gain(self.last_steps)

    @property
    def probe(self) -> Recipe:
        """Return the regression as a recipe."""
        return Recipe(self.model, self.image_size)


def usual_recipe(fit: Fit, model: str, image_size: int, steps: int) -> Recipe:
    """Return what was asked for, or LoRA of the usual rank, with so many steps on a fold."""
    request = fit.request
    recipe = Recipe(model, image_size, request.method, rank=request.rank or 0, steps=steps)
    if request.method.startswith("qa_"):
        recipe = replace(recipe, bits=type_of_bits(request.bits or "4"), when="training")
    if recipe.is_probe:
        return replace(recipe, steps=0)
    shape = fit.shape(model, image_size)
    if request.max_bytes is not None and "int2" in fit.costs.allowed_bits(recipe):  # rounding to it loses too much
        recipe = replace(recipe, method="qa_lora", bits="int2", when="training")
    if request.learning_rate is not None:
        return replace(recipe, rate=request.learning_rate)
    own = METHODS[recipe.method].learning_rate_for(recipe.options(shape, **request.adapter_options))
    return replace(recipe, rate=peak_of(own))


def allowed_sizes(fit: Fit) -> dict[str, list[int]]:
    """Return the image sizes that are allowed by model, after refusing what nothing meets.

    Raises:
        UserError: for a limit that nothing meets, a model that does not take a size, and what planning refuses.
    """
    request, file_bytes = fit.request, {}
    sizes = {model: _sizes_of(fit, model) for model in fit.backbones}
    for model, own in sizes.items():
        plain = usual_recipe(fit, model, own[0], request.steps_for(fit.num_train) or LEAST_STEPS)
        try:
            experiment = fit.experiment(plain)
        except UserError as error:
            is_of_adapter = request.max_adapter_bytes is not None and error.field == "--adapter-bytes"
            raise error.about("--max-adapter-bytes") if is_of_adapter else error from None
        study = fit.study("asked-for", plain, [request.seed], [experiment], folds=None)
        if "memory_limit" not in experiment["training"]:  # else it was planned to find what keeps within it
            plan_study(study_from_mapping(study, file=request.images), fit.studies, file=None, smoke=request.smoke)
        for recipe in (Recipe(model, size) for size in own):
            for form in (recipe, *map(recipe.rounded, ROUNDED)) if request.max_bytes else ():
                shape = fit.shape(model, recipe.image_size)
                file_bytes[form] = form.file_bytes(shape, fit.images.num_outputs, fit.images.num_dev)
    if request.max_bytes is not None:
        sizes = within_bytes(fit, file_bytes)
    sizes = _within_latency(fit, sizes)
    smallest = min((Recipe(model, own[0]) for model, own in sizes.items()), key=fit.costs.image_s)
    if not fit.begun and not request.smoke and (least := fit.costs.least_minutes(smallest)) > 1.5 * request.minutes:
        problem = f"{request.minutes:g} are too few for a single model on this machine, even of the smallest images"
        raise UserError(f"{problem}; give at least {math.ceil(least)}", field="--minutes")
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
    limit = fit.request.max_bytes or math.inf
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
    if (limit_s := fit.request.max_latency) is None:
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
        fit.experiment(usual_recipe(fit, recipe.model, recipe.image_size, LEAST_STEPS))
    except UserError as error:
        if error.field != MEMORY_OPTION:
            raise
        fit.tell(f"  {recipe.model} at {recipe.image_size} px: {error}")
        return error
    return None


def try_sizes(fit: Fit, allowed: Mapping[str, Sequence[int]]) -> list[SizeResult]:
    """Fit a regression at every size that fits its share of the time, the smallest first; earlier calls' are known.

    There is one in any case, unless nothing is to be learned from it: of made-up images, of an adapter that is there
    already, and of a class of one image.

    Raises:
        UserError: see `regress`.
    """
    request, costs, clock = fit.request, fit.costs, fit.limit.clock
    every = sorted((Recipe(model, size) for model, own in allowed.items() for size in own), key=costs.image_s)
    results, too_large, ends_at = list[SizeResult](), set[str](), clock() + SIZES_SHARE * 60 * request.minutes
    if request.smoke or request.start is not None or fit.images.shots < 2:
        return [SizeResult(one.model, one.image_size, None, 0) for one in every]
    compared = costs.compared_images(every)
    for probe in every:
        why = ""
        if probe.place not in fit.decisions.sizes:
            tried = [result for result in results if result.score is not None]
            if tried and clock() + costs.regression_s(probe, compared) > ends_at:
                why = NO_TIME
            elif probe.model in too_large:
                why = "a smaller one took more memory than is free"
            else:
                began_at = clock()
                try:
                    fit.once(fit.decisions.sizes, probe.place, partial(_score_of, fit, probe, compared))
                    taken_s = clock() - began_at
                    if fit.decisions.flips is None and request.augment != "none":
                        _choose_flips(fit, probe, taken_s, (ends_at - clock()) / 2)
                    if len(fit.decisions.sizes) == 1:
                        _choose_head_blocks(fit, every, taken_s, (ends_at - clock()) / 2)
                except Exception as error:
                    if not is_out_of_memory(error) or not tried:
                        raise
                    too_large.add(probe.model)
                    why = "it needs more memory than is free"
        score = fit.decisions.sizes.get(probe.place)
        results.append(SizeResult(probe.model, probe.image_size, score, 0, why=why))
        if score is not None:
            fit.tell(f"  linear probe at {probe.image_size} px: {fit.images.scores.text(score)}")
    for model in allowed:
        observed = {own.image_size: own.score for own in results if own.model == model and own.score is not None}
        posterior = posterior_by_size(observed, fit.images.alike * compared, fit.images.side) if observed else {}
        results = [
            replace(own, expected=posterior[own.image_size])
            if own.model == model and own.image_size in posterior
            else own
            for own in results
        ]
    return results


def _score_of(fit: Fit, probe: Recipe, compared: int) -> float:
    features_s, fits_s = compared * fit.costs.image_s(probe), fit.costs.fits_s(probe, compared, ways=1)
    found = _regress(fit, probe, "none")
    if found.features_s:
        fit.image_pace.add(found.features_s, features_s / fit.image_pace.factor)
    if found.fit_s:
        fit.fit_pace.add(found.fit_s, fits_s / fit.fit_pace.factor)
    return fit.images.scores.of(found.metrics)


def _choose_flips(fit: Fit, probe: Recipe, taken_s: float, left_s: float) -> None:
    """Choose how training images are flipped, by regressions, as far as there is time; else left-right.

    Args:
        fit: the fit.
        probe: a regression whose images are as they are, which is known.
        taken_s: that it took.
        left_s: for the others.
    """
    scores, found = fit.images.scores, dict[Flips, float]({"none": fit.decisions.sizes[probe.place]})
    for way, times in _OTHER_WAYS.items():
        left_s -= times * taken_s
        if left_s < 0:
            break
        found[way] = scores.of(_regress(fit, probe, way).metrics)
    ways: tuple[Flips, ...] = ("horizontal", "none", "both")  # of equal ones the first
    best: Flips = "horizontal"
    if len(found) > 1:
        best = max((way for way in ways if way in found), key=found.__getitem__)
        shown = ", ".join(f"{_FLIPPED[way]} {scores.text(score)}" for way, score in found.items())
        fit.tell(f"  training images {_FLIPPED[best]}: {shown} at {probe.image_size} px")
    fit.decisions.flips = best


def _choose_head_blocks(fit: Fit, every: Sequence[Recipe], taken_s: float, left_s: float) -> None:
    """Let heads read the last four blocks, if a regression on these is better and there is time for it in all runs.

    Args:
        fit: the fit.
        every: regressions at all sizes; the first is known, on the last block.
        taken_s: that it took.
        left_s: for the other.
    """
    probe, sizes, costs = every[0], fit.decisions.sizes, fit.costs
    if (
        fit.environment.regress is not None
        or fit.request.head_blocks is not None
        or METHODS[fit.request.method].uses_peft
        or not supports_head_blocks(architecture_of(fit.backbones[probe.model]))
        or _SLOWER * taken_s > left_s
        or _FITTED_RUNS * costs.fits_s(probe, fit.fold_train_images) > SIZES_SHARE * 60 * fit.request.minutes
    ):
        return
    more_bytes = 3 * 4 * costs.shape(probe).head_inputs * fit.images.num_outputs
    if any(costs.allowed_bits(one, more_bytes) != costs.allowed_bits(one) for one in every):
        return
    scores, of_last = fit.images.scores, sizes[probe.place]
    score = scores.of(_regress(fit, probe, "none", head_blocks=4).metrics)
    if better := score > of_last:
        sizes[probe.place] = score
    fit.decisions.head_blocks = 4 if better else 1
    fit.save()
    blocks, values = "last 4 blocks" if better else "last block", sorted((score, of_last), reverse=True)
    shown = " against ".join(map(scores.text, values))
    fit.tell(f"  the head reads the {blocks}: {shown} at {probe.image_size} px")


def _regress(
    fit: Fit, probe: Recipe, flips: Flips, *, half: bool = False, head_blocks: HeadBlocks | None = None
) -> Regression:
    compared = fit.decisions.compared_images or fit.images.num_dev
    experiment = {"name": "linear", "method": "linear", "training": fit.training(flips)}
    some = {"train_images": compared} if compared < fit.images.num_dev and fit.request.shots is None else {}
    study = fit.study("sizes", probe, [fit.request.seed], [experiment], folds=None, **some)
    if head_blocks is not None:
        study["backbone"]["head_blocks"] = head_blocks
    if fit.environment.regress is not None:
        return fit.environment.regress(study, fit.studies, half)
    fit.images.keep_pixels(study_from_mapping(study, file=fit.request.images))
    what = f"features of images at {probe.image_size} px"
    return regress(study, fit.studies, half, lambda done, count: fit.emit(Advanced(what, done, count)))


def gain_of_labels(fit: Fit, probe: Recipe) -> Interval | None:
    """Return by what share of its error twice as many labels lower a regression's; None: there are too few to tell."""

    def forecast() -> Interval | None:
        found, scores = _regress(fit, probe, "none", half=True), fit.images.scores
        if found.by_image_of_half is None:
            return None
        of_half, of_all = (scores.best - own / scores.deviation for own in (found.by_image_of_half, found.by_image))
        return gain_of_doubling(of_half, of_all, scores.image_weights(found.labels), share=1 - 1 / FOLDS, error=1.0)

    try:
        return fit.once(fit.decisions.more_labels, probe.place, forecast)
    except UserError:  # a class has one image in a half
        return None


# --- the first model --------------------------------------------------------------------------------------------------


def with_lengths(fit: Fit, sizes: Sequence[SizeResult]) -> list[SizeResult]:
    """Return sizes with the steps that fit what is left of the minutes; of one that was not tried, none do."""
    results = []
    for size in sizes:
        recipe = usual_recipe(fit, size.model, size.image_size, LEAST_STEPS)
        if size.why or recipe.is_probe or not fit.costs.fits_memory(recipe):
            results.append(size)
            continue
        steps, longer = fit.costs.lengths(recipe, fit.limit.left_s)
        last = fit.costs.last_steps(replace(recipe, steps=steps), longer) if steps else 0
        results.append(replace(size, steps=steps, longer=longer, last_steps=last))
    return results


def best_linear_probe(fit: Fit, sizes: Sequence[SizeResult]) -> SizeResult:
    """Return the size whose linear probe is expected to be the best of those that can be delivered in time."""
    tried = [size for size in sizes if size.score is not None] or list(sizes)
    ending = [size for size in tried if fit.ends_in_time(size.probe)] or tried[:1]
    return max(ending, key=lambda size: (size.expected, size.image_size if size.score is None else 0))


def choose_first(fit: Fit, sizes: Sequence[SizeResult]) -> tuple[Recipe, float]:
    """Return what is trained first, and how many times longer than on folds; decided once.

    That is the training or the regression that promises the most. What was asked for is trained, however little it
    promises, if it fits.
    """
    if fit.decisions.first is None:
        request, given = fit.request, fit.request.steps_for(fit.num_train)
        least = 3 if request.start is None else 2  # folds leave two; a training that starts from a run has none
        if given is not None and fit.images.shots < 2 and not request.is_probe:
            raise UserError("a class has a single image beside the test; add images", file=request.images)
        too_few = given is None and fit.images.shots < least
        fitting = [one for one in sizes if not too_few and one.steps and _memory_fault(fit, one.probe) is None]
        best_probe, best = best_linear_probe(fit, sizes), None
        if fitting:
            promising = max(fitting, key=lambda size: (size.promise, size.image_size if size.score is None else 0))
            best = usual_recipe(fit, promising.model, promising.image_size, promising.steps)
        if request.is_probe:
            chosen = usual_recipe(fit, best_probe.model, best_probe.image_size, 0), 1.0
        elif best is not None and (given is not None or promising.promise >= best_probe.expected):
            chosen = best, promising.longer
        else:
            why = "a linear probe promises more than the trainings that fit" if best else "no time to train"
            probes = "a class has fewer than 3 images to learn from, so it is a linear probe; add images"
            fit.tell(f"  {probes if too_few else f'{why}; give more --minutes'}")
            chosen = best_probe.probe, 1.0
        fit.decisions.first = chosen
        fit.save()
    recipe, longer = fit.decisions.first
    steps = fit.costs.last_steps(recipe, longer)
    about_s = fit.costs.features_s(recipe) + fit.costs.last_s(recipe, steps)
    length = "" if recipe.is_probe else f", {'up to ' if fit.num_validation else ''}{steps:,} steps"
    fit.tell(f"  to train: {recipe.title}{length}, about {duration(about_s)}")
    if about_s > fit.limit.left_s + fit.over_s:
        fit.tell(f"  that is more than is left of --minutes {fit.request.minutes:g}")
    return recipe, longer


def within_limits(fit: Fit, recipe: Recipe) -> Recipe:
    """Return a recipe, rounded after training as little as the limit of bytes asks for."""
    most = fit.request.max_bytes
    if most is None or fit.costs.bytes_of(recipe) <= most:
        return recipe
    return recipe.rounded((fit.costs.allowed_bits(recipe) or ["int2"])[0])


_LEAST_ON_FOLDS = 16  # steps: temperatures of so short trainings fit a longer one


def know_by_folds(fit: Fit, recipe: Recipe, probe: Recipe, limit: Limit) -> Recipe:
    """Train a recipe without a fold of the images each, beside a regression, as far as there is time.

    Returns:
        What was trained: the recipe, with as many fewer steps as three folds need to fit, or two.
    """
    fewer = [replace(recipe, steps=some) for some in range(recipe.steps - 8, _LEAST_ON_FOLDS - 1, -8)]
    options = [recipe] if recipe.is_probe or fit.request.steps_for(fit.num_train) else [recipe, *fewer]
    if known := [own for own in options if fit.frame.seeds(own)]:
        options = known
    for count in (FEWEST_FOLDS, FEWEST_FOLDS - 1):
        folds = range(min(count, fit.images.num_different))
        beside_s = 0.0 if probe == recipe else fit.seconds(probe, folds)
        needed_s = partial(fit.seconds, seeds=folds)
        if (trained := first_that_fits(options, needed_s, limit.left_s - beside_s)) is not None:
            fit.run(list(dict.fromkeys((trained, probe))), folds, limit)
            return trained
    return recipe


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
    possible = (size for size in others if _memory_fault(fit, size.probe) is None)
    return [*own, *islice(possible, max(2, len(best)) - len(own))]


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
        reserved_s = fit.ending_s(costs.longest_form(first), fit.longest_done(first))
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
    again_s = 0.0 if fit.longest_done(best) else fit.ending_s(costs.longest_form(best))
    limit = fit.until(again_s or costs.written_s(costs.longest_form(best)))
    _do(fit, best, _FEWEST, limit)
    forms = costs.allowed_bits(probe)
    fits = not ranked or FEWEST_FOLDS * costs.rounding_s(probe, forms) <= limit.left_s
    if fits and not clearly_better(frame, best, probe):
        fit.quantize(probe, forms, limit)
    if ranked and fit.seconds(best.half, _HALVED) <= limit.left_s:
        fit.run([best.half], _HALVED, limit)
    if (times := times_longer(fit, best)) > fit.longest_done(best) and not clearly_better(frame, probe, best):
        limit = fit.until(fit.ending_s(costs.longest_form(best), times))
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
    best = ranked[0]
    if best.bits is not None:
        return [best, probe]
    ranks = [replace(best, method="adalora", rate=rate_of("adalora", best.rate)), replace(best, rank=_SMALL_RANK)]
    second = [recipe for recipe in ranked[1:] if recipe != best.half][:1]
    packed = replace(best, method="qa_lora", rate=rate_of("qa_lora", best.rate), bits="nf4", when="training")
    return [best, probe, *second, *(ranks if fit.request.max_adapter_bytes is None else ()), packed]


# --- final ------------------------------------------------------------------------------------------------------------

_ENDLESS_S = 1e8


def train_last(fit: Fit, recipe: Recipe, longer: float) -> tuple[Outcome, Outcome]:
    """Train a recipe on everything that is not for the test, so many times longer than on folds.

    The test comes on top of the minutes, on images drawn at random where not all of them fit their share. Once for a
    size, since its other models are read on the same images; a call with more minutes reads no others.

    Returns:
        What it came to on the test images, and what the same run came to before its weights were rounded; where
        nothing is rounded after training, twice the same.

    Raises:
        EveryRunFailedError: if it failed.
    """
    trained, request, decisions = fit.final_recipe(recipe, longer), fit.request, fit.decisions
    is_done = (recipe.trained, longer) in decisions.trained
    tested = fit.once(decisions.tested_images, recipe.place, lambda: fit.costs.tested_images(recipe))
    if not is_done:
        fit.tell(fit.costs.test_line(recipe, tested))
    drawn = fit.images.num_test if request.test_images is None or request.smoke else tested
    some: dict[str, Any] = {"tested_images": tested} if tested < drawn else {}
    if request.shots is None and (count := fit.costs.trained_images(recipe)) < fit.num_train:
        some["train_images"] = fit.once(decisions.trained_images, recipe.place, lambda: count)
    name = f"final-{recipe.place}"
    if request.main_study:
        is_first = decisions.first is not None and recipe == decisions.first[0]
        name = fit.folder.name if is_first else f"{fit.folder.name[:46]}-probe-{recipe.image_size}px"
    some["validation_images"] = 0 if recipe.is_probe and not request.is_probe else fit.num_validation
    study = fit.study(name, recipe, [request.seed], [fit.experiment(trained, last=True)], folds=None, **some)
    study["measures"] |= {"features": True, "latency_batches": [1] if request.main_study else []}
    outcome = fit.run_alone(study, fit.until(-_ENDLESS_S))  # it has to be brought to its end
    if not is_done:
        decisions.trained.append((recipe.trained, longer))
        if not recipe.is_probe:
            fit.pace.add(outcome.seconds, fit.costs.last_s(recipe, trained.steps))
        fit.save()
    if recipe.when != "after" or recipe.bits is None:
        return outcome, outcome
    logits = fit.rounded_logits(outcome.folder, [recipe.bits])[recipe.bits]
    return replace(outcome, logits=np.asarray(logits, dtype=np.float64)), outcome
