"""Small synthetic files in the on-disk format of each data set: a smoke run reads them with the real readers.

The images are noise around a grey level or colour that tells the class: enough to see a loss go down, nothing
to conclude from. Everything is deterministic, down to the time stamps inside archives.
"""

from __future__ import annotations

import csv
import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from peft_vit.data.cifar import LAYOUTS
from peft_vit.data.files import new_in_cache
from peft_vit.packages import cache_dir

_VERSION = 2  # raise when the files change
# Where the format fixes the number of classes, it is the real one.
CLASS_COUNTS = {
    "elpv": 2,
    "digits": 10,
    "fashion-mnist": 10,
    "cifar10": 10,
    "cifar100": 100,
    "tiny-imagenet": 4,
    "image-folder": 3,
    "csv": 3,
    "hf": 3,
}
_TIME = (2000, 1, 1, 0, 0, 0)


def files_for(dataset: str) -> Path | None:
    """Return the file or folder with a data set's synthetic files, written to the cache on first use.

    Returns:
        What `data.path` would be; None for digits, which need no file.
    """
    if dataset == "digits":
        return None
    folder = cache_dir() / "smoke" / f"{dataset}-v{_VERSION}"
    if not folder.is_dir():
        with new_in_cache(folder) as temporary:
            temporary.mkdir()
            _WRITERS[dataset](temporary)
    return folder / _ENTRY.get(dataset, "")


def _images(labels: np.ndarray, classes: int, side: int, channels: int, file: int = 0) -> np.ndarray:
    """Return (N, side, side) or (N, side, side, 3) uint8: a level per class and channel, and each file's own noise."""
    rng = np.random.default_rng([_VERSION, classes, side])
    levels = rng.permuted(np.tile(np.linspace(40, 215, classes), (channels, 1)), axis=1)  # (C, K)
    noise = np.random.default_rng([_VERSION, classes, side, file]).normal(0, 25, (len(labels), side, side, channels))
    pixels = np.clip(levels.T[labels][:, None, None, :] + noise, 0, 255).astype(np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def _balanced(classes: int, each: int) -> np.ndarray:
    return np.tile(np.arange(classes), each)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _save(pixels: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def _write_elpv(folder: Path) -> None:
    probabilities = np.tile([0.0, 1 / 3, 2 / 3, 1.0], 16)
    modules = np.repeat(["mono", "poly"], 32)
    pixels = _images((probabilities >= 0.5).astype(int), 2, 48, 1)
    names = [f"images/cell{i + 1:04d}.png" for i in range(len(pixels))]
    lines = [f"{n}  {p!r:<20}{m}" for n, p, m in zip(names, probabilities.tolist(), modules, strict=True)]
    with zipfile.ZipFile(folder / _ENTRY["elpv"], "w") as archive:
        archive.writestr(zipfile.ZipInfo("elpv_dataset/data/labels.csv", _TIME), "\n".join(lines) + "\n")
        for name, image in zip(names, pixels, strict=True):
            archive.writestr(zipfile.ZipInfo(f"elpv_dataset/data/{name}", _TIME), _png(image))


def _write_fashion_mnist(folder: Path) -> None:
    for file, (split, each) in enumerate((("train", 8), ("t10k", 2))):
        labels = _balanced(10, each)
        _write_idx(folder / f"{split}-images-idx3-ubyte.gz", _images(labels, 10, 28, 1, file))
        _write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels.astype(np.uint8))


def _write_idx(file: Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    file.write_bytes(gzip.compress(header + values.tobytes(), mtime=0))


def _write_cifar(dataset: str, folder: Path) -> None:
    layout, classes = LAYOUTS[dataset], CLASS_COUNTS[dataset]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for file, name in enumerate((*layout.train, layout.test)):
            labels = _balanced(classes, 2)
            pixels = _images(labels, classes, 32, 3, file)  # (N, 32, 32, 3)
            planes = pixels.transpose(0, 3, 1, 2).reshape(len(labels), -1)  # (N, 3, 32, 32) -> (N, 3072)
            leading = np.repeat(labels[:, None], layout.label_bytes, axis=1).astype(np.uint8)
            _add(archive, f"{dataset}/{name}", np.hstack([leading, planes]).tobytes())
        _add(archive, f"{dataset}/{layout.names}", "".join(f"class {k}\n" for k in range(classes)).encode())
    (folder / layout.archive).write_bytes(gzip.compress(buffer.getvalue(), mtime=0))


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _write_tiny_imagenet(folder: Path) -> None:
    classes = CLASS_COUNTS["tiny-imagenet"]
    ids = [f"n{k + 1:08d}" for k in range(classes)]
    labels = _balanced(classes, 12)
    annotations = []
    for i, (label, pixels) in enumerate(zip(labels, _images(labels, classes, 64, 3), strict=True)):
        if i < 8 * classes:
            _save(pixels, folder / "train" / ids[label] / "images" / f"{ids[label]}_{i // classes}.JPEG")
        else:
            _save(pixels, folder / "val" / "images" / f"val_{i}.JPEG")
            annotations.append(f"val_{i}.JPEG\t{ids[label]}\t0\t0\t63\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(annotations))
    (folder / "words.txt").write_text("".join(f"{name}\tclass {k}, synonym\n" for k, name in enumerate(ids)))


def _write_image_folder(folder: Path) -> None:
    labels = _balanced(CLASS_COUNTS["image-folder"], 14)
    for i, (label, pixels) in enumerate(zip(labels, _images(labels, labels.max() + 1, 40, 3), strict=True)):
        split = "test" if i >= len(labels) * 10 // 14 else "train"
        _save(pixels, folder / split / f"class_{label}" / f"{i:03d}.png")


def _write_csv(folder: Path) -> None:
    labels = _balanced(CLASS_COUNTS["csv"], 14)
    with (folder / _ENTRY["csv"]).open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["path", "label", "split"])
        for i, (label, pixels) in enumerate(zip(labels, _images(labels, labels.max() + 1, 40, 3), strict=True)):
            _save(pixels, folder / "images" / f"{i:03d}.png")
            writer.writerow([f"images/{i:03d}.png", f"class_{label}", "test" if i >= 30 else "train"])


def _write_hf(folder: Path) -> None:
    """Write Parquet files as the hub has them, a file a split, features in their metadata."""
    from datasets import ClassLabel, Dataset, Features, Image

    classes = CLASS_COUNTS["hf"]
    features = Features(image=Image(), label=ClassLabel(names=[f"class_{k}" for k in range(classes)]))
    for file, (split, each) in enumerate((("train", 10), ("test", 4))):
        labels = _balanced(classes, each)
        images = [{"bytes": _png(pixels), "path": None} for pixels in _images(labels, classes, 40, 3, file)]
        rows = Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
        (folder / "data").mkdir(exist_ok=True)
        rows.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))


_WRITERS: dict[str, Callable[[Path], None]] = {
    "elpv": _write_elpv,
    "fashion-mnist": _write_fashion_mnist,
    "cifar10": lambda folder: _write_cifar("cifar10", folder),
    "cifar100": lambda folder: _write_cifar("cifar100", folder),
    "tiny-imagenet": _write_tiny_imagenet,
    "image-folder": _write_image_folder,
    "csv": _write_csv,
    "hf": _write_hf,
}
_ENTRY = {"elpv": "elpv_dataset-synthetic.zip", "csv": "images.csv"}  # elsewhere the folder itself
