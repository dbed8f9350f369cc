"""A regression on frozen features at several image sizes: where training is worth its time, and what it has to beat."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from peft_vit.backbones import Architecture, Backbone, native_size, size_step_of
from peft_vit.errors import is_out_of_memory
from peft_vit.forecasting.time_limit import Pace
from peft_vit.records import RunSpec
from peft_vit.runs.execute import Loaded
from peft_vit.runs.head_init import SharedFeatures
from peft_vit.tasks import metric_of
from peft_vit.training import Features, can_hold_out, fit_probe, held_out_metrics, loss_weights

_SMALLEST, _LARGEST = 56, 640  # pixels
_FEW = 1500  # images, up to which folds are worth their fits


@dataclass(frozen=True)
class SizeTrial:
    """What a regression has at an image size.

    Attributes:
        image_size: in pixels.
        value: of the metric that decides, on images left out of the fit; larger is better.
        text: the value as a terminal shows it.
    """

    image_size: int
    value: float
    text: str


def sizes_to_try(architecture: Architecture) -> list[int]:
    """Return image sizes that a model takes, rising by about the square root of 2 up to its own, which is the last."""
    step, native = size_step_of(architecture), native_size(architecture)
    smallest = max(_SMALLEST, 2 * step)
    wished = [smallest * 2 ** (power / 2) for power in range(12)]
    sizes = {round(side / step) * step for side in wished if side < min(native, _LARGEST) / 1.1}
    return sorted({*sizes, *([native] if native <= _LARGEST else [])}) or [native]


def try_sizes(
    spec_of: Callable[[int], RunSpec], expected_s: Mapping[int, float], limit_s: float, log: Callable[[str], None]
) -> list[SizeTrial]:
    """Fit regressions at rising sizes while the next one fits memory and is expected to end in time.

    Images that train and validate are read, none that test. Features stay in the cache, where the run finds them.

    Args:
        spec_of: a run of the method `linear` at a size.
        expected_s: what each size takes, rising, in pixels; where the first ones take longer, so will the next.
        limit_s: for all of them.
        log: told a line each.

    Raises:
        UserError: as `load_data`, `load_run_backbone`.
    """
    trials: list[SizeTrial] = []
    started = time.perf_counter()
    pace = Pace()
    for size, seconds in expected_s.items():
        began = time.perf_counter()
        if trials and began - started + max(1.0, pace.factor) * seconds > limit_s:
            break
        try:
            trials.append(_trial(spec_of(size)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log(f"  {size} px take more memory than is free here: no larger size is tried.")
            break
        log(f"  regression on frozen features of {size} px: {trials[-1].text} on images left out of its fit")
        pace.add(time.perf_counter() - began, seconds)
    return trials


def _trial(spec: RunSpec) -> SizeTrial:
    loaded = Loaded.of(spec, test=False)
    data, model, runtime = loaded.data, loaded.backbone.model.requires_grad_(False), loaded.runtime
    shared = SharedFeatures(model, spec, loaded.made_ready(), [], runtime)
    train, validation = shared.of(data.train), shared.of(data.validation)
    weights = loss_weights(spec.experiment.training, data, torch.device("cpu"))
    class_weights = None if weights is None else weights.double().numpy()
    metric, strengths = metric_of(spec), spec.experiment.probe_l2
    groups = data.groups[np.concatenate([data.train.positions, data.validation.positions])]  # (N + V,)
    labels = np.concatenate([train.labels, validation.labels])
    if len(labels) <= _FEW and can_hold_out(data.task.strata(labels), groups):
        both = Features(np.concatenate([train.values, validation.values]), labels, data.task)  # (N + V, D)
        metrics = held_out_metrics(both, metric, groups, class_weights=class_weights, l2=strengths)
    else:
        head = Backbone(model).head
        probe = fit_probe(train, validation, head, runtime, metric, class_weights=class_weights, l2=strengths)
        assert probe.chosen is not None
        metrics = probe.chosen.metrics
    value = metric.of(metrics)
    return SizeTrial(spec.data.image_size, metric.sign * value, metric.text(value))
