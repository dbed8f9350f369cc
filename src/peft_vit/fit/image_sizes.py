"""A regression on frozen features at several image sizes: where training is worth its time, and what it has to beat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from peft_vit.base.console import OnProgress
from peft_vit.base.errors import is_out_of_memory
from peft_vit.base.statistics.drawing import deal_folds
from peft_vit.core.backbones import Architecture, Backbone, Head, native_size, size_step_of
from peft_vit.core.config import study_from_mapping
from peft_vit.core.records import RunSpec
from peft_vit.core.tasks import DecidingMetric, Labels, Scores, expected_gain, metric_of
from peft_vit.core.training import Features, RuntimeConfig, can_hold_out, fit_probe, held_out_fit, loss_weights
from peft_vit.runs.costs.time_limit import Pace
from peft_vit.runs.execute import Loaded
from peft_vit.runs.head_init import SharedFeatures
from peft_vit.runs.scheduling.plan import plan_study

_SMALLEST, _LARGEST = 56, 640  # pixels
_FEWEST, _FEW = 300, 1500  # images by which sizes can be compared; up to which folds are worth their fits
_RISE, _SPREAD, _SMOOTH = 0.0075, 0.015, 1.0  # of regressions over sizes, see `on_new_images`
_UPSCALED = 4  # times its own side, up to where a larger image helps


@dataclass(frozen=True)
class SizeTrial:
    """What a regression has at an image size.

    Attributes:
        image_size: in pixels.
        value: of the metric that decides, as a share, on images left out of the fit; larger is better. Of an error it
            is another measure, which no model's error may be compared with.
        signed: the metric's own, larger of the better one: an error is negative.
        text: the value as a terminal shows it.
        l2: strength of the penalty that has it.
        images: that it is from, see `DecidingMetric.images_alike`.
        pace: how many times longer it took than was expected; None: features were there already, so nobody knows.
    """

    image_size: int
    value: float
    signed: float
    text: str
    l2: float
    images: float
    pace: float | None = None


def sizes_to_try(architecture: Architecture) -> list[int]:
    """Return image sizes that a model takes, rising by about the square root of 2 up to its own, which is the last."""
    step, native = size_step_of(architecture), native_size(architecture)
    smallest = max(_SMALLEST, 2 * step)
    wished = [smallest * 2 ** (power / 2) for power in range(12)]
    sizes = {round(side / step) * step for side in wished if side < min(native, _LARGEST) / 1.1}
    return sorted({*sizes, *([native] if native <= _LARGEST else [])}) or [native]


def on_new_images(values: Mapping[int, float], images: float, side: float) -> dict[int, float]:
    """Return what regressions may have on other images: their values on few, with what is known of sizes beforehand.

    With x = 2 log2(size), steps of the square root of 2, the values v of the sizes are a Gaussian process with the
    mean a x up to four times the images' own side and flat from there, about mean(v); the covariance
    s^2 exp(-(x - x')^2 / 2 c^2); and the noise v (1 - v) / 2 n of each: sizes share their images, so about half of a
    share's variance is in their differences. a = 0.75 points, s = 1.5 points, c = 1 step fit what regressions of ELPV,
    digits, Fashion-MNIST and two sets of drawings had on 400 and more test images at 12 to 50 labels a class. The size
    that is best here has 0.9 points more there on average than the size of the best value. Twice or half of a, s and
    c do as well within 0.5. Of errors in standard deviations, which are values below 0, the variance is v^2 / 2 n
    instead: about that of a mean absolute error v of normal ones, 0.57 v^2 / n, or of a root of their mean square.

    Args:
        values: by image size, as shares or minus errors, S of them.
        images: n, that they are from, see `DecidingMetric.images_alike`.
        side: the shorter one of the images themselves, in pixels.
    """
    sizes, seen = np.array(list(values)), np.array(list(values.values()))  # (S,) each
    steps, rising = 2 * np.log2(sizes), 2 * np.log2(np.minimum(sizes, _UPSCALED * side))
    before = seen.mean() + _RISE * (rising - rising.mean())
    covariance = _SPREAD**2 * np.exp(-((steps[:, None] - steps) ** 2) / (2 * _SMOOTH**2))  # (S, S)
    best = float(seen.max())
    share = min(max(best, 0.5 / images), 1 - 0.5 / images)
    variance = best**2 / 2 if best < 0 else share * (1 - share)  # an error is negative
    noise = variance / (2 * images) * np.eye(len(sizes))
    told = before + covariance @ np.linalg.solve(covariance + noise, seen - before)
    return dict(zip(values, told.tolist(), strict=True))


def gain_over(values: Mapping[int, float], other: int, own: int, steps: int, images: float, side: float) -> float:
    """Return what training may have more than the regression of another size on other images, a share; at least 0.

    Args:
        values: of regressions by image size, as shares; see `on_new_images`, also for `images` and `side`.
        other: size of the regression.
        own: size of the training.
        steps: of the training.
    """
    told = on_new_images(values, images, side)
    ahead = told[other] - told[own] if {other, own} <= told.keys() else 0.0
    return max(0.0, expected_gain(steps) - ahead)


def try_sizes(
    spec_of: Callable[[int], RunSpec],
    expected_s: Mapping[int, float],
    limit_s: float,
    log: Callable[[str], None],
    on_progress: OnProgress | None = None,
) -> list[SizeTrial]:
    """Fit regressions at rising sizes while the next one fits memory and, at the pace so far, ends in time.

    Images that train and validate are read, none that test. Features stay in the cache, where the run finds them.

    Args:
        spec_of: a run of the method `linear` at a size.
        expected_s: what each size takes, rising, in pixels.
        limit_s: for all of them.
        log: gets a line each.
        on_progress: gets how far the features of a size are.

    Raises:
        UserError: as `load_data`, `load_run_backbone`.
    """
    trials: list[SizeTrial] = []
    started = time.perf_counter()
    pace = Pace()
    for size, seconds in expected_s.items():
        began = time.perf_counter()
        if trials and began - started + pace.factor * seconds > limit_s:
            break
        try:
            on_images = None if on_progress is None else partial(on_progress, what=f"features of images at {size} px")
            trial, is_new = _trial(spec_of(size), on_images)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log(f"  {size} px need more memory than is free here: no larger size is tried.")
            break
        log(f"  regression on frozen features of {size} px: {trial.text} on images left out of its fit")
        taken_s = time.perf_counter() - began
        if is_new:
            pace.add(taken_s, seconds)
        trials.append(replace(trial, pace=taken_s / seconds if is_new else None))
    return trials


def _trial(spec: RunSpec, on_progress: Callable[[int, int], None] | None) -> tuple[SizeTrial, bool]:
    """Return what the regression has, and whether its features were computed for it."""
    seen = seen_by_head(spec, on_progress=on_progress)
    features, metric, weights, strengths = seen.features, seen.metric, seen.class_weights, spec.experiment.probe_l2
    if len(features.labels) <= _FEW and can_hold_out(features.task.strata(features.labels), seen.groups):
        l2, logits = held_out_fit(features, seen.groups, metric, class_weights=weights, l2=strengths)
        labels, metrics = features.labels, features.task.measure(logits, features.labels)
    else:
        train, validation = (
            Features(features.values[part], features.labels[part], features.task)
            for part in (slice(0, seen.train_images), slice(seen.train_images, None))
        )
        probe = fit_probe(train, validation, seen.head, seen.runtime, metric, class_weights=weights, l2=strengths)
        assert probe.chosen is not None
        l2, labels, metrics = probe.fit.chosen_l2, validation.labels, probe.chosen.metrics
    value, images = metric.of(metrics), metric.images_alike(labels)
    trial = SizeTrial(
        spec.data.image_size, metric.share_of(metrics), metric.sign * value, metric.text(value), l2, images
    )
    return trial, seen.is_new


def images_to_compare(images: int, rarest: float, fitting: float) -> int:
    """Return by how many of some images sizes are compared, if regressions on so many are worth their time.

    There are three images of the rarest class among them, or its folds could not be made.
    """
    return min(images, max(_FEWEST, min(_FEW, int(fitting)), math.ceil(3 * images / max(1, rarest))))


@dataclass(frozen=True)
class SeenByHead:
    """What a linear head sees of a run's images.

    Attributes:
        features: of training images in every way that was asked for, one way after the other, then of validation
            images as they are.
        groups: of the images, (n,), those with equal ones are copies.
        train_images: how many of them train.
        metric: that decides.
        class_weights: on the loss; None: all 1.
        head: of the model.
        runtime: likewise.
        is_new: none of the features was in the cache.
    """

    features: Features
    groups: NDArray[np.int64]
    train_images: int
    metric: DecidingMetric
    class_weights: NDArray[np.float64] | None
    head: Head
    runtime: RuntimeConfig
    is_new: bool


def seen_by_head(
    spec: RunSpec, *, flipped: bool = False, on_progress: Callable[[int, int], None] | None = None
) -> SeenByHead:
    """Compute the features of a run's training and validation images, or look them up; no test image is read.

    Args:
        spec: of the method `linear`.
        flipped: training images come in every way in which training shows them.
        on_progress: see `SharedFeatures`.

    Raises:
        UserError: as `load_data`, `load_run_backbone`.
    """
    loaded = Loaded.of(spec, test=False)
    data, model, runtime = loaded.data, loaded.backbone.model.requires_grad_(False), loaded.runtime
    shared = SharedFeatures(model, spec, loaded.made_ready(), [], runtime, data.task, on_progress)
    parts = [shared.of_training(data.train) if flipped else shared.of(data.train)]
    if len(data.validation):
        parts.append(shared.of(data.validation))
    values, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("values", "labels"))
    weights = loss_weights(spec.experiment.training, data, torch.device("cpu"))
    return SeenByHead(
        features=Features(values, labels, data.task),
        groups=data.groups[np.concatenate([data.train.positions, data.validation.positions])],
        train_images=len(data.train),
        metric=metric_of(spec),
        class_weights=None if weights is None else weights.double().numpy(),
        head=Backbone(model).head,
        runtime=runtime,
        is_new=shared.computed == len(values),
    )


@dataclass(frozen=True)
class Regression:
    """What a regression on frozen features has, on images that are left out of its fit in turn.

    Attributes:
        value: of the metric that decides; larger is better.
        labels: of the images, N.
        brought: what each brings to it, (N,), see `DecidingMetric.by_image`: of accuracy 1 if it is right.
        brought_by_half: likewise with half of the images to learn from; None: that was not asked for.
    """

    value: float
    labels: Labels
    brought: NDArray[Any]
    brought_by_half: NDArray[Any] | None = None


def regress(study: Mapping[str, Any], results_dir: Path, half: bool) -> Regression:
    """Fit a regression to the training images of a study's only run, here, the penalty chosen on images left out of it.

    Args:
        study: of the method `linear`, without folds; nothing validates.
        results_dir: of the study; nothing is written.
        half: with half of the images to learn from, too, where each class has enough.

    Raises:
        UserError: as `load_data`, `load_run_backbone`; and if a class has one image alone.
    """
    plan = plan_study(study_from_mapping(dict(study), file=study["name"]), results_dir, file=None)
    seen = seen_by_head(plan.runs[0].spec, flipped=True)
    features, groups, task = seen.features, seen.groups, seen.features.task
    labels, ways = features.labels[: len(groups)], len(features.labels) // len(groups)

    def logits_of(part: NDArray[np.bool_]) -> NDArray[np.float64]:
        chosen = np.tile(part, ways)
        own = Features(features.values[chosen], features.labels[chosen], task)
        return held_out_fit(own, groups[part], seen.metric, class_weights=seen.class_weights)[1]

    scores = Scores(task, seen.metric)
    whole = logits_of(np.ones(len(groups), dtype=bool))  # (N, classes)
    brought_by_half = None
    if half:
        part_of = deal_folds(task.strata(labels), groups, 2, np.random.default_rng(0))
        parts = [part_of == number for number in range(2)]
        if all(can_hold_out(task.strata(labels[part]), groups[part]) for part in parts):
            halves = np.empty_like(whole)
            for part in parts:
                halves[part] = logits_of(part)
            brought_by_half = scores.by_image(halves, labels)
    value = scores.of(task.measure(whole, labels))
    return Regression(value, labels, scores.by_image(whole, labels), brought_by_half)
