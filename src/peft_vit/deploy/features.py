"""Features of images: what the head of a trained, or of a pretrained model sees of them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from peft_vit.base.console import OnProgress, no_progress
from peft_vit.base.errors import UserError, os_fault, printable
from peft_vit.base.files import write_atomically
from peft_vit.core.backbones import architecture_of, interpolation_of, load_backbone, native_size
from peft_vit.core.config import named_backbone
from peft_vit.core.training.hooks import RuntimeConfig
from peft_vit.core.training.images import LabelledImages
from peft_vit.core.training.linear_probe import head_inputs
from peft_vit.data.files import FileTree
from peft_vit.data.pixels import decoders
from peft_vit.deploy.formats.header import ExportMetadata, FloatArray
from peft_vit.deploy.measures.check import card_of_random
from peft_vit.deploy.predicting import BATCH, GivenImage, ImageFile, pixels_of
from peft_vit.runs.this_machine.cache import cache_file, cached_rows
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
    model: nn.Module, card: ExportMetadata, images: Sequence[GivenImage], on_progress: OnProgress = no_progress
) -> tuple[list[int], FloatArray, list[UserError]]:
    """Return which images can be read, by their places, their features (N, D), and what is wrong with the others.

    Args:
        model: with a head.
        card: how it takes images.
        images: files, see `image_files`, or arrays.
        on_progress: gets how many are done, and of how many.
    """
    runtime = RuntimeConfig(resolve_device("auto"), "fp32", card.mean, card.std)
    model = model.to(runtime.device)
    places: list[int] = []
    features, faults = [], []
    for start in range(0, len(images), BATCH):
        pixels = []
        for place, image in enumerate(images[start : start + BATCH], start):
            try:
                pixels.append(pixels_of(image, card))  # (S, S, C)
            except UserError as error:
                faults.append(error)
            else:
                places.append(place)
        if pixels:
            batch = LabelledImages(np.stack(pixels), np.zeros(len(pixels), np.int64))
            features.append(head_inputs(model, batch, runtime, BATCH))  # (B, D)
        on_progress(min(start + BATCH, len(images)), len(images))
    return places, np.concatenate(features) if features else np.empty((0, 0), np.float32), faults


def cached_features(
    model: nn.Module, card: ExportMetadata, tree: FileTree, names: Sequence[str], on_progress: OnProgress = no_progress
) -> tuple[list[str], FloatArray, list[UserError]]:
    """Return the files that can be read, their features (N, D), and what is wrong with the others.

    Features are kept in the user's cache, a file for each folder and model, by what the images hold. The model is known
    by what it makes of one image.

    Args:
        model: with a head.
        card: how it takes images.
        tree: the folder or zip.
        names: of the files.
        on_progress: gets how many that are not kept are done, and of how many.
    """
    hashed = tree.hashed(list(names))
    whole = "" if tree.location.is_dir() else hashed.sha256  # a zip's files are told apart inside it alone
    digests = (hashlib.blake2b(f"{whole}{hashed.each[name]}".encode(), digest_size=8).digest() for name in names)
    wanted = np.array([int.from_bytes(digest, "little", signed=True) for digest in digests], np.int64)
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    depends_on = {
        "images": str(tree.location.resolve()),
        "model": embed_images(model, card, [noise])[1].tobytes().hex(),
        "pixels": decoders(),
    }
    images = [ImageFile(tree.location / name, partial(tree.read, name)) for name in names]
    faults: list[UserError] = []

    def compute(missing: NDArray[np.int64]) -> tuple[NDArray[np.int64], FloatArray]:
        places, features, faults[:] = embed_images(model, card, [images[k] for k in missing], on_progress)
        return missing[places], features

    there, features = cached_rows(cache_file("features", depends_on, "safetensors"), wanted, compute)
    return [name for name, is_there in zip(names, there, strict=True) if is_there], features, faults


def cosines(features: FloatArray, query: FloatArray) -> FloatArray:
    """Return the cosines of features (N, D) to those of one image (D,), (N,)."""
    norms = np.linalg.norm(features, axis=1) * np.linalg.norm(query)  # (N,)
    return features @ query / np.maximum(norms, np.finfo(np.float32).tiny)


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
