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
from peft_vit.base.statistics.drawing import assign_folds
from peft_vit.core.backbones import Architecture, Backbone, Head, native_size, size_step_of
from peft_vit.core.config import study_from_mapping
from peft_vit.core.records import Metrics, RunSpec
from peft_vit.core.tasks import DecidingMetric, Labels, Scores, metric_of
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
class Regression:
    """What a regression on frozen features has, on images that are left out of its fit.

    Attributes:
        metrics: on these images.
        metric: that decides.
        l2: strength of the penalty that has them.
        labels: of the images, N.
        by_image: per-image terms of the metric, (N,), whose mean it is; none where validation images chose the penalty.
        by_image_of_half: the same terms with half of the images to learn from; None: that was not asked for.
        is_new: its features were computed for it, none was in the cache.
        pace: how many times longer it took than was expected; None: nobody knows, since features were there.
    """

    metrics: Metrics
    metric: DecidingMetric
    l2: float
    labels: Labels
    by_image: NDArray[Any]
    by_image_of_half: NDArray[Any] | None = None
    is_new: bool = False
    pace: float | None = None

    @property
    def value(self) -> float:
        """Return the metric that decides; larger is better: an error is negative."""
        return self.metric.sign * self.metric.of(self.metrics)

    @property
    def share(self) -> float:
        """Return what is larger of the better one, as a share; of an error it is another measure, such as R2."""
        return self.metric.share_of(self.metrics)

    @property
    def text(self) -> str:
        """Return the metric as a terminal shows it."""
        return self.metric.text(self.metric.of(self.metrics))

    @property
    def images(self) -> float:
        """Return how many images it is from, see `DecidingMetric.images_alike`."""
        return self.metric.images_alike(self.labels)


def sizes_to_try(architecture: Architecture) -> list[int]:
    """Return image sizes that a model takes, rising by about the square root of 2 up to its own, which is the last."""
    step, native = size_step_of(architecture), native_size(architecture)
    smallest = max(_SMALLEST, 2 * step)
    wished = [smallest * 2 ** (power / 2) for power in range(12)]
    sizes = {round(side / step) * step for side in wished if side < min(native, _LARGEST) / 1.1}
    return sorted({*sizes, *([native] if native <= _LARGEST else [])}) or [native]


def try_sizes(
    spec_of: Callable[[int], RunSpec],
    expected_s: Mapping[int, float],
    limit_s: float,
    tell: Callable[[str], None],
    on_progress: OnProgress | None = None,
) -> dict[int, Regression]:
    """Fit regressions at rising sizes while the next one fits memory and, at the pace so far, ends in time.

    Images that train and validate are read, none that test. Features stay in the cache, where the run finds them.

    Args:
        spec_of: a run of the method `linear` at a size.
        expected_s: what each size takes, rising, in pixels.
        limit_s: for all of them.
        tell: gets a line each.
        on_progress: gets how far the features of a size are.

    Raises:
        UserError: as `load_data`, `load_run_backbone`.
    """
    found: dict[int, Regression] = {}
    started = time.perf_counter()
    pace = Pace()
    for size, seconds in expected_s.items():
        began = time.perf_counter()
        if found and began - started + pace.factor * seconds > limit_s:
            break
        try:
            on_images = None if on_progress is None else partial(on_progress, what=f"features of images at {size} px")
            own = regression_of(spec_of(size), on_progress=on_images)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tell(f"  {size} px need more memory than is free here: no larger size is tried.")
            break
        tell(f"  regression on frozen features of {size} px: {own.text} on images left out of its fit")
        taken_s = time.perf_counter() - began
        if own.is_new:
            pace.add(taken_s, seconds)
        found[size] = replace(own, pace=taken_s / seconds if own.is_new else None)
    return found


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


def regress(study: Mapping[str, Any], results_dir: Path, half: bool) -> Regression:
    """Fit a regression to the training images of a study's only run, here, in every way in which these are flipped.

    Args:
        study: of the method `linear`, without folds; nothing validates.
        results_dir: of the study; nothing is written.
        half: see `regression_of`.

    Raises:
        UserError: as `load_data`, `load_run_backbone`; and if a class has one image alone.
    """
    plan = plan_study(study_from_mapping(dict(study), file=study["name"]), results_dir, file=None)
    return regression_of(plan.runs[0].spec, flipped=True, half=half)


def regression_of(
    spec: RunSpec, *, flipped: bool = False, half: bool = False, on_progress: Callable[[int, int], None] | None = None
) -> Regression:
    """Fit a regression to a run's images, the penalty chosen on images that are left out of its fit in turn.

    If they are many, those that validate choose it.

    Args:
        spec: of the method `linear`.
        flipped: training images come in every way in which training shows them.
        half: fit to half of the images, too, where each class has enough.
        on_progress: gets how many features are there, and of how many.

    Raises:
        UserError: as `load_data`, `load_run_backbone`; and if a class has one image alone.
    """
    seen = seen_by_head(spec, flipped=flipped, on_progress=on_progress)
    features, groups, task, weights = seen.features, seen.groups, seen.features.task, seen.class_weights
    labels, ways = features.labels[: len(groups)], len(features.labels) // len(groups)
    strengths = spec.experiment.probe_l2
    scores = Scores(task, seen.metric)
    few = len(groups) <= _FEW and can_hold_out(task.strata(labels), groups)
    if len(groups) > seen.train_images and not few:
        train, validation = (
            Features(features.values[part], features.labels[part], task)
            for part in (slice(0, seen.train_images), slice(seen.train_images, None))
        )
        probe = fit_probe(train, validation, seen.head, seen.runtime, seen.metric, class_weights=weights, l2=strengths)
        assert probe.chosen is not None
        metrics, l2, nothing = probe.chosen.metrics, probe.fit.chosen_l2, np.empty(0)
        return Regression(metrics, seen.metric, l2, validation.labels, nothing, is_new=seen.is_new)

    def held_out(part: NDArray[np.bool_]) -> tuple[float, NDArray[np.float64]]:
        chosen = np.tile(part, ways)
        own = Features(features.values[chosen], features.labels[chosen], task)
        return held_out_fit(own, groups[part], seen.metric, class_weights=weights, l2=strengths)

    l2, whole = held_out(np.ones(len(groups), dtype=bool))  # (N, classes)
    by_image_of_half = None
    if half:
        part_of = assign_folds(task.strata(labels), groups, 2, np.random.default_rng(0))
        parts = [part_of == number for number in range(2)]
        if all(can_hold_out(task.strata(labels[part]), groups[part]) for part in parts):
            halves = np.empty_like(whole)
            for part in parts:
                halves[part] = held_out(part)[1]
            by_image_of_half = scores.by_image(halves, labels)
    metrics = task.measure(whole, labels)
    by_image = scores.by_image(whole, labels)
    return Regression(metrics, seen.metric, l2, labels, by_image, by_image_of_half, seen.is_new)
