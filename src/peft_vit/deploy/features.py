"""Features of images: what the head of a trained, or of a pretrained model sees of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from peft_vit.base.errors import UserError, os_fault, printable
from peft_vit.base.files import write_atomically
from peft_vit.core.backbones import architecture_of, interpolation_of, load_backbone, native_size
from peft_vit.core.config import named_backbone
from peft_vit.core.training.hooks import RuntimeConfig
from peft_vit.core.training.images import LabelledImages
from peft_vit.core.training.linear_probe import head_inputs
from peft_vit.deploy.formats.header import ExportMetadata, FloatArray
from peft_vit.deploy.measures.check import card_of_random
from peft_vit.deploy.predicting import BATCH, ImageFile, pixels_of
from peft_vit.runs.this_machine.machine import resolve_device

_USUAL_SIZE = 224  # pixels


def open_pretrained(model: str, weights: str | None, image_size: int | None) -> tuple[nn.Module, ExportMetadata]:
    """Return a pretrained model by its name, as `train --model` takes it, and how it takes images.

    Raises:
        UserError: if it is not known, can't be loaded, or takes no images of this size.
    """
    config = named_backbone(model, weights)
    architecture = architecture_of(config)
    size = image_size or min(_USUAL_SIZE, native_size(architecture))
    loaded = load_backbone(config, image_size=size, num_classes=1, seed=0, architecture=architecture)
    card = card_of_random(architecture, size, ("none",), model)
    taken = {"mean": loaded.mean, "std": loaded.std, "interpolation": interpolation_of(architecture)}
    return loaded.model, card.model_copy(update=taken)


def embed_images(
    model: nn.Module,
    card: ExportMetadata,
    images: Sequence[ImageFile | UserError],
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Path], FloatArray, list[UserError]]:
    """Return the files that can be read, their features (N, D), and what is wrong with the others.

    Args:
        model: with a head.
        card: how it takes images.
        images: see `image_files`.
        on_progress: gets how many are done, and of how many.

    Raises:
        UserError: if none can be read.
    """
    runtime = RuntimeConfig(resolve_device("auto"), "fp32", card.mean, card.std)
    model = model.to(runtime.device)
    files, features, faults = [], [], []
    for start in range(0, len(images), BATCH):
        pixels = []
        for image in images[start : start + BATCH]:
            try:
                pixels.append(pixels_of(image, card))  # (S, S, C)
            except UserError as error:
                faults.append(error)
            else:
                assert isinstance(image, ImageFile)
                files.append(image.file)
        if pixels:
            batch = LabelledImages(np.stack(pixels), np.zeros(len(pixels), np.int64))
            features.append(head_inputs(model, batch, runtime, BATCH))  # (B, D)
        if on_progress is not None:
            on_progress(min(start + BATCH, len(images)), len(images))
    if not features:
        raise faults[0]
    return files, np.concatenate(features), faults


def write_features(files: Sequence[Path], features: FloatArray, output: Path) -> None:
    """Write features (N, D) as .npy, with the files' names in a .csv beside it, or as .parquet with both.

    Raises:
        UserError: if a file can't be written.
    """
    from pandas import DataFrame

    names, content = DataFrame({"file": [printable(str(file)) for file in files]}), io.BytesIO()
    with os_fault("can't be written", output, remedy="choose another file", field="--output"):
        if output.suffix.lower() == ".parquet":
            table = names.join(DataFrame(features, columns=[str(k) for k in range(features.shape[1])]))
            table.to_parquet(content, engine="pyarrow", index=False)
        else:
            np.save(content, features)
            write_atomically(output.with_suffix(".csv"), names.to_csv(index=False).encode())
        write_atomically(output, content.getvalue())
