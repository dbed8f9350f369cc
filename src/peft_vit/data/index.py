"""What a data set is before anything is decoded: labels, names, and how to read one image."""

from __future__ import annotations

import hashlib
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field

from peft_vit.config import DataConfig, Interpolation
from peft_vit.errors import CONTROL_CHARACTER, UserError, checked, os_fault
from peft_vit.safe_io import read_bytes
from peft_vit.settings import Frozen

_LONGEST_CLASS_NAME = 255
_REMEDY = "look at the images again"


@dataclass(frozen=True)
class ImageIndex:
    """A labelled image set of N images; cheap to open, nothing is decoded yet.

    Attributes:
        labels: class of each image, (N,) int64 in [0, len(class_names)).
        class_names: name of each class.
        official_test: the data set's own test split, (N,) bool; None if it has none.
        sha256: of the source's content: the wheel or archive, or names and contents of all files used.
        read: decodes image i; raises UserError naming the file if it is broken.
        own_strata: what splits are stratified by, (N,) int64, label x module type for elpv; None: labels.
        name: the data set's name in the configuration.
        licence: of the images.
        channels: 1 if every image is grey, else 3; how many the decoded cache stores.
        names: of the files, N of them; None: they are not files.
        contents: equal numbers for files with equal content, (N,) int64; None: not looked at.
        inspected: copies have been looked for, near ones too, and `contents` holds them all.
        own: somebody's own files, of which one on both sides of a split is refused; in published sets it is told.
        interpolation: of resizing.
        notes: what was left out of it, each in a line.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]
    official_test: np.ndarray | None
    sha256: str
    read: Callable[[int], Image.Image]
    own_strata: np.ndarray | None = None
    name: str = ""
    licence: str = ""
    channels: Literal[1, 3] = 3
    names: Sequence[str] | None = None
    contents: np.ndarray | None = None
    inspected: bool = False
    own: bool = False
    interpolation: Interpolation = "bicubic"
    notes: tuple[str, ...] = ()

    @property
    def strata(self) -> np.ndarray:
        """Return what splits are stratified by, (N,) int64."""
        return self.labels if self.own_strata is None else self.own_strata

    @property
    def groups(self) -> np.ndarray:
        """Equal numbers for copies, (N,) int64; where nobody looked for copies every image is one of its own."""
        return np.arange(len(self.labels)) if self.contents is None else self.contents

    def title(self, i: int) -> str:
        """Return what to call image i."""
        return f"image {i}" if self.names is None else self.names[i]


@dataclass(frozen=True)
class DataSource:
    """How a data set is read: a line in the SOURCES of the module that its entry in `config.DATASETS` names.

    Attributes:
        read: indexes the set, without decoding an image; raises UserError where a file is missing or broken.
        sample_classes: of the images that `write_sample` writes.
        write_sample: writes a few images, made by `sample_images`, in the set's own format into an empty folder, for
            smoke runs; None: the set itself is as small, and always there.
        sample_file: in this folder, what `data.path` would name; empty: the folder.
    """

    read: Callable[[DataConfig], ImageIndex]
    sample_classes: int
    write_sample: Callable[[Path], None] | None = None
    sample_file: str = ""


def numbered(values: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """Return the different values, sorted, and the place of each of N values among them, (N,) int64."""
    different = sorted(set(values))
    number = {value: k for k, value in enumerate(different)}
    return different, np.array([number[value] for value in values], dtype=np.int64)


def sample_images(labels: np.ndarray, side: int, channels: int, file: int = 0) -> np.ndarray:
    """Return images of noise around a grey level or colour that tells the class: enough to see a loss go down.

    Args:
        labels: (N,), of which the largest class has one.
        side: in pixels.
        channels: C, 1 or 3.
        file: a number of its own for each file of a set, whose noise follows from it.

    Returns:
        (N, side, side), or of three channels (N, side, side, 3) uint8, always the same ones.
    """
    seed = (2, int(labels.max()) + 1, side)
    levels = np.tile(np.linspace(40, 215, seed[1]), (channels, 1))  # (C, K)
    levels = np.random.default_rng(seed).permuted(levels, axis=1)
    noise = np.random.default_rng((*seed, file)).normal(0, 25, (len(labels), side, side, channels))
    pixels = np.clip(levels.T[labels][:, None, None, :] + noise, 0, 255).astype(np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def save_sample(pixels: np.ndarray, file: Path) -> None:
    """Write an image (S, S) or (S, S, 3), making the folders above."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


class ImagesFile(Frozen):
    """What looking at a folder of images has found, as a file that a study names: `data.images_file`.

    It says which images are used, by their names relative to the folder.

    `sha256` is of the names and contents of those that are used.
    """

    version: Literal[1] = 1
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    left_out: dict[str, str]  # why, by name
    copies: tuple[tuple[str, ...], ...]  # exact and near copies of one image; they stand on one side of every split
    sealed: tuple[str, ...]  # tested once in the end; in no fold, and neither trained on nor validated with

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read it; raises UserError naming the file, and the field if its content is at fault."""
        with os_fault("can't be read", file, remedy=_REMEDY, field="data.images_file"):
            content = read_bytes(file)
        with checked(file, _REMEDY):
            return cls.model_validate_json(content)

    def applied(self, index: ImageIndex, path: Path, file: Path) -> ImageIndex:
        """Return the index of the files that are not left out, with its groups and its test split.

        Args:
            index: of these files, as they are now.
            path: of the folder, named in errors.
            file: this one, likewise.

        Raises:
            UserError: if the folder's images are not those that were looked at, or names here are of none of them.
        """
        assert index.names is not None
        if index.sha256 != self.sha256:
            message = f"holds other images than when they were looked at ({file}); {_REMEDY}"
            raise UserError(message, file=path, field="data.path")
        place = {name: i for i, name in enumerate(index.names)}
        groups = np.arange(len(place), dtype=np.int64)
        holdout = np.zeros(len(place), dtype=bool)
        try:
            for names in self.copies:
                groups[[place[name] for name in names]] = place[names[0]]
            holdout[[place[name] for name in self.sealed]] = True
        except LookupError:
            raise UserError(f"names an image that is not used; {_REMEDY}", file=file, field="copies, sealed") from None
        if np.intersect1d(groups[holdout], groups[~holdout]).size:
            raise UserError(f"an image and its copy are on two sides; {_REMEDY}", file=file, field="sealed")
        content = hashlib.sha256(f"{index.sha256}\0{self.model_dump_json()}".encode()).hexdigest()
        own_test = holdout if holdout.any() else None
        return replace(index, contents=groups, official_test=own_test, sha256=content, inspected=True)


def check_class_names(
    names: Iterable[str], file: str | Path | None, field: str | None = None, remedy: str = "rename it"
) -> None:
    """Raise UserError, with the file that says so, if a class has a name that could not be printed."""
    for name in names:
        if CONTROL_CHARACTER.search(name) or len(name) > _LONGEST_CLASS_NAME:
            message = f"class {reprlib.repr(name)} holds a control character or more than {_LONGEST_CLASS_NAME} letters"
            raise UserError(f"{message}; {remedy}", file=file, field=field)


def refuse_several_labels(labels: Iterable[str], file: str | Path, field: str) -> None:
    """Raise UserError if a label is made of others, such as cat|dog: an image then has several.

    It is, if it is divided by | or ; or , and each of its parts is also a label, or a part of another one.
    """
    for separator in "|;,":
        parts = {label: [part.strip() for part in label.split(separator)] for label in labels}
        seen = Counter(part for of in parts.values() for part in set(of))
        for label, of in parts.items():
            if len(of) > 1 and all(part and seen[part] > 1 for part in of):
                message = f"{reprlib.repr(label)} stands for several labels; a model here tells one class of each image"
                raise UserError(f"{message}, so keep one label, or take these images out", file=file, field=field)
