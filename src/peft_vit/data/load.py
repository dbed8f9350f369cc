"""From a configuration and a seed to images: the package's front door."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

import numpy as np
from PIL import Image

from peft_vit.base.errors import UserError
from peft_vit.base.packages import no_downloads
from peft_vit.core.config import DATASETS, USUAL_TASK, DataConfig, licence_of
from peft_vit.core.records import RunRecord
from peft_vit.core.tasks import TASKS
from peft_vit.core.training.images import Data, HoldoutImages, LabelledImages
from peft_vit.data.index import ImageIndex, check_class_names
from peft_vit.data.inspection.duplicates import image_warnings
from peft_vit.data.pixels import split_pixels, thumbnail
from peft_vit.data.splits import make_splits

_SMALLEST_IMAGE = 14  # DataConfig.image_size accepts nothing below


def load_data(config: DataConfig, seed: int, *, smoke: bool = False, test: bool = True) -> Data:
    """Open, split, decode (or find in the cache) what one run needs.

    The test images are decoded here as well, so that a broken file shows before training, not after it.

    Args:
        config: which images, at which size, how many.
        seed: the run's seed; only matters with `folds`, `test_split: per_seed` or `train_subset: per_seed`.
        smoke: take made-up images, see `open_index`; pair it with `smoke_config`.
        test: False: none of the test images is there.

    Raises:
        UserError: see `open_index`, `make_splits`, `cached_pixels`, `image_warnings`.
    """
    index = open_index(config, smoke=smoke)
    splits = make_splits(index, config, seed)

    def images(rows: np.ndarray) -> LabelledImages:
        pixels, places = split_pixels(index, rows, splits.divided, config.image_size)
        return LabelledImages(pixels, index.labels[rows], rows, places)

    of_test = splits.test if test else splits.test[:0]
    train, validation, tested = map(images, (splits.train, splits.validation, of_test))
    return Data(
        class_names=index.class_names,
        train=train,
        validation=validation,
        test=HoldoutImages(tested, index.class_counts(of_test)),
        data_sha256=index.sha256,
        split_sha256=splits.sha256,
        groups=index.groups,
        test_files=[index.names[i] for i in splits.test] if index.own and index.names is not None else None,
        task=index.task.fitted(index.labels[splits.train]),
        warnings=image_warnings(index, splits, config.image_size, decodes=test),
        left_out=index.left_out,
        notes=index.notes,
    )


def open_index(config: DataConfig, *, smoke: bool = False) -> ImageIndex:
    """Open a data set without decoding an image.

    Args:
        config: which set, and where it lies.
        smoke: take a few made-up images instead of the real ones, wherever these lie.

    Raises:
        UserError: if it is not there, broken, has fewer than two classes, or one that could not be printed.
    """
    sources = import_module(f"peft_vit.data.sources.{DATASETS[config.dataset].module}").SOURCES
    index = replace(
        _made_up(config) if smoke else sources[config.dataset](config),
        name=config.dataset,
        licence=licence_of(config.dataset, smoke=smoke),
        channels=DATASETS[config.dataset].channels,
    )
    classes = len(index.class_names)
    if classes < index.task.least_outputs:
        message = f"holds {classes} classes ({', '.join(index.class_names)}), at least 2 are needed"
        raise UserError(message, file=config.path, field="data.path")
    check_class_names(index.class_names, config.path, "data.path")
    return replace(index, interpolation=config.interpolation or "bicubic", resize=config.resize)


def _made_up(config: DataConfig) -> ImageIndex:
    """Return 96 images of four classes: noise around a grey level or colour that shows the class."""
    classes = np.tile(np.arange(4), 24)
    task = TASKS[config.task or USUAL_TASK]
    names, labels = task.synthetic_labels(classes)
    channels = DATASETS[config.dataset].channels
    rng = np.random.default_rng(0)
    levels = rng.permuted(np.tile(np.linspace(40, 215, 4), (channels, 1)), axis=1).T  # (K, C)
    noise = rng.normal(0, 25, (len(classes), 32, 32, channels))
    pixels = np.clip(levels[classes][:, None, None] + noise, 0, 255).astype(np.uint8)  # (N, S, S, C)
    return ImageIndex(
        labels=labels,
        class_names=names,
        official_test=np.arange(len(labels)) >= 72 if config.test_images is None else None,
        sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
        read=lambda i: Image.fromarray(np.squeeze(pixels[i])),
        task=task,
    )


def smoke_config(config: DataConfig, patch_size: int = 14) -> DataConfig:
    """Return the same data set, compressed to seconds: 2 x 2 patches (more if they are tiny), a few images.

    Args:
        config: the configuration to compress.
        patch_size: side of the backbone's patches, in pixels.
    """
    patches = max(2, -(-_SMALLEST_IMAGE // patch_size))
    return config.model_copy(
        update={
            "image_size": patches * patch_size,
            "images_file": None,
            "train_images": 16,
            "shots_per_class": None,
            "tested_images": None,
            "validation_images": 8 if config.validation_images else 0,
            "test_images": None if config.test_images is None else 8,
        }
    )


def thumbnails_of(record: RunRecord, positions: Sequence[int]) -> list[bytes]:
    """Return a `thumbnail` each of a few images of a run; see `images_of`."""
    channels = DATASETS[record.spec.data.dataset].channels
    return [thumbnail(image, channels) for image in images_of(record, positions)]


def images_of(record: RunRecord, positions: Sequence[int]) -> list[Image.Image]:
    """Return a few images of a run; nothing is downloaded for them.

    Args:
        record: of the run.
        positions: in its data set.

    Raises:
        UserError: if the images are not on this machine, are others than those of the run, or can't be decoded.
    """
    with no_downloads():
        index = open_index(record.spec.data, smoke=record.spec.smoke)
    sha256 = None if record.provenance is None else record.provenance.data_sha256
    if index.sha256 != sha256 or not all(0 <= position < len(index.labels) for position in positions):
        message = f"the images of {index.name} on this machine are not those of the run"
        raise UserError(message, field="data")
    return [index.read(position) for position in positions]
