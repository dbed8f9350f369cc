"""A few made-up images of each data set, in the format that its reader reads."""

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from peft_vit.base.packages import cache_dir
from peft_vit.data.sources.packaged import CIFAR, CifarFiles


def sample_images(labels: np.ndarray, side: int, channels: int, file: int = 0) -> np.ndarray:
    """Return noise around a grey level or colour that tells the class, (N, S, S) or (N, S, S, 3) uint8."""
    classes = int(labels.max()) + 1
    levels = np.tile(np.linspace(40, 215, classes), (channels, 1))
    levels = np.random.default_rng((2, classes, side)).permuted(levels, axis=1)
    noise = np.random.default_rng((2, classes, side, file)).normal(0, 25, (len(labels), side, side, channels))
    pixels = np.clip(levels.T[labels][:, None, None, :] + noise, 0, 255).astype(np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def save_sample(pixels: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def write_idx(file: Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    file.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes(), mtime=0))


def _class_folders(folder: Path) -> None:
    labels = np.tile(np.arange(3), 14)
    for i, (label, pixels) in enumerate(zip(labels, sample_images(labels, 40, 3), strict=True)):
        save_sample(pixels, folder / ("train" if i < 30 else "test") / f"class_{label}" / f"{i:03d}.png")


def _csv(folder: Path) -> None:
    _class_folders(folder)
    files = sorted(folder.rglob("*.png"), key=lambda file: file.name)
    rows = [f"{file.relative_to(folder).as_posix()},{file.parts[-2]},{file.parts[-3]}\n" for file in files]
    (folder / "images.csv").write_text("".join(["path,label,split\n", *rows]))


def _tiny_imagenet(folder: Path) -> None:
    ids = [f"n{k + 1:08d}" for k in range(4)]
    labels = np.tile(np.arange(4), 12)
    annotations = ""
    for i, (label, pixels) in enumerate(zip(labels, sample_images(labels, 64, 3), strict=True)):
        if i < 32:
            save_sample(pixels, folder / "train" / ids[label] / "images" / f"{ids[label]}_{i // 4}.JPEG")
        else:
            save_sample(pixels, folder / "val" / "images" / f"val_{i}.JPEG")
            annotations += f"val_{i}.JPEG\t{ids[label]}\t0\t0\t63\t63\n"
    (folder / "val" / "val_annotations.txt").write_text(annotations)
    (folder / "words.txt").write_text("".join(f"{name}\tclass {k}, synonym\n" for k, name in enumerate(ids)))


def _elpv(folder: Path) -> None:
    probabilities = np.tile([0.0, 1 / 3, 2 / 3, 1.0], 16)
    lines = ""
    for i, pixels in enumerate(sample_images((probabilities >= 0.5).astype(int), 48, 1)):
        save_sample(pixels, folder / f"images/cell{i + 1:04d}.png")
        lines += f"images/cell{i + 1:04d}.png  {probabilities[i]}  {('mono', 'poly')[i // 32]}\n"
    (folder / "labels.csv").write_text(lines)


def _fashion_mnist(folder: Path) -> None:
    for number, (split, each) in enumerate((("train", 8), ("t10k", 2))):
        labels = np.tile(np.arange(10), each)
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", sample_images(labels, 28, 1, number))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)


def _cifar(layout: CifarFiles, classes: int, folder: Path) -> None:
    labels = np.tile(np.arange(classes), 2)
    for number, name in enumerate((*layout.train, layout.test)):
        planes = sample_images(labels, 32, 3, number).transpose(0, 3, 1, 2)
        leading = np.pad(labels[:, None], ((0, 0), (layout.label_bytes - 1, 0))).astype(np.uint8)  # coarse classes: 0
        np.hstack([leading, planes.reshape(len(labels), -1)]).tofile(folder / name)
    (folder / layout.names).write_text("".join(f"class {k}\n" for k in range(classes)))


def _parquet(folder: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features(image=ImageFeature(), label=ClassLabel(names=[f"class_{k}" for k in range(3)]))
    (folder / "data").mkdir()
    for number, (split, each) in enumerate((("train", 10), ("test", 4))):
        labels = np.tile(np.arange(3), each)
        images = list(sample_images(labels, 40, 3, number))
        rows = Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
        rows.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))


_WRITERS = {
    "image-folder": _class_folders,
    "csv": _csv,
    "tiny-imagenet": _tiny_imagenet,
    "elpv": _elpv,
    "fashion-mnist": _fashion_mnist,
    "cifar10": lambda folder: _cifar(CIFAR["cifar10"], 10, folder),
    "cifar100": lambda folder: _cifar(CIFAR["cifar100"], 100, folder),
    "hf": _parquet,
}


def sample_path(dataset: str) -> Path:
    """Return what `data.path` names: a folder, or of csv a file, below the cache, written on first use."""
    folder = cache_dir() / "samples" / dataset
    if not folder.is_dir():
        folder.mkdir(parents=True)
        _WRITERS[dataset](folder)
    return folder / "images.csv" if dataset == "csv" else folder
