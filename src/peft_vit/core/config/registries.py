"""What there is to choose from: data sets (`DATASETS`), formats of exported models (`EXPORTS`), number formats.

How a set is read is in the module of `data` that its entry names, how a format is written in that of `deployment`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What is known of a data set before it is opened.

    Attributes:
        images: how many, of what, and at which size.
        classes: how many, and which images test.
        licence: of the images: what to know before showing them to others.
        origin: where its files come from.
        module: of `data`; its SOURCES hold what reads the set.
        channels: 1 if all images are grey, and so is what is predicted on later.
        needs_path: nothing can be read without `data.path`.
        caveat: what no study on it can show, for reports.
    """

    images: str
    classes: str
    licence: str
    origin: str
    module: str = "packaged"
    channels: Literal[1, 3] = 3
    needs_path: bool = False
    caveat: str = ""


def _cifar(classes: int) -> DatasetInfo:
    return DatasetInfo(
        images="60,000 photographs, 32 x 32 colour",
        classes=f"{classes}; 10,000 official test images",
        licence="no licence stated by its authors",
        origin="data.path (folder of the unpacked binary archive), else downloaded from cs.toronto.edu",
    )


DATASETS: dict[str, DatasetInfo] = {
    "elpv": DatasetInfo(
        images="2,624 electroluminescence images of solar cells, 300 x 300 grey",
        classes="2, defect probability >= 0.5; stratified by label and module type; no official test split",
        licence="CC BY-NC-SA 4.0: research only, no commercial use",
        origin="PyPI wheel elpv-dataset, fetched once",
        channels=1,
        caveat="New solar modules: the images do not say which module a cell belongs to, so cells of one module "
        "can be in training and in test.",
    ),
    "digits": DatasetInfo(
        images="1,797 handwritten digits, 8 x 8 grey",
        classes="10; no official test split",
        licence="CC BY 4.0 (UCI)",
        origin="comes with scikit-learn",
        channels=1,
    ),
    "fashion-mnist": DatasetInfo(
        images="70,000 pieces of clothing, 28 x 28 grey",
        classes="10; 10,000 official test images",
        licence="MIT",
        origin="data.path (folder of idx .gz files), else Debian's dataset-fashion-mnist, else downloaded",
        channels=1,
    ),
    "cifar10": _cifar(10),
    "cifar100": _cifar(100),
    "tiny-imagenet": DatasetInfo(
        images="110,000 labelled photographs, 64 x 64 colour",
        classes="200; the 10,000 official validation images serve as the test split",
        licence="ImageNet's terms: research and education, not commercial",
        origin="data.path (tiny-imagenet-200.zip or its folder), else downloaded from cs231n.stanford.edu",
    ),
    "image-folder": DatasetInfo(
        images="your own images, ROOT/<class>/<image>",
        classes="folders; ROOT/train with ROOT/test or ROOT/val is an official test split",
        licence="your images",
        origin="data.path (folder or zip)",
        module="folders",
        needs_path=True,
    ),
    "csv": DatasetInfo(
        images="your own images, listed in a CSV or Parquet file",
        classes="labels; split: test is an official test split",
        licence="your images",
        origin="data.path (file with the columns path, label[, split])",
        module="folders",
        needs_path=True,
    ),
    "webdataset": DatasetInfo(
        images="your own images in shards: tar files, a sample's image and label side by side (`0001.jpg`, `0001.cls`)",
        classes=".cls, .txt, or label or class in .json; shards named test, or else val, are an official test split",
        licence="your images",
        origin="data.path (a .tar, a folder, a pattern such as shards/*.tar, or an address of them such as s3://...)",
        module="folders",
        needs_path=True,
    ),
    "hf": DatasetInfo(
        images="a set of Hugging Face's hub, or your own Parquet files or images, by the library datasets",
        classes="labels of one column; split test, or else validation, is an official test split",
        licence="see its card on the hub; or your images",
        origin="data.path (name on the hub; folder of Parquet files, images or save_to_disk); extra peft-vit[hf]",
        module="hf",
        needs_path=True,
    ),
}


def licence_of(dataset: str, *, smoke: bool) -> str:
    """Return the terms of the images that a study of a data set shows."""
    return "synthetic images, none needed" if smoke else DATASETS[dataset].licence


# --- formats of exported models ---


@dataclass(frozen=True)
class ExportFormat:
    """What commands have to know of a format without loading torch."""

    title: str
    what: str  # its file is
    writer: str  # of `deployment`: module and function, (model, path, card) -> None
    opener: str  # of `deployment`: module and function, path -> Classifier
    ending: str = ""  # of its file; "": it is a folder
    beside: tuple[str, ...] = ()  # endings of files that lie beside that
    runtime: str = "torch"  # the package that computes
    extra: str | None = None  # of pyproject.toml, that it needs

    @property
    def output(self) -> str:
        """Return what is written."""
        more = "".join(f", a {ending} comes beside it" for ending in self.beside)
        return f"a {self.ending} file{more}" if self.ending else "a new or empty folder"


EXPORTS: dict[str, ExportFormat] = {
    "onnx": ExportFormat(
        "ONNX",
        "the whole model for onnxruntime",
        "onnx_file.export_onnx",
        "runtimes.open_onnx",
        ".onnx",
        runtime="onnxruntime",
        extra="onnx",
    ),
    "openvino": ExportFormat(
        "OpenVINO",
        "the same for OpenVINO",
        "openvino_file.export_openvino",
        "runtimes.open_openvino",
        ".xml",
        (".bin",),
        runtime="openvino",
        extra="openvino",
    ),
    "safetensors": ExportFormat(
        "safetensors",
        "the whole model, quantized layers packed",
        "torch_files.save_low_bit",
        "torch_files.open_low_bit",
        ".safetensors",
    ),
    "pretrained": ExportFormat(
        "timm or transformers",
        "a folder that timm or transformers loads, all weights as floats",
        "torch_files.save_pretrained",
        "torch_files.open_pretrained",
    ),
}


CARD_FILE = "peft_vit.json"  # in an exported folder: what its model is, and how images become its input
PEFT_FILE = "adapter_config.json"  # by which PEFT knows a folder of its own
BUNDLE_FILE = "backbone.safetensors"  # in a folder of adapters' files: the backbone of all of them


def exported_format(path: Path) -> str | None:
    """Return the format of a file by the ending of its name, or of a folder by the files in it; None if it is none's.

    A folder with an adapter alone is "peft", which is not a whole model and not among EXPORTS.
    """
    if os.path.isfile(path / PEFT_FILE):  # unlike Path.is_file, also False for an impossible name
        return "peft"
    return "pretrained" if os.path.isfile(path / CARD_FILE) else format_of_name(path)


def is_bundle(path: Path) -> bool:
    """Tell whether a path is a folder of adapters and their backbone."""
    return os.path.isfile(path / BUNDLE_FILE)


def format_of_name(path: Path) -> str | None:
    """Return the format of a file by the ending of its name; None if it is none's."""
    return next((name for name, kind in EXPORTS.items() if kind.ending and kind.ending == path.suffix), None)


def exported_bytes(model: Path) -> int:
    """Return the bytes of an exported model: of a folder all files, else with what lies beside the file."""
    if model.is_dir():
        return sum(part.stat().st_size for part in model.iterdir() if part.is_file())
    name = exported_format(model)
    parts = [model, *map(model.with_suffix, () if name is None else EXPORTS[name].beside)]
    return sum(part.stat().st_size for part in parts)


# --- number formats ---
#
# Codebooks are tables of values, in the order of their codes; with integers the code is the number. Their values, order
# and treatment of ties are those of bitsandbytes 0.50 (``functional.get_4bit_type``, quantization on CPU), so that both
# mean the same numbers by the same codes.
#
# NF4 (QLoRA, arXiv 2305.14314, section 3 and appendix E): quantiles of the normal distribution, scaled so that the
# outermost are -1 and 1; seven values below an exact zero, eight above.
#
# FP4: a sign, two bits of exponent and one of fraction. Its values are not sorted, and two of them are zero.


@dataclass(frozen=True)
class NumberFormat:
    """What a code stands for, before scale and offset.

    Attributes:
        bits: of a code.
        values: of a codebook's 2^bits codes, in [-1, 1]; None: codes are integers.
    """

    bits: int
    values: tuple[float, ...] | None = None


_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Magnitudes of the bit patterns 000 to 111; the fourth bit is the sign. Code 8 means 0, not minus 0.
_FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)

NUMBER_FORMATS: dict[str, NumberFormat] = {
    "nf4": NumberFormat(4, _NF4),
    "fp4": NumberFormat(4, (*_FP4_MAGNITUDES, *(0 - value for value in _FP4_MAGNITUDES))),
    "int2": NumberFormat(2),
    "int3": NumberFormat(3),
    "int4": NumberFormat(4),
    "int8": NumberFormat(8),
}
TYPE_OF_BITS = {"8": "int8", "4": "nf4", "3": "int3", "2": "int2"}  # where only the bits are said
BITS_OF_TYPE: dict[str, int] = {name: format.bits for name, format in NUMBER_FORMATS.items()}
if TYPE_CHECKING:
    QuantizationType = str
    WrittenBits = str
    Bits = int
else:
    QuantizationType = Literal[tuple(NUMBER_FORMATS)]
    WrittenBits = Literal[(*TYPE_OF_BITS, *NUMBER_FORMATS)]
    Bits = Literal[tuple(sorted(set(BITS_OF_TYPE.values())))]


def type_of_bits(written: WrittenBits) -> QuantizationType:
    """Return the number format that `--bits` asks for: a name, or bits alone."""
    return TYPE_OF_BITS.get(written, written)
