"""The data sets by name: what they are, and which reader opens them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from peft_vit.config import DATASETS, DataConfig
from peft_vit.data import synthetic
from peft_vit.data.cifar import read_cifar
from peft_vit.data.files import existing
from peft_vit.data.folders import read_csv, read_image_folder, read_tiny_imagenet
from peft_vit.data.hf import read_hf
from peft_vit.data.index import ImageIndex, check_class_names
from peft_vit.data.packaged import read_digits, read_elpv, read_fashion_mnist
from peft_vit.errors import UserError


def _files(read: Callable[[Path | None], ImageIndex]) -> Callable[[DataConfig], ImageIndex]:
    """Give a reader of files their path, which has to exist if there is one."""
    return lambda config: read(None if config.path is None else existing(config.path))


_READERS: dict[str, Callable[[DataConfig], ImageIndex]] = {
    "elpv": _files(read_elpv),
    "digits": _files(read_digits),
    "fashion-mnist": _files(read_fashion_mnist),
    "cifar10": _files(partial(read_cifar, "cifar10")),
    "cifar100": _files(partial(read_cifar, "cifar100")),
    "tiny-imagenet": _files(read_tiny_imagenet),
    "image-folder": lambda config: read_image_folder(
        None if config.path is None else existing(config.path),
        None if config.images_file is None else Path(config.images_file).expanduser(),
    ),
    "csv": _files(read_csv),
    "hf": read_hf,
}


def open_index(config: DataConfig, *, smoke: bool = False) -> ImageIndex:
    """Open a data set without decoding an image.

    Args:
        config: which set, and where it lies.
        smoke: read small synthetic files of the same on-disk format instead of the real ones, and ignore
            `config.path` and what else says where they lie. (digits is real, it needs no file.)

    Raises:
        UserError: if it is not there, broken, has fewer than two classes, or one that could not be printed.
    """
    info = DATASETS[config.dataset]
    licence = info.licence
    if smoke and config.dataset != "digits":
        licence = "synthetic images, no licence needed"
        elsewhere = dict.fromkeys(("images_file", "image_column", "label_column", "hub_subset"))
        config = config.model_copy(update={**elsewhere, "path": str(synthetic.files_for(config.dataset))})
    index = replace(_READERS[config.dataset](config), name=config.dataset, licence=licence, channels=info.channels)
    classes = len(index.class_names)
    if classes < 2:
        raise UserError(
            f"holds {classes} classes ({', '.join(index.class_names)}), at least 2 are needed",
            file=config.path,
            field="data.path",
        )
    check_class_names(index.class_names, config.path, "data.path")
    return index if config.interpolation is None else replace(index, interpolation=config.interpolation)
