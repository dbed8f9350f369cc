"""From a configuration and a seed to images: the package's front door."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import numpy as np
from PIL import Image

from peft_vit.config import DATASETS, DataConfig, OnlyWith, licence_of
from peft_vit.data.files import new_in_cache
from peft_vit.data.images import HoldoutImages, LabelledImages
from peft_vit.data.index import DataSource, ImageIndex, check_class_names
from peft_vit.data.inspect import image_warnings
from peft_vit.data.pixels import on_white, split_pixels
from peft_vit.data.splits import make_splits
from peft_vit.errors import UserError
from peft_vit.packages import cache_dir, no_downloads
from peft_vit.records import RunRecord

_SAMPLES_VERSION = 3  # raise when what a source writes changes
_SMALLEST_IMAGE = 14  # DataConfig.image_size accepts nothing below
_THUMBNAIL_SIDE = 96  # pixels


@dataclass(frozen=True)
class Data:
    """What a run trains, chooses and is tested on."""

    class_names: tuple[str, ...]
    train: LabelledImages
    validation: LabelledImages
    test: HoldoutImages
    data_sha256: str
    split_sha256: str
    warnings: tuple[str, ...] = ()  # what to know of the images before believing a number, see `image_warnings`


def load_data(config: DataConfig, seed: int, *, smoke: bool = False) -> Data:
    """Open, split, decode (or find in the cache) what one run needs.

    The test images are decoded here as well, so that a broken file shows before training, not after it.

    Args:
        config: which images, at which size, how many.
        seed: the run's seed; only matters with `folds`, `test_split: per_seed` or `train_subset: per_seed`.
        smoke: use synthetic files, see `open_index`; pair it with `smoke_config`.

    Raises:
        UserError: see `open_index`, `make_splits`, `cached_pixels`, `image_warnings`.
    """
    index = open_index(config, smoke=smoke)
    splits = make_splits(index, config, seed)

    def images(rows: np.ndarray) -> LabelledImages:
        pixels, places = split_pixels(index, rows, splits.divided, config.image_size)
        return LabelledImages(pixels, index.labels[rows], rows, places)

    train, validation, test = (images(rows) for rows in splits.parts)
    return Data(
        class_names=index.class_names,
        train=train,
        validation=validation,
        test=HoldoutImages(test, len(index.class_names)),
        data_sha256=index.sha256,
        split_sha256=splits.sha256,
        warnings=image_warnings(index, splits, config.image_size),
    )


def open_index(config: DataConfig, *, smoke: bool = False) -> ImageIndex:
    """Open a data set without decoding an image.

    Args:
        config: which set, and where it lies.
        smoke: read a few synthetic images of the same on-disk format instead of the real ones, and ignore
            `config.path` and what else says where they lie. (digits is real, it needs no file.)

    Raises:
        UserError: if it is not there, broken, has fewer than two classes, or one that could not be printed.
    """
    if smoke:
        elsewhere = {
            name: None
            for name, field in DataConfig.model_fields.items()
            if any(isinstance(condition, OnlyWith) and condition.other == "dataset" for condition in field.metadata)
        }
        config = config.model_copy(update={**elsewhere, "path": sample_path(config.dataset)})
    index = replace(
        _source(config.dataset).read(config),
        name=config.dataset,
        licence=licence_of(config.dataset, smoke=smoke),
        channels=DATASETS[config.dataset].channels,
    )
    classes = len(index.class_names)
    if classes < 2:
        message = f"holds {classes} classes ({', '.join(index.class_names)}), at least 2 are needed"
        raise UserError(message, file=config.path, field="data.path")
    check_class_names(index.class_names, config.path, "data.path")
    return index if config.interpolation is None else replace(index, interpolation=config.interpolation)


def _source(dataset: str) -> DataSource:
    source: DataSource = import_module(f"peft_vit.data.{DATASETS[dataset].module}").SOURCES[dataset]
    return source


def sample_path(dataset: str) -> str | None:
    """Return what `data.path` is in a smoke run: a data set's synthetic files, written to the cache on first use."""
    source = _source(dataset)
    if source.write_sample is None:
        return None
    folder = cache_dir() / "smoke" / f"{dataset}-v{_SAMPLES_VERSION}"
    if not folder.is_dir():
        with new_in_cache(folder) as temporary:
            temporary.mkdir()
            source.write_sample(temporary)
    return str(folder / source.sample_file)


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
            "train_images": max(16, _source(config.dataset).sample_classes),
            "shots_per_class": None,
            "validation_images": 8 if config.validation_images else 0,
            "test_images": None if config.test_images is None else 8,
        }
    )


def thumbnails(config: DataConfig, positions: Sequence[int], *, data_sha256: str, smoke: bool = False) -> list[bytes]:
    """Return a few images as PNG for a report, the longer side 96 pixels; smaller ones are enlarged without smoothing.

    Nothing is downloaded for them.

    Args:
        config: which data set, and where it lies.
        positions: in the data set.
        data_sha256: of the images that a run saw.
        smoke: the synthetic files, see `open_index`.

    Raises:
        UserError: if the images are not on this machine, are others than those, or can't be decoded.
    """
    with no_downloads():
        index = open_index(config, smoke=smoke)
    if index.sha256 != data_sha256 or not all(0 <= position < len(index.labels) for position in positions):
        raise UserError(f"the images of {config.dataset} on this machine are not those of the run", field="data")
    pictures = []
    for position in positions:
        plain = on_white(index.read(position)).convert("L" if index.channels == 1 else "RGB")
        scale = _THUMBNAIL_SIDE / max(plain.size)
        size = (max(1, round(plain.width * scale)), max(1, round(plain.height * scale)))
        file = io.BytesIO()
        resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
        plain.resize(size, resampling).save(file, format="PNG", optimize=True)
        pictures.append(file.getvalue())
    return pictures


def thumbnails_of(record: RunRecord, positions: Sequence[int]) -> list[bytes]:
    """Return `thumbnails` of images that a run saw."""
    spec, origin = record.spec, record.provenance
    return thumbnails(spec.data, positions, data_sha256="" if origin is None else origin.data_sha256, smoke=spec.smoke)
