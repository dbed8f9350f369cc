"""The data sets by name: what they are, and which reader opens them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from peft_vit.config import DataConfig
from peft_vit.data import synthetic
from peft_vit.data.cifar import read_cifar
from peft_vit.data.files import existing
from peft_vit.data.folders import read_csv, read_image_folder, read_tiny_imagenet
from peft_vit.data.hf import read_hf
from peft_vit.data.index import ImageIndex, check_class_names
from peft_vit.data.packaged import read_digits, read_elpv, read_fashion_mnist
from peft_vit.errors import UserError


@dataclass(frozen=True)
class DatasetInfo:
    """What a user should know before choosing a data set, and what indexes it."""

    description: str
    licence: str
    source: str
    task: str
    read: Callable[[DataConfig], ImageIndex]
    channels: Literal[1, 3] = 3  # 1: grey, and so is what is predicted on later


def _files(read: Callable[[Path | None], ImageIndex]) -> Callable[[DataConfig], ImageIndex]:
    """Give a reader of files their path, which has to exist if there is one."""
    return lambda config: read(None if config.path is None else existing(config.path))


def _cifar(name: str, classes: int) -> DatasetInfo:
    return DatasetInfo(
        "60,000 photographs, 32 x 32 colour",
        "none stated by the authors; cite Krizhevsky 2009",
        "data.path (binary archive, or folder with it), else downloaded from cs.toronto.edu",
        f"{classes} classes; 10,000 official test images",
        _files(partial(read_cifar, name)),
    )


DATASETS: dict[str, DatasetInfo] = {
    "elpv": DatasetInfo(
        "2,624 electroluminescence images of solar cells, 300 x 300 grey",
        "CC BY-NC-SA 4.0: research only, no commercial use",
        "PyPI wheel elpv-dataset, fetched once",
        "binary: defect probability >= 0.5; stratified by label and module type; no official test split",
        _files(read_elpv),
        channels=1,
    ),
    "digits": DatasetInfo(
        "1,797 handwritten digits, 8 x 8 grey",
        "CC BY 4.0 (UCI)",
        "comes with scikit-learn",
        "10 classes; no official test split",
        _files(read_digits),
        channels=1,
    ),
    "fashion-mnist": DatasetInfo(
        "70,000 pieces of clothing, 28 x 28 grey",
        "MIT",
        "data.path (folder of idx .gz files), else Debian's dataset-fashion-mnist, else downloaded",
        "10 classes; 10,000 official test images",
        _files(read_fashion_mnist),
        channels=1,
    ),
    "cifar10": _cifar("cifar10", 10),
    "cifar100": _cifar("cifar100", 100),
    "tiny-imagenet": DatasetInfo(
        "110,000 labelled photographs, 64 x 64 colour",
        "ImageNet's terms: research and education, not commercial",
        "data.path (tiny-imagenet-200.zip or its folder), else downloaded from cs231n.stanford.edu",
        "200 classes; the 10,000 official validation images serve as the test split",
        _files(read_tiny_imagenet),
    ),
    "image-folder": DatasetInfo(
        "your own images, ROOT/<class>/<image>",
        "yours",
        "data.path (folder or zip)",
        "classes are folders; ROOT/train with ROOT/test or ROOT/val is an official test split",
        lambda config: read_image_folder(
            None if config.path is None else existing(config.path),
            None if config.images_file is None else Path(config.images_file).expanduser(),
        ),
    ),
    "csv": DatasetInfo(
        "your own images, listed in a CSV",
        "yours",
        "data.path (CSV with the columns path, label[, split])",
        "classes are labels; split: test is an official test split",
        _files(read_csv),
    ),
    "hf": DatasetInfo(
        "a set of Hugging Face's hub, or your own Parquet files or images, by the library datasets",
        "as its card on the hub says, or yours",
        "data.path (name on the hub; folder of Parquet files, images or save_to_disk); extra peft-vit[hf]",
        "classes are labels of one column; split test, or else validation, is an official test split",
        read_hf,
    ),
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
    index = replace(info.read(config), name=config.dataset, licence=licence, channels=info.channels)
    classes = len(index.class_names)
    if classes < 2:
        raise UserError(
            f"holds {classes} classes ({', '.join(index.class_names)}), at least 2 are needed",
            file=config.path,
            field="data.path",
        )
    check_class_names(index.class_names, config.path, "data.path")
    return index if config.interpolation is None else replace(index, interpolation=config.interpolation)
