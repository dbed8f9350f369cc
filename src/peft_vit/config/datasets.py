"""The data sets, as far as a configuration and a report know them: an entry each in `DATASETS`.

How a set is read stands in the module of `data` that its entry names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What is known of a data set before it is opened.

    Attributes:
        images: how many, of what, and at which size.
        classes: how many, and which images test.
        licence: of the images: what to know before showing them to others.
        origin: where its files come from.
        module: of `data`; its SOURCES say how the set is read.
        channels: 1 if all images are grey, and so is what is predicted on later.
        needs_path: nothing can be read without `data.path`.
        caveat: what no study on it can show, for reports.
    """

    images: str
    classes: str
    licence: str
    origin: str
    module: str
    channels: Literal[1, 3] = 3
    needs_path: bool = False
    caveat: str = ""


def _cifar(classes: int) -> DatasetInfo:
    return DatasetInfo(
        images="60,000 photographs, 32 x 32 colour",
        classes=f"{classes}; 10,000 official test images",
        licence="no licence stated by its authors",
        origin="data.path (binary archive, or folder with it), else downloaded from cs.toronto.edu",
        module="packaged",
    )


DATASETS: dict[str, DatasetInfo] = {
    "elpv": DatasetInfo(
        images="2,624 electroluminescence images of solar cells, 300 x 300 grey",
        classes="2, defect probability >= 0.5; stratified by label and module type; no official test split",
        licence="CC BY-NC-SA 4.0: research only, no commercial use",
        origin="PyPI wheel elpv-dataset, fetched once",
        module="packaged",
        channels=1,
        caveat="New solar modules: the images do not say which module a cell belongs to, so cells of "
        "one module can stand in training and in test.",
    ),
    "digits": DatasetInfo(
        images="1,797 handwritten digits, 8 x 8 grey",
        classes="10; no official test split",
        licence="CC BY 4.0 (UCI)",
        origin="comes with scikit-learn",
        module="packaged",
        channels=1,
    ),
    "fashion-mnist": DatasetInfo(
        images="70,000 pieces of clothing, 28 x 28 grey",
        classes="10; 10,000 official test images",
        licence="MIT",
        origin="data.path (folder of idx .gz files), else Debian's dataset-fashion-mnist, else downloaded",
        module="packaged",
        channels=1,
    ),
    "cifar10": _cifar(10),
    "cifar100": _cifar(100),
    "tiny-imagenet": DatasetInfo(
        images="110,000 labelled photographs, 64 x 64 colour",
        classes="200; the 10,000 official validation images serve as the test split",
        licence="ImageNet's terms: research and education, not commercial",
        origin="data.path (tiny-imagenet-200.zip or its folder), else downloaded from cs231n.stanford.edu",
        module="folders",
    ),
    "image-folder": DatasetInfo(
        images="your own images, ROOT/<class>/<image>",
        classes="folders; ROOT/train with ROOT/test or ROOT/val is an official test split",
        licence="your own images: their licence is yours to know",
        origin="data.path (folder or zip)",
        module="folders",
        needs_path=True,
    ),
    "csv": DatasetInfo(
        images="your own images, listed in a CSV",
        classes="labels; split: test is an official test split",
        licence="your own images: their licence is yours to know",
        origin="data.path (CSV with the columns path, label[, split])",
        module="folders",
        needs_path=True,
    ),
    "hf": DatasetInfo(
        images="a set of Hugging Face's hub, or your own Parquet files or images, by the library datasets",
        classes="labels of one column; split test, or else validation, is an official test split",
        licence="as its card on the hub says, if it has one; of your own images it is yours to know",
        origin="data.path (name on the hub; folder of Parquet files, images or save_to_disk); extra peft-vit[hf]",
        module="hf",
        needs_path=True,
    ),
}


def licence_of(dataset: str, *, smoke: bool) -> str:
    """Return the terms of the images that a study of a data set shows."""
    return "synthetic images, none needed" if smoke and dataset != "digits" else DATASETS[dataset].licence
