"""Post-training quantization: a float run's adapters are merged, then the matrices of its blocks become packed ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_vit.base.console import OnProgress, no_progress
from peft_vit.base.errors import UserError
from peft_vit.base.statistics import Neighbours
from peft_vit.core.adapters import AdaptedLinear, packed_weights
from peft_vit.core.backbones import Backbone, fused_sites
from peft_vit.core.config import BITS_OF_TYPE, IMAGES_ROUNDED_BY, QaLoraConfig, QuantizationType, Rounding
from peft_vit.core.methods.quantized import packing_of
from peft_vit.core.tasks import meaning_fields
from peft_vit.core.training import Calibration, RuntimeConfig
from peft_vit.core.training.images import Data, LabelledImages
from peft_vit.core.training.metrics import predict_with_middle
from peft_vit.core.training.quantized_layers import QuantizedLayer, format_of
from peft_vit.core.training.quantized_layers import packed_weights as rounded_weights
from peft_vit.deploy import ExportMetadata, Merged, merge
from peft_vit.deploy.formats.header import FloatArray
from peft_vit.deploy.restore import RestoredRun, restore_run
from peft_vit.runs.measures.held_out import PRIOR, Outputs, fit_neighbours, reference_images

_CPU = torch.device("cpu")


def merge_float(run: RestoredRun) -> Merged:
    """Merge a run's adapters into its float weights.

    Raises:
        UserError: if these are packed already.
    """
    merged = merge(run.model, run.card)
    if merged.how != "float":
        types = " and ".join(sorted({weight.format.type for weight in packed_weights(run.model).values()}))
        raise UserError(f"has no effect on this run, whose weights are {types} already; leave it out", field="--bits")
    return merged


def round_weights(
    model: nn.Module,
    type: QuantizationType,
    images: Tensor | None = None,
    offset: bool | None = None,
    on_progress: OnProgress = no_progress,
) -> nn.Module:
    """Return a model whose blocks' matrices are packed; the given one stays as it is.

    Args:
        model: without adapters, its weights in float.
        type: of codes, see `packing_of`.
        images: training images (N, 3, S, S), normalised, by which GPTQ rounds; None: to nearest.
        offset: see `packing_of`.
        on_progress: gets how many matrices are packed.
    """
    model, layers = copy.deepcopy(model), {}
    sites = Backbone.within(model).sites
    for name in fused_sites(sites):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layers[name] = QuantizedLayer(AdaptedLinear(linear), ())
        model.set_submodule(name, layers[name].module)
    formats = dict.fromkeys(layers, format_of(QaLoraConfig(**packing_of(sites, type, offset))))
    rounding: Rounding = "nearest" if images is None else "gptq"
    for done, (name, weight) in enumerate(rounded_weights(model, layers, formats, rounding, images), start=1):
        on_progress(done, len(layers), "rounding matrices")
        layers[name].module.quantized = weight
        layers[name].module.drop_float()  # at once: GPTQ rounds the next layer by what this one makes of the images
    return model.requires_grad_(False).eval()


def images_rounded_by(type: QuantizationType) -> int:
    """Return how many training images GPTQ takes where nothing is said; 0: to nearest.

    In 8 bits nearest loses nothing, in 4 a quarter of the images is nearly as good
    (`calibration/scripts/rounding_images.py`).
    """
    return {8: 0, 4: IMAGES_ROUNDED_BY // 4}.get(BITS_OF_TYPE[type], IMAGES_ROUNDED_BY)


def pack_after_training(
    model: nn.Module,
    run: RestoredRun,
    data: Data,
    type: QuantizationType,
    rounding: Rounding | None,
    on_progress: OnProgress = no_progress,
) -> tuple[nn.Module, ExportMetadata, Neighbours | None]:
    """Return a run's merged float model with packed weights, its card, and what it knows of training images.

    What validation images say, and the features of training images, are those of the rounded model.
    """
    images, card = _images_to_round_by(run, data, type, rounding), run.card
    rounded = round_weights(model, type, images, on_progress=on_progress)
    changes: dict[str, Any] = {}
    reference, middle = None, None
    if len(data.validation):
        meaning = card.meaning
        prior = PRIOR._replace(median=PRIOR.median if meaning is None else meaning.temperature)
        validation = _outputs(rounded, data.validation, card)
        changes = meaning_fields(data.task.meaning(validation.logits, validation.labels, prior))
        middle = validation.middle
    if run.reference is not None:
        train = _outputs(rounded, reference_images(data, run.record.spec.seed), card).middle
        assert train is not None
        reference, changes["unlike"] = fit_neighbours(train, middle)
    return rounded, card.model_copy(update=changes), reference


def logits_by_type(
    run_dir: Path, types: Sequence[QuantizationType], rounding: Rounding | None = None, offset: bool | None = None
) -> dict[QuantizationType, FloatArray]:
    """Return what a float run's model says of its test images, (N, classes), with weights in each type in turn.

    The run is restored and merged once. Where many runs are tested on folds, these are images that none of them was
    trained on and no verdict is kept for.

    Args:
        run_dir: holds record.json and adapter.safetensors.
        types: of codes.
        rounding: nearest; gptq, on IMAGES_ROUNDED_BY images; None: see `images_rounded_by`.
        offset: see `packing_of`.

    Raises:
        UserError: if the run can't be restored, its weights are packed already, or its images are not there.
    """
    run = restore_run(run_dir)
    model, data = merge_float(run).model, run.load_data()
    tested, logits = data.test.open(), {}
    for type in types:
        rounded = round_weights(model, type, _images_to_round_by(run, data, type, rounding), offset)
        logits[type] = _outputs(rounded, tested, run.card).logits
    return logits


def _images_to_round_by(
    run: RestoredRun, data: Data, type: QuantizationType, rounding: Rounding | None
) -> Tensor | None:
    """Return training images for GPTQ; None: to nearest."""
    count = {"nearest": 0, "gptq": IMAGES_ROUNDED_BY, None: images_rounded_by(type)}[rounding]
    runtime = RuntimeConfig(_CPU, "fp32", run.card.mean, run.card.std)
    return Calibration(data, runtime, run.record.spec.seed).images(count) if count else None


def _outputs(model: nn.Module, images: LabelledImages, card: ExportMetadata) -> Outputs:
    batches = images.ordered_batches(32, card.mean, card.std)
    return Outputs(*predict_with_middle(model, batches, precision="fp32"))
