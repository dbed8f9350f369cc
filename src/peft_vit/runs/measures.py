"""What the `measures:` of a study ask for: measured once, after training, on validation images and the chosen weights.

Nothing of it is kept in checkpoints: an attempt that ends in between is followed by one that measures anew.
"""

from __future__ import annotations

import copy
import time
import warnings
from typing import Any

import numpy as np
from torch import nn

from peft_vit.adapters import adapted_modules, merge_into_offsets, update_ranks
from peft_vit.backbones import LoadedBackbone, choose_attention
from peft_vit.data import DATASETS, Data, LabelledImages, stratified_draw
from peft_vit.deployment import ModelCard, merge
from peft_vit.errors import SilentNoEffectWarning
from peft_vit.evaluation import forward_s, measure_ablation
from peft_vit.records import AdapterRemoval, RunSpec
from peft_vit.seeding import numpy_generator
from peft_vit.training import RuntimeConfig

_BATCH = 32  # images of a forward pass without an update


def take_measures(
    model: nn.Module, backbone: LoadedBackbone, data: Data, spec: RunSpec, setting: RuntimeConfig
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the record's fields that the study asks for, by their names, and the seconds that they took by purpose."""
    removal, removal_s = leave_out_updates(model, data, spec, setting)
    latency_s, timing_s = time_forward(model, backbone, data, spec, setting)
    return {"removal": removal, "latency_s": latency_s}, {**removal_s, **timing_s}


def leave_out_updates(
    model: nn.Module, data: Data, spec: RunSpec, setting: RuntimeConfig
) -> tuple[AdapterRemoval | None, dict[str, float]]:
    """Measure what is lost without single updates, if `measures.removal_images` asks for it.

    `linear` and `full` have no updates to leave out: the setting is the study's, and acts on its other experiments.

    Returns:
        What was measured, None if nothing was asked for or there are no adapters; and its seconds by purpose.
    """
    count = spec.measures.removal_images
    if count is None or not spec.experiment.has_adapters:
        return None, {}
    if not any(update_ranks(model).values()):
        warnings.warn(
            SilentNoEffectWarning("measures.removal_images has no effect: no site has any rank left"), stacklevel=2
        )
        return None, {}
    started = time.perf_counter()
    images = removal_images(data.validation, spec.data.split_seed, count)
    batches = images.ordered_batches(_BATCH, setting.mean, setting.std)
    removal = measure_ablation(model, batches, device=setting.device, precision=setting.precision)
    return removal, {"removal": time.perf_counter() - started}


def removal_images(validation: LabelledImages, split_seed: int, count: int) -> LabelledImages:
    """Return validation images, the same in every run with this split: each class has its share of them.

    Args:
        validation: all of them.
        split_seed: of the configuration.
        count: how many; all if there are not as many.
    """
    everything = np.arange(len(validation), dtype=np.int64)
    rng = numpy_generator(split_seed, "removal")
    return validation.chosen(stratified_draw(everything, validation.labels, min(count, len(validation)), rng))


def time_forward(
    model: nn.Module, backbone: LoadedBackbone, data: Data, spec: RunSpec, setting: RuntimeConfig
) -> tuple[dict[int, float], dict[str, float]]:
    """Time forward passes of the model as it would be deployed in PyTorch, at each of `measures.latency_batches`.

    Returns:
        Seconds of a pass by batch size, see `evaluation.forward_s`; and the measure's own seconds by purpose.
    """
    if not spec.measures.latency_batches:
        return {}, {}
    started = time.perf_counter()
    deployed = _deployed(model, backbone, data, spec, setting)
    found = {}
    for size in spec.measures.latency_batches:
        rows = np.arange(size) % len(data.validation)  # over again, if there are fewer
        images, _ = next(data.validation.chosen(rows).ordered_batches(size, setting.mean, setting.std))
        found[size] = forward_s(deployed, images.to(setting.device), precision=setting.precision)
    return found, {"latency": time.perf_counter() - started}


def _deployed(
    model: nn.Module, backbone: LoadedBackbone, data: Data, spec: RunSpec, setting: RuntimeConfig
) -> nn.Module:
    """Return the model without adapters, where it computes the same; the given one stays as it is.

    Updates on float weights are added to them. On weights quantized in groups they go into the offsets, which round.
    Without groups a merge would choose codes anew, and so make another model than the one that was tested: adapters
    stay, and their part of a forward pass is timed with it.
    """
    layers = [module for _, module in adapted_modules(model) if module.quantized is not None]
    if not layers:
        merged = merge(model, _card(backbone, data, spec)).model
        choose_attention(merged, setting.device, setting.precision)
        return merged
    if any(adapter.pool == 1 for layer in layers for _, adapter in layer.adapters()):
        return model
    merged = copy.deepcopy(model)
    merge_into_offsets(merged)
    return merged


def _card(backbone: LoadedBackbone, data: Data, spec: RunSpec) -> ModelCard:
    return ModelCard(
        run=spec.run_id,
        model=spec.backbone.model,
        weights_name=backbone.weights_name,
        weights_sha256=backbone.weights_sha256,
        image_size=spec.data.image_size,
        channels=DATASETS[spec.data.dataset].channels,
        mean=backbone.mean,
        std=backbone.std,
        class_names=data.class_names,
    )
