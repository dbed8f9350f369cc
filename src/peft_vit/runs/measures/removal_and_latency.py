"""What the `measures:` of a study ask for: measured once, after training, on validation images and the chosen weights.

Nothing of it is kept in checkpoints: an attempt that ends in between is followed by one that measures again.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
from torch import nn

from peft_vit.base.errors import SilentNoEffectWarning
from peft_vit.base.seeding import numpy_generator
from peft_vit.base.statistics.drawing import stratified_sample
from peft_vit.core.adapters import adapted_modules, merge_into_offsets, plain_model, update_ranks
from peft_vit.core.backbones import LoadedBackbone, choose_attention
from peft_vit.core.records import AdapterRemoval, RunSpec
from peft_vit.core.tasks import CLASSIFICATION, Task
from peft_vit.core.training import RuntimeConfig
from peft_vit.core.training.images import Data, LabelledImages
from peft_vit.core.training.metrics import forward_s, measure_ablation

_BATCH = 32  # images of a forward pass without an update


def leave_out_updates(model: nn.Module, data: Data, spec: RunSpec, runtime: RuntimeConfig) -> AdapterRemoval | None:
    """Measure what is lost without single updates; None if there is none."""
    assert spec.measures.removal_images is not None
    if not any(update_ranks(model).values()):
        warnings.warn(
            SilentNoEffectWarning("measures.removal_images has no effect: no module has any rank left"), stacklevel=2
        )
        return None
    images = removal_images(data.validation, spec.data.split_seed, spec.measures.removal_images, data.task)
    batches = images.ordered_batches(_BATCH, runtime.mean, runtime.std)
    return measure_ablation(model, batches, precision=runtime.precision, task=data.task)


def removal_images(
    validation: LabelledImages, split_seed: int, count: int, task: Task = CLASSIFICATION
) -> LabelledImages:
    """Return so many validation images: the same in every run with this split, each class with its share."""
    everything = np.arange(len(validation), dtype=np.int64)
    rng = numpy_generator(split_seed, "removal")
    return validation.chosen(
        stratified_sample(everything, task.strata(validation.labels), min(count, len(validation)), rng)
    )


def time_forward(backbone: LoadedBackbone, data: Data, spec: RunSpec, runtime: RuntimeConfig) -> dict[int, float]:
    """Return the seconds of a forward pass of the model as it would be deployed in PyTorch, by size of the batch.

    See `core.training.metrics.forward_s`.
    """
    deployed = _deployed(backbone, data, spec, runtime)
    seconds = {}
    source = data.validation if len(data.validation) else data.train
    for size in spec.measures.latency_batches:
        rows = np.arange(size) % len(source)  # over again, if there are fewer
        images, _ = next(source.chosen(rows).ordered_batches(size, runtime.mean, runtime.std))
        seconds[size] = forward_s(deployed, images.to(runtime.device), precision=runtime.precision)
    return seconds


def _deployed(backbone: LoadedBackbone, data: Data, spec: RunSpec, runtime: RuntimeConfig) -> nn.Module:
    """Return the model without adapters, where it computes the same; the given one stays as it is.

    Updates on float weights are added to them. On weights quantized in groups they go into the offsets, which round.
    Without groups a merge would choose codes again, and so make another model than the one that was tested: adapters
    stay, and their part of a forward pass is timed with it.
    """
    model = backbone.model
    layers = [module for _, module in adapted_modules(model) if module.quantized is not None]
    if not layers:
        outputs = data.task.head_width(data.class_names)
        merged = plain_model(model, backbone.architecture, spec.data.image_size, outputs)
        choose_attention(merged, runtime.device, runtime.precision)
        return merged
    if any(adapter.pool == 1 for layer in layers for _, adapter in layer.adapters()):
        return model
    merged = copy.deepcopy(model)
    merge_into_offsets(merged)
    return merged
