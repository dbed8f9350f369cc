"""Readers of published sets with files of their own kind: ELPV, digits, Fashion-MNIST, CIFAR and Tiny ImageNet."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from peft_vit.base.errors import UserError, foreign_fault
from peft_vit.base.files import LARGEST_BYTES, open_regular, read_bytes
from peft_vit.base.packages import ELPV_WHEEL, cache_dir, check_download, fetch_wheel
from peft_vit.core.config import IMAGE_SIZES, DataConfig
from peft_vit.core.tasks import CLASSIFICATION
from peft_vit.data.files import (
    FETCH_AGAIN,
    decode_text,
    downloaded,
    existing,
    hashes,
    new_in_cache,
    open_tree,
    unpacked,
)
from peft_vit.data.index import ImageIndex, check_class_names
from peft_vit.data.pixels import decode_image

# --- ELPV: a wheel ----------------------------------------------------------------------------------------------------

_MODULE_TYPES = ("mono", "poly")


def read_elpv(config: DataConfig) -> ImageIndex:
    """Index the ELPV solar cells, out of the wheel or another zip or folder with its labels.csv.

    labels.csv has a line per image: path, defect probability (0, 1/3, 2/3 or 1) and module type (mono or
    poly), between spaces. The binary label is probability >= 0.5; strata are label x module type.
    """
    tree = open_tree(fetch_wheel(ELPV_WHEEL) if config.path is None else existing(config.path))
    table = tree.only("labels.csv")
    present = set(tree.names)
    names, labels, modules = [], [], []
    for number, line in enumerate(tree.lines(table), start=1):
        where = f"{tree.file(table)}:{number}"
        try:
            name, probability, module = line.split()
            if not 0 <= float(probability) <= 1:
                raise ValueError
            labels.append(int(float(probability) >= 0.5))
            modules.append(_MODULE_TYPES.index(module))
        except ValueError:
            raise UserError(f"expected 'path probability mono|poly', got {line[:80]!r}", file=where) from None
        names.append(str(PurePosixPath(table).parent / name))
        if names[-1] not in present:
            raise UserError(f"{name} is not there; fetch the data set again", file=where)
    label = np.array(labels, dtype=np.int64)
    return ImageIndex(
        labels=label,
        own_strata=label * len(_MODULE_TYPES) + np.array(modules, dtype=np.int64),
        class_names=("functional", "defective"),
        official_test=None,
        sha256=tree.hashed([table, *names]).sha256,
        read=lambda i: decode_image(lambda: tree.read(names[i]), tree.file(names[i])),
        names=names,
    )


# --- digits: in scikit-learn ------------------------------------------------------------------------------------------


def read_digits(config: DataConfig) -> ImageIndex:
    """Index scikit-learn's 1,797 handwritten digits; their 8 x 8 values 0..16 become grey levels 0..255."""
    if config.path is not None:
        raise UserError(
            "has no effect with dataset: digits, which comes with scikit-learn; remove it", field="data.path"
        )
    # The import of scikit-learn takes 90 MB of memory.
    file = metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(file), delimiter=",")  # (N, 65)
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
    labels = table[:, -1].astype(np.int64)
    return ImageIndex(
        labels=labels,
        class_names=tuple("0123456789"),
        official_test=None,
        sha256=hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest(),
        read=lambda i: Image.fromarray(pixels[i]),
    )


def digits_folder() -> Path:
    """Return a folder of the digits in the cache, as somebody's own would be; it is written if it is not there."""
    folder = cache_dir() / "digits"
    if not folder.is_dir():
        index = read_digits(DataConfig(dataset="digits", image_size=IMAGE_SIZES[0], validation_images=0))
        with new_in_cache(folder) as made:
            for label, name in enumerate(index.class_names):
                (made / name).mkdir(parents=True)
                for i in np.flatnonzero(index.labels == label).tolist():
                    index.read(i).save(made / name / f"{i:04}.png")
    return folder


# --- Fashion-MNIST: idx files, Debian's or downloaded -----------------------------------------------------------------

_FASHION_CLASSES = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


def read_fashion_mnist(config: DataConfig) -> ImageIndex:
    """Index Fashion-MNIST from its four idx .gz files.

    Without a path they are those of Debian's dataset-fashion-mnist, or are downloaded.
    """
    folder = _fashion_folder() if config.path is None else existing(config.path)
    pixels, labels = [], []
    files: dict[str, Path] = {}
    for split in ("train", "t10k"):
        images_file = folder / f"{split}-images-idx3-ubyte.gz"
        labels_file = folder / f"{split}-labels-idx1-ubyte.gz"
        pixels.append(read_idx(images_file, dimensions=3))
        labels.append(read_idx(labels_file, dimensions=1).astype(np.int64))
        files |= {images_file.name: images_file, labels_file.name: labels_file}
        if len(pixels[-1]) != len(labels[-1]):
            raise UserError(f"holds {len(labels[-1])} labels for {len(pixels[-1])} images", file=labels_file)
        if labels[-1].size and labels[-1].max() >= len(_FASHION_CLASSES):
            raise UserError(f"holds label {labels[-1].max()}, expected 0 to 9; {FETCH_AGAIN}", file=labels_file)
    images = np.concatenate(pixels)  # (N, 28, 28)
    return ImageIndex(
        labels=np.concatenate(labels),
        class_names=_FASHION_CLASSES,
        official_test=np.arange(len(images)) >= len(pixels[0]),
        sha256=hashes(files).sha256,
        read=lambda i: Image.fromarray(images[i]),
    )


def _fashion_folder() -> Path:
    prefixes = (Path(sysconfig.get_path("data")), Path(sys.base_prefix), Path("/usr/local"), Path("/usr"))
    for folder in (prefix / "share" / "datasets" / "fashion-mnist" for prefix in prefixes):
        if folder.is_dir():
            return folder
    root = cache_dir() / "downloads"
    folder = root / "FashionMNIST" / "raw"
    if not folder.is_dir():
        check_download("Fashion-MNIST")
    from torchvision.datasets import FashionMNIST

    with foreign_fault(
        "Fashion-MNIST could not be downloaded",
        remedy="install Debian's package dataset-fashion-mnist, or name the folder with its idx .gz files",
        field="data.path",
    ):
        FashionMNIST(str(root), download=True)  # checks each file's md5
    return folder


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Read an idx .gz file of unsigned bytes (format: yann.lecun.com/exdb/mnist, end of page).

    The header is 0, 0, 8 (unsigned byte), the number of dimensions, then each size as a big-endian 32-bit
    integer.

    Raises:
        UserError: if it is missing, broken, or of another shape than its header says.
    """
    if not file.exists():
        message = "is missing; name the folder that holds the four idx .gz files"
        raise UserError(message, file=file, field="data.path")
    fault = foreign_fault("is not a readable .gz", file, remedy=FETCH_AGAIN)
    with fault, open_regular(file) as zipped, gzip.open(zipped) as unzipped:
        header = unzipped.read(4 + 4 * dimensions)
        if header[:4] != bytes((0, 0, 8, dimensions)):
            raise UserError(f"is not an idx file of bytes in {dimensions} dimensions; {FETCH_AGAIN}", file=file)
        shape = struct.unpack(f">{dimensions}I", header[4:])
        expected = math.prod(shape)
        if expected > LARGEST_BYTES:
            raise OSError(f"its header asks for {expected} bytes")
        values = unzipped.read(expected + 1)  # and no more of what may be a bomb
    if len(values) != expected:
        count = f"more than {expected}" if len(values) > expected else len(values)
        raise UserError(f"holds {count} values, its header says {shape}; {FETCH_AGAIN}", file=file)
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


# --- CIFAR: binary archives, of which nothing is unpickled ------------------------------------------------------------

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class CifarFiles:
    """Names in a CIFAR archive, and how many bytes of labels are before an image's pixels."""

    archive: str
    md5: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int  # the last of them is the class; CIFAR-100 has the coarse class before it


CIFAR = {
    "cifar10": CifarFiles(
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
        1,
    ),
    "cifar100": CifarFiles(
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        ("train.bin",),
        "test.bin",
        "fine_label_names.txt",
        2,
    ),
}


def _read_cifar(config: DataConfig) -> ImageIndex:
    """Index CIFAR-10 or CIFAR-100 (format: cs.toronto.edu/~kriz/cifar.html, binary version).

    A record is one label byte (CIFAR-100: coarse, then fine) and 3,072 bytes: red, green and blue planes of
    32 x 32. The path is the folder of the unpacked archive; without one it is downloaded.
    """
    layout = CIFAR[config.dataset]
    batches, remedy = (*layout.train, layout.test), "unpack the binary archive again"
    wanted = (*batches, layout.names)
    if config.path is None:
        archive = downloaded(f"https://www.cs.toronto.edu/~kriz/{layout.archive}", layout.md5)
        sha256 = hashes({"": archive}).sha256
        folder = next(unpacked(archive, sha256).rglob(layout.test)).parent
    else:
        folder = existing(config.path)
        if missing := [name for name in wanted if not (folder / name).is_file()]:
            raise UserError(
                f"is missing; name the folder of {layout.archive}, unpacked",
                file=folder / missing[0],
                field="data.path",
            )
        sha256 = hashes({name: folder / name for name in wanted}).sha256
    lines = decode_text(read_bytes(folder / layout.names), folder / layout.names, remedy).splitlines()
    class_names = tuple(line.strip() for line in lines if line.strip())
    check_class_names(class_names, folder / layout.names, remedy=remedy)
    labels, images = [], []
    for file in (folder / batch for batch in batches):
        size = file.stat().st_size
        if size == 0 or size % (layout.label_bytes + _PIXELS):
            raise UserError(f"is {size} bytes, not a multiple of a record; {remedy}", file=file)
        records = np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, layout.label_bytes + _PIXELS)  # (N, bytes)
        labels.append(records[:, layout.label_bytes - 1].astype(np.int64))
        if (largest := labels[-1].max()) >= len(class_names):
            message = f"a label is {largest}, but {layout.names} names {len(class_names)} classes; {remedy}"
            raise UserError(message, file=file)
        images += list(records[:, layout.label_bytes :].reshape(-1, 3, _SIDE, _SIDE))  # mapped into memory: no copies

    def read(i: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(images[i].transpose(1, 2, 0)))  # (3, S, S) -> (S, S, 3)

    return ImageIndex(
        labels=np.concatenate(labels),
        class_names=class_names,
        official_test=np.arange(len(images)) >= len(images) - len(labels[-1]),
        sha256=sha256,
        read=read,
    )


# --- Tiny ImageNet ----------------------------------------------------------------------------------------------------


_TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def read_tiny_imagenet(config: DataConfig) -> ImageIndex:
    """Index Tiny ImageNet. Its test images have no labels, so its validation images are the test split.

    The path is tiny-imagenet-200.zip, or its unpacked folder; without one it is downloaded.
    """
    tree = open_tree(downloaded(_TINY_URL, _TINY_MD5) if config.path is None else existing(config.path))
    words_file, annotations_file = tree.only("words.txt"), tree.only("val/val_annotations.txt")
    root = PurePosixPath(words_file).parent
    classes: dict[str, str] = {}
    for name in tree.names:
        match PurePosixPath(name).parts[len(root.parts) :]:
            case ("train", wordnet_id, "images", _):
                classes[name] = wordnet_id
    known, present, training = set(classes.values()), set(tree.names), len(classes)
    for number, line in enumerate(tree.lines(annotations_file), start=1):
        where = f"{tree.file(annotations_file)}:{number}"
        image, wordnet_id = [*line.split("\t"), "", ""][:2]
        name = str(root / "val" / "images" / image)
        if wordnet_id not in known:
            raise UserError(f"class {wordnet_id!r} has no training image; unpack the archive again", file=where)
        if name not in present:
            raise UserError(f"val/images/{image} is not there; unpack the archive again", file=where)
        classes[name] = wordnet_id
    words = dict(line.split("\t", 1) for line in tree.lines(words_file) if "\t" in line)
    titles = {id_: f"{id_} {words.get(id_, '').split(',')[0]}".strip() for id_ in known}
    check_class_names(titles.values(), tree.file(words_file))
    present_ids, labels = CLASSIFICATION.read([*classes.values()], ())
    files = [*classes]
    return ImageIndex(
        labels=labels,
        class_names=tuple(titles[id_] for id_ in present_ids),
        official_test=np.arange(len(files)) >= training,
        sha256=tree.hashed([words_file, annotations_file, *files]).sha256,
        read=lambda i: decode_image(lambda: tree.read(files[i]), tree.file(files[i])),
        names=files,
    )


SOURCES = {
    "elpv": read_elpv,
    "digits": read_digits,
    "fashion-mnist": read_fashion_mnist,
    **dict.fromkeys(CIFAR, _read_cifar),
    "tiny-imagenet": read_tiny_imagenet,
}
