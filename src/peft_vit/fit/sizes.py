"""Image sizes: which ones the limits allow, what a regression on frozen features has at each, and what fits the time.

Regressions on some of the images rise by about a factor of 1.4 while they fit 15 % of the minutes. At the first one it
is decided how training images are flipped, since digits are not to be flipped, and cells of a panel may be upside down;
and whether heads read four blocks.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from peft_vit.base.errors import UserError, is_out_of_memory
from peft_vit.base.statistics import Interval
from peft_vit.base.statistics.drawing import assign_folds
from peft_vit.base.statistics.more_labels import gain_of_doubling
from peft_vit.core.backbones import architecture_of, supports_head_blocks
from peft_vit.core.config import Flips, HeadBlocks, Resize, study_from_mapping, type_of_bits
from peft_vit.core.methods import METHODS
from peft_vit.core.records import Metrics
from peft_vit.core.tasks import Labels, Scores, expected_gain, metric_of
from peft_vit.core.training import Features, can_hold_out, groups_left_out, head_inputs, held_out_fit, loss_weights
from peft_vit.deploy.page.formatting import joined
from peft_vit.fit.costs import LEAST_STEPS, LONG_S, SIZES_SHARE
from peft_vit.fit.decide import posterior_by_size
from peft_vit.fit.fit import MEMORY_OPTION, Fit
from peft_vit.fit.intake import sizes_to_try
from peft_vit.fit.recipe import ROUNDED, Recipe, peak_of
from peft_vit.fit.request import Advanced
from peft_vit.runs.costs.time_limit import FOLDS, Pace
from peft_vit.runs.execute import Loaded
from peft_vit.runs.head_init import SharedFeatures
from peft_vit.runs.scheduling.plan import plan_study
from peft_vit.runs.this_machine.machine import cpu_count, torch_threads

NO_TIME = "no time for it"
_FITTED_RUNS = 8  # that fit a head, usually: on folds, and the last, of what is trained and of the regression
_FURTHER = 0.5  # of the rate, where a training goes on with new images; see docs/how_to/more_images.md
_TIMED = 16  # images by which a size's pace is known whose features are in the cache
_OBLONG = 1.2  # times as long as short, from which on it matters how an image becomes square
_OBLONG_SHARE = 0.1  # of images
# What all runs do alike, by field of `Decisions`: ways in words, and how many times longer their regressions take; 0:
# it is known. Of equally good ones the first is taken.
_WAYS: Mapping[str, tuple[str, Mapping[Any, tuple[str, int]]]] = {
    "resize": (
        "images become square by",
        {"squash": ("squash", 0), "letterbox": ("letterbox", 1), "crop": ("crop", 1)},
    ),
    "flips": (
        "training images",
        {"horizontal": ("flipped left-right", 2), "none": ("as they are", 0), "both": ("flipped both ways", 4)},
    ),
    "head_blocks": ("the head reads the", {1: ("last block", 0), 4: ("last 4 blocks", 2)}),
}


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
    score: float | None = None
    steps: int = 0
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


def usual_recipe(fit: Fit, model: str, image_size: int, steps: int = LEAST_STEPS) -> Recipe:
    """Return what was asked for, or LoRA of the usual rank, with so many steps on a fold."""
    request = fit.request
    recipe = Recipe(model, image_size, request.method, rank=request.rank or 0, steps=0 if request.is_probe else steps)
    if request.method.startswith("qa_"):
        recipe = replace(recipe, bits=type_of_bits(request.bits or "4"), when="training")
    if request.is_probe:
        return recipe
    if request.max_bytes is not None and "int2" in fit.costs.allowed_bits(recipe):  # rounding to it loses too much
        recipe = replace(recipe, method="qa_lora", bits="int2", when="training")
    if request.learning_rate is not None:
        return replace(recipe, rate=request.learning_rate)
    options = recipe.options(fit.shape(model, image_size), **request.adapter_options)
    rate = peak_of(METHODS[recipe.method].learning_rate_for(options))
    return replace(recipe, rate=rate if request.from_run is None else _FURTHER * rate)


# --- within the limits ------------------------------------------------------------------------------------------------


def allowed_sizes(fit: Fit) -> dict[str, list[int]]:
    """Return the image sizes that are allowed by model, after refusing what nothing meets.

    Raises:
        UserError: for a limit that nothing meets, a model that does not take a size, and what planning refuses.
    """
    request, costs = fit.request, fit.costs
    for model, size in itertools.product(fit.backbones, request.image_sizes):
        fit.shape(model, size)  # raises UserError if the model does not take it
    sizes = {
        model: sorted(request.image_sizes) or sizes_to_try(architecture_of(backbone))
        for model, backbone in fit.backbones.items()
    }
    for model, own in sizes.items():
        _refuse_what_fails(fit, model, own[0])
    if request.max_bytes is not None:
        sizes = within_bytes(fit, sizes)
    if request.max_latency is not None:
        sizes = _within_latency(fit, sizes, request.max_latency)
    smallest = min((Recipe(model, own[0]) for model, own in sizes.items()), key=costs.image_s)
    least = (costs.features_s(smallest) + costs.ending_s(smallest)) / 60  # minutes of its regression alone
    if not fit.begun and not request.smoke and least > 1.5 * request.minutes:
        problem = f"{request.minutes:g} are too few for a single model on this machine, even of the smallest images"
        raise UserError(f"{problem}; give at least {math.ceil(least)}", field="--minutes")
    return sizes


def _refuse_what_fails(fit: Fit, model: str, image_size: int) -> None:
    """Plan what was asked for, of a model; raises UserError for what would fail later."""
    request = fit.request
    recipe = usual_recipe(fit, model, image_size, request.steps_for(fit.num_train) or LEAST_STEPS)
    try:
        experiment = fit.experiment(recipe)
    except UserError as error:
        is_of_adapter = request.max_adapter_bytes is not None and error.field == "--adapter-bytes"
        raise error.about("--max-adapter-bytes") if is_of_adapter else error from None
    if "memory_limit" not in experiment["training"]:  # else it was planned to find what keeps within it
        study = fit.study("asked-for", recipe, [request.seed], [experiment], folds=None)
        plan_study(study_from_mapping(study, file=request.images), fit.studies, file=None, smoke=request.smoke)


def within_bytes(fit: Fit, sizes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return the sizes of each model at which some form keeps within the limit; 2 bits alone do if no size has more.

    Raises:
        UserError: if none does, with the least that would do.
    """
    costs, found = fit.costs, dict[str, list[int]]()
    for model, own in sizes.items():
        bits = {size: costs.allowed_bits(Recipe(model, size)) for size in own}
        kept = [size for size in own if bits[size] not in ([], ["int2"])] or [size for size in own if bits[size]]
        if kept:
            found[model] = kept
        if left := [f"{size} px" for size in own if size not in kept]:
            fit.emit(f"  {model} at {joined(left)}: left out, more than --max-bytes, but for 2 bits at most")
    if not found:
        probes = (Recipe(model, size) for model, own in sizes.items() for size in own)
        least = min((form for one in probes for form in (one, *map(one.rounded, ROUNDED))), key=costs.bytes_of)
        raise UserError(
            f"{round((fit.request.max_bytes or 0) / 1e5) / 10:g} MB is less than any model here takes; the least that "
            f"would do is {math.ceil(costs.bytes_of(least) / 1e5) / 10:g} MB, {least.bits or 'float'} weights of "
            f"{least.model}",
            field="--max-bytes",
        )
    return found


def _within_latency(fit: Fit, sizes: Mapping[str, list[int]], limit_s: float) -> dict[str, list[int]]:
    """Return the sizes of each model at which an exported one is fast enough, by its architecture with any weights.

    The largest is timed; of the others those that multiply so much less that they should be fast enough, from the
    largest down until one is.

    Raises:
        UserError: if none is at any size, with the least that would do.
    """
    found, timed = dict[str, list[int]](), list[tuple[float, str, int]]()
    for model, own in sizes.items():
        given = fit.images.index.class_names, cpu_count()  # all processors, as what is left is measured
        pace = 0.0  # seconds a product, at the fastest size so far
        for size in sorted(own, reverse=True):
            products = fit.shape(model, size).multiply_adds
            if size > min(own) and pace * products > limit_s:
                continue
            time_it = partial(fit.environment.time_export, architecture_of(fit.backbones[model]), size, *given)
            seconds = fit.once(fit.decisions.latency_s, f"{model} {size}", time_it)
            fit.emit(f"  {model} at {size} px: {1000 * seconds:.1f} ms an image")
            timed.append((seconds, model, size))
            pace = seconds / products
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


def within_memory(fit: Fit, probe: Recipe) -> bool:
    """Tell whether LoRA trains within the limit of memory at a regression's size, and say if it does not."""
    try:
        fit.experiment(usual_recipe(fit, probe.model, probe.image_size))
    except UserError as error:
        if error.field != MEMORY_OPTION:
            raise
        fit.emit(f"  {probe.model} at {probe.image_size} px: {error}")
        return False
    return True


# --- regressions ------------------------------------------------------------------------------------------------------


def try_sizes(fit: Fit, allowed: Mapping[str, Sequence[int]]) -> list[SizeResult]:
    """Fit a regression at every size that fits its share of the time, the smallest first; earlier calls' are known.

    There is one in any case, unless nothing is to be learned from it: of made-up images, of an adapter that is there
    already, and of a class of one image.

    Raises:
        UserError: see `regress`.
    """
    request, costs, scores, clock = fit.request, fit.costs, fit.decisions.sizes, fit.limit.clock
    every = sorted((Recipe(model, size) for model, own in allowed.items() for size in own), key=costs.image_s)
    if request.smoke or request.start is not None or fit.images.shots < 2:
        return [SizeResult(one.model, one.image_size) for one in every]
    why, ends_at = dict[Recipe, str](), clock() + SIZES_SHARE * 60 * request.minutes
    compared, tried = costs.compared_images(every), dict[Recipe, float]()
    for probe in every:
        if probe.place not in scores and probe not in why:
            regression_s = compared * costs.image_s(probe) + costs.fits_s(probe, compared, ways=1)
            if tried and clock() + regression_s > ends_at:
                why[probe] = NO_TIME
                continue
            try:
                _score(fit, probe, every, ends_at)
            except Exception as error:
                if not is_out_of_memory(error) or not tried:
                    raise
                too_large = (one for one in every if one.model == probe.model and one.place not in scores)
                why |= dict.fromkeys(too_large, "it needs more memory than is free")
        if probe not in why:
            tried[probe] = scores[probe.place]
            fit.emit(f"  linear probe at {probe.image_size} px: {fit.images.scores.text(tried[probe])}")
    images, expected = fit.images.effective_share * compared, dict[Recipe, float]()
    for model in allowed:
        observed = {probe.image_size: score for probe, score in tried.items() if probe.model == model}
        posterior = posterior_by_size(observed, images, fit.images.inspection.shorter_side) if observed else {}
        expected |= {Recipe(model, size): score for size, score in posterior.items()}
    return [
        SizeResult(one.model, one.image_size, tried.get(one), why=why.get(one, ""), expected=expected.get(one, 0.0))
        for one in every
    ]


def _score(fit: Fit, probe: Recipe, every: Sequence[Recipe], ends_at: float) -> None:
    """Decide on the score of a regression, and with the first one on what all runs do alike."""
    costs, decisions, clock = fit.costs, fit.decisions, fit.limit.clock
    began_at, compared = clock(), costs.compared_images(every)
    found = _regress(fit, probe)
    if found.features_s:
        planned_s = compared * costs.machine.image_s(costs.shape(probe))
        fit.image_paces.setdefault(probe.place, Pace()).add(found.features_s, planned_s)
    if found.fit_s:
        fit.fit_pace.add(found.fit_s, costs.fits_s(probe, compared, ways=1) / fit.fit_pace.factor)
    decisions.sizes[probe.place] = fit.images.scores.of(found.metrics)
    fit.save()
    is_first, choose = len(decisions.sizes) == 1, partial(_choose, fit, probe, clock() - began_at, ends_at)
    if is_first and fit.request.resize is None and not fit.request.main_study:
        shorter, longer = fit.images.inspection.sides.T
        if np.mean(longer > _OBLONG * shorter) >= _OBLONG_SHARE:
            found = choose("resize", found, errors=1.0)
    if decisions.flips is None and fit.request.augment != "none":
        choose("flips", found)
        decisions.flips = decisions.flips or "horizontal"  # there was no time
    if is_first and _may_read_blocks(fit, every):
        choose("head_blocks", found)


def _choose(
    fit: Fit, probe: Recipe, taken_s: float, ends_at: float, setting: str, known: Regression, errors: float = 0.0
) -> Regression:
    """Choose how all runs do something, by regressions at the first size, and return what the best way has.

    The others are tried as far as half of the time allows; if none is, nothing is decided.

    Args:
        fit: the fit.
        probe: a regression at the first size.
        taken_s: that it took.
        ends_at: when the time for regressions is over.
        setting: of which `_WAYS` has the ways.
        known: what the first way has.
        errors: by how many standard errors of the paired difference another way has to be better.
    """
    said, ways = _WAYS[setting]
    scores, left_s = fit.images.scores, (ends_at - fit.limit.clock()) / 2
    first, *others = sorted(ways, key=lambda way: ways[way][1])
    found = {first: known}
    for way in others:
        left_s -= ways[way][1] * taken_s
        if left_s < 0:
            break
        found[way] = _regress(fit, probe, **{setting: way})
    if len(found) == 1:
        return known
    score = {way: scores.of(one.metrics) for way, one in found.items()}

    def lower_end(way: Any) -> float:
        gains = (found[way].by_image.astype(float) - known.by_image) / scores.deviation  # (N,)
        return score[way] - errors * float(gains.std()) / math.sqrt(len(gains))

    best = max((way for way in ways if way in found), key=lower_end)
    shown = ", ".join(f"{ways[way][0]} {scores.text(score[way])}" for way in found)
    fit.emit(f"  {said} {ways[best][0]}: {shown} at {probe.image_size} px")
    setattr(fit.decisions, setting, best)
    if setting != "flips":  # which other sizes' regressions do without
        fit.decisions.sizes[probe.place] = score[best]
    fit.save()
    return found[best]


def _may_read_blocks(fit: Fit, every: Sequence[Recipe]) -> bool:
    """Tell whether heads can read four blocks, with time for it in all runs and the same formats at all sizes."""
    probe, costs = every[0], fit.costs
    if (
        fit.environment.regress is not None
        or fit.request.head_blocks is not None
        or METHODS[fit.request.method].uses_peft
        or not supports_head_blocks(architecture_of(fit.backbones[probe.model]))
        or _FITTED_RUNS * costs.fits_s(probe, fit.fold_train_images) > SIZES_SHARE * 60 * fit.request.minutes
    ):
        return False
    more_bytes = 3 * 4 * costs.shape(probe).head_inputs * fit.images.num_outputs
    return all(costs.allowed_bits(one, more_bytes) == costs.allowed_bits(one) for one in every)


def gain_of_labels(fit: Fit, probe: Recipe) -> Interval | None:
    """Return by what share of its error twice as many labels lower a regression's; None: there are too few to tell."""

    def forecast() -> Interval | None:
        found, scores = _regress(fit, probe, half=True), fit.images.scores
        if found.by_image_of_half is None:
            return None
        of_half, of_all = (scores.best - own / scores.deviation for own in (found.by_image_of_half, found.by_image))
        return gain_of_doubling(of_half, of_all, scores.image_weights(found.labels), share=1 - 1 / FOLDS, error=1.0)

    try:
        return fit.once(fit.decisions.more_labels, probe.place, forecast)
    except UserError:  # a class has one image in a half
        return None


def _regress(
    fit: Fit,
    probe: Recipe,
    *,
    half: bool = False,
    flips: Flips = "none",
    head_blocks: HeadBlocks | None = None,
    resize: Resize | None = None,
) -> Regression:
    compared = fit.decisions.compared_images or fit.images.num_dev
    experiment = {"name": "linear", "method": "linear", "training": fit.training(flips)}
    data: dict[str, Any] = {} if resize is None else {"resize": resize}
    if compared < fit.images.num_dev and fit.request.shots is None:
        data["train_images"] = compared
    study = fit.study("sizes", probe, [fit.request.seed], [experiment], folds=None, **data)
    if head_blocks is not None:
        study["backbone"]["head_blocks"] = head_blocks
    if fit.environment.regress is not None:
        return fit.environment.regress(study, fit.studies, half)
    fit.images.keep_pixels(study_from_mapping(study, file=fit.request.images))
    what = f"features of images at {probe.image_size} px"
    with torch_threads(fit.file.threads):  # as runs have
        return regress(study, fit.studies, half, lambda done, count: fit.emit(Advanced(what, done, count)))


@dataclass(frozen=True)
class Regression:
    """What a regression on frozen features has, on images that are left out of its fit.

    Attributes:
        metrics: on these images.
        labels: of the images, N.
        by_image: per-image terms of the metric that decides, (N,), whose mean it is.
        by_image_of_half: the same terms with half of the images to learn from; None: that was not asked for.
        features_s: that its features took, or would if none were in the cache; 0: nobody has looked.
        fit_s: that its fits took, likewise; 0: nobody has looked.
    """

    metrics: Metrics
    labels: Labels
    by_image: NDArray[Any]
    by_image_of_half: NDArray[Any] | None = None
    features_s: float = 0.0
    fit_s: float = 0.0


def regress(
    study: Mapping[str, Any], results_dir: Path, half: bool, on_progress: Callable[[int, int], None] | None = None
) -> Regression:
    """Fit a regression to the training images of a study's only run, here, in every way in which these are flipped.

    The penalty is chosen on images that are left out of its fit in turn.

    Args:
        study: of the method `linear`, without folds; nothing validates, no test image is read.
        results_dir: of the study; nothing is written.
        half: fit to half of the images, too, where each class has enough.
        on_progress: gets how many features are there, and of how many.

    Raises:
        UserError: as `load_data`, `load_run_backbone`.
    """
    (run,) = plan_study(study_from_mapping(dict(study), file=study["name"]), results_dir, file=None).runs
    spec = run.spec
    loaded = Loaded.of(spec, test=False)
    data, model = loaded.data, loaded.backbone.model.requires_grad_(False)
    shared = SharedFeatures(model, spec, loaded.made_ready(), [], loaded.runtime, data.task, on_progress)
    began = time.perf_counter()
    features = shared.of_training(data.train)
    computed = time.perf_counter()
    weights = loss_weights(spec.experiment.training, data, torch.device("cpu"))
    class_weights = None if weights is None else weights.double().numpy()
    task, labels, strata = data.task, data.train.labels, data.task.strata(data.train.labels)
    groups = groups_left_out(strata, data.groups[data.train.positions])
    scores, by_image_of_half = Scores(task, metric_of(spec)), None

    def held_out(part: NDArray[np.bool_]) -> NDArray[np.float64]:
        chosen = np.tile(part, len(features.labels) // len(groups))  # in every way
        own, l2 = Features(features.values[chosen], features.labels[chosen], task), spec.experiment.probe_l2
        return held_out_fit(own, groups[part], scores.metric, class_weights=class_weights, l2=l2)[1]

    logits = held_out(np.ones(len(groups), dtype=bool))  # (N, classes)
    if half:
        first = assign_folds(strata, groups, 2, np.random.default_rng(0)) == 0
        parts = [first, ~first]
        if all(can_hold_out(strata[part], groups[part]) for part in parts):
            halves = np.empty_like(logits)
            for part in parts:
                halves[part] = held_out(part)
            by_image_of_half = scores.by_image(halves, labels)
    by_image, fit_s = scores.by_image(logits, labels), time.perf_counter() - computed
    features_s = computed - began
    if shared.computed < len(features.labels):  # the others were in the cache: a few are timed, after one to get ready
        few = data.train.chosen(np.arange(min(_TIMED, len(data.train))))
        head_inputs(model, few.chosen(np.arange(1)), loaded.runtime, 1)
        began = time.perf_counter()
        head_inputs(model, few, loaded.runtime, len(few))
        features_s = len(features.labels) * (time.perf_counter() - began) / len(few)
    return Regression(task.measure(logits, labels), labels, by_image, by_image_of_half, features_s, fit_s)


# --- what fits the time -----------------------------------------------------------------------------------------------


def with_length(fit: Fit, size: SizeResult) -> SizeResult:
    """Return a size with the steps that fit what is left of the minutes; of one that was not tried, none do."""
    recipe = usual_recipe(fit, size.model, size.image_size)
    if size.why or recipe.is_probe or not fit.costs.fits_memory(recipe):
        return size
    left_s = fit.limit.left_s
    if not fit.request.main_study and fit.decisions.delivered is None and fit.request.last_share * left_s > LONG_S:
        left_s -= fit.costs.ending_s(size.probe)  # which is written before
    steps, longer = fit.costs.lengths(recipe, left_s)
    last = fit.costs.last_steps(replace(recipe, steps=steps), longer) if steps else 0
    return replace(size, steps=steps, longer=longer, last_steps=last)


def best_linear_probe(fit: Fit, sizes: Sequence[SizeResult]) -> SizeResult:
    """Return the size whose linear probe is expected to be the best of those that can be delivered in time."""
    tried = [size for size in sizes if size.score is not None] or list(sizes)
    ending = [size for size in tried if fit.ends_in_time(size.probe)] or tried[:1]
    return max(ending, key=lambda size: (size.expected, size.image_size if size.score is None else 0))
