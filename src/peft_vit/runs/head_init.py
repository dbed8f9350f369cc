"""The head that a run starts from, fitted to the frozen backbone's features, which all runs of that backbone share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from peft_vit.core.adapters.adapter_file import load_head_rows
from peft_vit.core.adapters.peft_format import named_head_parameters
from peft_vit.core.backbones import Head
from peft_vit.core.records import Decision, Metrics, Provenance, RunSpec
from peft_vit.core.tasks import CLASSIFICATION, Task
from peft_vit.core.training import (
    FLIP_AXES,
    Features,
    Hook,
    LinearProbe,
    Overhead,
    RuntimeConfig,
    can_hold_out,
    fit_probe,
    groups_left_out,
    head_inputs,
    head_logits,
    held_out_fit,
    loss_weights,
)
from peft_vit.core.training.images import Data, LabelledImages
from peft_vit.data.pixels import decoders
from peft_vit.runs.measures.held_out import PRIOR
from peft_vit.runs.this_machine.cache import cache_file, cached_rows
from peft_vit.runs.this_machine.machine import instruction_limits

_WAYS = 4  # in which an image can be flipped; a place in the cache is 4 * image + way
_BATCH = 32


def init_head(
    head: Head, features: SharedFeatures, data: Data, spec: RunSpec, runtime: RuntimeConfig, overhead: Overhead
) -> tuple[LinearProbe, float, Metrics | None, Decision | None]:
    """Fit the head of a prepared model, with updates as they start, and put it in its place.

    Returns:
        The probe, what its logits are divided by in training, see `LinearProbe.training_temperature`, and how good the
        head is on validation images, by the very logits that the probe was chosen by: a model in bf16 rounds otherwise
        with another head or batch, and would count another image. None: there are no such images, or no training. And
        what the head's outputs mean by images that were left out of its fit, see `Task.decide`.
    """
    with overhead.of("features"):
        of_training = features.of_training(data.train)
        of_validation = features.of(data.validation) if len(data.validation) else None
    with overhead.of("probe"):
        weights = loss_weights(spec.experiment.training, data, torch.device("cpu"))
        class_weights = None if weights is None else weights.double().numpy()
        strengths, held_out = spec.experiment.probe_l2, None
        metric = data.task.metric(spec.experiment.training.metric)
        is_probe = spec.experiment.is_probe
        if of_validation is None and (len(strengths) > 1 or not is_probe):
            strata = data.task.strata(data.train.labels)
            groups = groups_left_out(strata, data.groups[data.train.positions])  # copies together
            if is_probe and not can_hold_out(strata, groups):  # a class of one image
                chosen = max(strengths)
            else:
                chosen, held_out = held_out_fit(
                    of_training, groups, metric, class_weights=class_weights, l2=strengths, seed=spec.seed
                )
            strengths = (chosen,)
        probe = fit_probe(of_training, of_validation, head, runtime, metric, class_weights=class_weights, l2=strengths)
        if is_probe:
            probe.set_head(head)
            return probe, 1.0, None, None
        metrics = None
        if of_validation is not None:
            temperature = probe.temperature(of_validation)
            probe.set_head(head)
            logits = head_logits(head, of_validation.values, runtime).astype(np.float64) / temperature  # (N, classes)
            metrics = data.task.measure(logits, of_validation.labels)
            meaning = data.task.decide(logits, of_validation.labels, PRIOR)
        else:
            assert held_out is not None
            known = np.isfinite(held_out).all(1)  # where a class has another image
            logits, labels = held_out[known], data.train.labels[known]
            temperature = data.task.temperature(torch.from_numpy(logits), torch.from_numpy(labels))
            meaning = data.task.decide(logits / temperature, labels, PRIOR)
        probe.set_head(head, temperature)
        if spec.experiment.start is not None and (start := Path(spec.experiment.start)).is_file():
            load_head_rows(named_head_parameters(features.model), start, data.class_names)
            return probe, 1.0, metrics, meaning  # the head is as sure as training has left it
        return probe, probe.training_temperature(of_training, temperature), metrics, meaning


class SharedFeatures:
    """Features of the model as it is before training, looked up in the user's cache or computed.

    They depend on the weights, their packing, the images and the arithmetic, and on no seed: a file of the cache holds
    those of one such combination. What has no such name (random weights, an adapter to continue from) is computed
    again. The model is prepared, with updates of zero, and a hook that packs weights says how. `on_progress` gets how
    many images of a split are done, and of how many.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: RunSpec,
        provenance: Provenance,
        hooks: list[Hook],
        runtime: RuntimeConfig,
        task: Task = CLASSIFICATION,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model, self._runtime, self._task = model, runtime, task
        self._ways = FLIP_AXES[spec.experiment.training.flips]
        self._file, self._on_progress = _place(spec, provenance, hooks), on_progress
        self.computed = 0  # features, not found in the cache

    def of_training(self, images: LabelledImages) -> Features:
        """Return the features of images in every way in which training shows them, one after the other."""
        values = [self._values(images, way, axes) for way, axes in enumerate(self._ways)]
        labels = np.concatenate([images.labels] * len(self._ways))  # (ways N,)
        return Features(np.concatenate(values), labels, self._task)  # (ways N, D)

    def of(self, images: LabelledImages) -> Features:
        """Return the features of images as they are."""
        return Features(self._values(images, 0, ()), images.labels, self._task)

    def _values(self, images: LabelledImages, way: int, axes: tuple[int, ...]) -> NDArray[np.float32]:
        def compute(missing: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
            images_left = images.chosen(missing)
            computed = head_inputs(self.model, images_left, self._runtime, _BATCH, axes, self._on_progress)
            self.computed += len(computed)
            return missing, computed

        return cached_rows(self._file, _WAYS * images.positions + way, compute)[1]  # (N, D)


def _place(spec: RunSpec, provenance: Provenance, hooks: list[Hook]) -> Path | None:
    if provenance.random_weights or spec.experiment.start is not None:
        return None
    depends_on: dict[str, Any] = {
        "model": spec.backbone.model,
        "head_blocks": spec.backbone.head_blocks,
        "weights": provenance.weights_sha256,
        "config": provenance.config_sha256,
        "transformers": provenance.packages.get("transformers"),
        "data": provenance.data_sha256,
        **spec.data.model_dump(mode="json", include={"image_size", "interpolation", "resize"}),
        "pixels": decoders(),
        "precision": spec.precision,
        "integer_bits": provenance.integer_bits,
        "device": provenance.device,
        "threads": spec.threads,
        "torch": torch.__version__,
        "timm": provenance.packages.get("timm"),
        "processor": provenance.processor,
        "instructions": instruction_limits(),
    }
    for hook in hooks:
        depends_on |= hook.features_depend_on()
    return cache_file("features", depends_on, "safetensors")
