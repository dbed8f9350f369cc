"""CIFAR-10 and CIFAR-100 from their binary archives: fixed-length records, nothing is unpickled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from peft_vit.data.files import downloaded, hashes, unpacked
from peft_vit.data.index import ImageIndex, check_class_names
from peft_vit.errors import UserError
from peft_vit.safe_io import read_bytes

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class _Layout:
    archive: str
    md5: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int  # the last of them is the class; CIFAR-100 has the coarse class before it


LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
        1,
    ),
    "cifar100": _Layout(
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        ("train.bin",),
        "test.bin",
        "fine_label_names.txt",
        2,
    ),
}


def read_cifar(name: str, path: Path | None) -> ImageIndex:
    """Index CIFAR-10 or CIFAR-100 (format: cs.toronto.edu/~kriz/cifar.html, binary version).

    A record is one label byte (CIFAR-100: coarse, then fine) and 3,072 bytes: red, green and blue planes of
    32 x 32.

    Args:
        name: cifar10 or cifar100.
        path: the archive, a folder that holds it, or the unpacked folder; None downloads it.
    """
    layout = LAYOUTS[name]
    wanted = (*layout.train, layout.test, layout.names)
    folder, sha256, remedy = _unpacked(layout, wanted, path)
    parts = [_records(folder / file, layout.label_bytes, remedy) for file in (*layout.train, layout.test)]
    names_file = folder / layout.names
    try:
        lines = read_bytes(names_file).decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"is not UTF-8 text; {remedy}", file=names_file) from None
    class_names = tuple(line.strip() for line in lines if line.strip())
    check_class_names(class_names, names_file, remedy=remedy)
    labels = np.concatenate([part[:, layout.label_bytes - 1] for part in parts]).astype(np.int64)
    for file, part in zip((*layout.train, layout.test), parts, strict=True):
        largest = part[:, layout.label_bytes - 1].max()
        if largest >= len(class_names):
            problem = f"a label is {largest}, but {layout.names} names {len(class_names)} classes; {remedy}"
            raise UserError(problem, file=folder / file)
    starts = np.cumsum([0, *(len(part) for part in parts)])

    def read(i: int) -> Image.Image:
        k = int(np.searchsorted(starts, i, side="right")) - 1
        planes = parts[k][i - starts[k], layout.label_bytes :].reshape(3, _SIDE, _SIDE)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))  # (3, S, S) -> (S, S, 3)

    return ImageIndex(
        labels=labels,
        strata=labels,
        class_names=class_names,
        official_test=np.arange(len(labels)) >= starts[-2],
        sha256=sha256,
        read=read,
    )


def _unpacked(layout: _Layout, wanted: tuple[str, ...], path: Path | None) -> tuple[Path, str, str]:
    """Return a folder with the wanted files, the hash of all, and what to do if one of them is broken."""
    if path is not None and path.is_dir() and (path / layout.test).is_file():
        missing = [name for name in wanted if not (path / name).is_file()]
        if missing:
            raise UserError("is missing; unpack the binary archive again", file=path / missing[0], field="data.path")
        sha256 = hashes({name: path / name for name in wanted}).sha256
        return path, sha256, "unpack the binary archive again"
    if path is None:
        archive = downloaded(f"https://www.cs.toronto.edu/~kriz/{layout.archive}", layout.md5)
    else:
        archive = path / layout.archive if path.is_dir() else path
    if not archive.is_file():
        raise UserError(f"holds no {layout.archive}; put it there", file=path, field="data.path")
    sha256 = hashes({"": archive}).sha256
    folder = unpacked(archive, wanted, sha256)
    return folder, sha256, f"delete it, and if that does not help fetch {archive} again, where it comes from"


def _records(file: Path, label_bytes: int, remedy: str) -> np.ndarray:
    size = file.stat().st_size
    if size == 0 or size % (label_bytes + _PIXELS):
        raise UserError(f"is {size} bytes, no multiple of a record; {remedy}", file=file)
    return np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, label_bytes + _PIXELS)  # (N, bytes of a record)
