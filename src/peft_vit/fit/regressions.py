"""A regression on frozen features at an image size: where training is worth its time, and what it has to beat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from peft_vit.base.statistics.drawing import assign_folds
from peft_vit.core.backbones import Architecture, native_size, size_step_of
from peft_vit.core.config import study_from_mapping
from peft_vit.core.records import Metrics
from peft_vit.core.tasks import DecidingMetric, Labels, Scores, metric_of
from peft_vit.core.training import Features, can_hold_out, held_out_fit, loss_weights
from peft_vit.runs.execute import Loaded
from peft_vit.runs.head_init import SharedFeatures
from peft_vit.runs.scheduling.plan import plan_study

_SMALLEST, _LARGEST = 56, 640  # pixels
_FEWEST, _FEW = 300, 1500  # images by which sizes can be compared; up to which folds are worth their fits


@dataclass(frozen=True)
class Regression:
    """What a regression on frozen features has, on images that are left out of its fit.

    Attributes:
        metrics: on these images.
        metric: that decides.
        l2: strength of the penalty that has them.
        labels: of the images, N.
        by_image: per-image terms of the metric, (N,), whose mean it is.
        by_image_of_half: the same terms with half of the images to learn from; None: that was not asked for.
        features_s: that its features took; 0: they were in the cache.
        fit_s: that its fits took, likewise; 0: nobody has looked.
    """

    metrics: Metrics
    metric: DecidingMetric
    l2: float
    labels: Labels
    by_image: NDArray[Any]
    by_image_of_half: NDArray[Any] | None = None
    features_s: float = 0.0
    fit_s: float = 0.0


def sizes_to_try(architecture: Architecture) -> list[int]:
    """Return image sizes that a model takes, rising by about the square root of 2 up to its own, which is the last."""
    step, native = size_step_of(architecture), native_size(architecture)
    smallest = max(_SMALLEST, 2 * step)
    wished = [smallest * 2 ** (power / 2) for power in range(12)]
    sizes = {round(side / step) * step for side in wished if side < min(native, _LARGEST) / 1.1}
    return sorted({*sizes, *([native] if native <= _LARGEST else [])}) or [native]


def images_to_compare(images: int, rarest: float, fitting: float) -> int:
    """Return by how many of some images sizes are compared, if regressions on so many are worth their time.

    There are three images of the rarest class among them, or its folds could not be made.
    """
    return min(images, max(_FEWEST, min(_FEW, int(fitting)), math.ceil(3 * images / max(1, rarest))))


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
        UserError: as `load_data`, `load_run_backbone`; and if a class has one image alone.
    """
    plan = plan_study(study_from_mapping(dict(study), file=study["name"]), results_dir, file=None)
    spec = plan.runs[0].spec
    loaded = Loaded.of(spec, test=False)
    data, model = loaded.data, loaded.backbone.model.requires_grad_(False)
    shared = SharedFeatures(model, spec, loaded.made_ready(), [], loaded.runtime, data.task, on_progress)
    began = time.perf_counter()
    features, groups = shared.of_training(data.train), data.groups[data.train.positions]
    computed = time.perf_counter()
    weights = loss_weights(spec.experiment.training, data, torch.device("cpu"))
    class_weights = None if weights is None else weights.double().numpy()
    metric, task, strata = metric_of(spec), data.task, data.task.strata(data.train.labels)
    ways = len(features.labels) // len(groups)

    def held_out(part: NDArray[np.bool_]) -> tuple[float, NDArray[np.float64]]:
        chosen = np.tile(part, ways)
        own = Features(features.values[chosen], features.labels[chosen], task)
        strengths = spec.experiment.probe_l2
        return held_out_fit(own, groups[part], metric, class_weights=class_weights, l2=strengths)

    l2, logits = held_out(np.ones(len(groups), dtype=bool))  # (N, classes)
    labels, scores, by_image_of_half = features.labels[: len(groups)], Scores(task, metric), None
    if half:
        part_of = assign_folds(strata, groups, 2, np.random.default_rng(0))
        parts = [part_of == number for number in range(2)]
        if all(can_hold_out(strata[part], groups[part]) for part in parts):
            halves = np.empty_like(logits)
            for part in parts:
                halves[part] = held_out(part)[1]
            by_image_of_half = scores.by_image(halves, labels)
    features_s = computed - began if shared.computed == len(features.labels) else 0.0
    by_image, fit_s = scores.by_image(logits, labels), time.perf_counter() - computed
    return Regression(task.measure(logits, labels), metric, l2, labels, by_image, by_image_of_half, features_s, fit_s)
