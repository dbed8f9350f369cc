"""What a data set is before anything is decoded: labels, names, and how to read one image."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from peft_vit.config import Interpolation
from peft_vit.errors import CONTROL_CHARACTER, UserError

_LONGEST_CLASS_NAME = 255


@dataclass(frozen=True)
class ImageIndex:
    """A labelled image set of N images; cheap to open, nothing is decoded yet.

    Attributes:
        name: the data set's name in the configuration.
        labels: class of each image, (N,) int64 in [0, len(class_names)).
        strata: what splits are stratified by, (N,) int64: label x module type for elpv, else the label.
        class_names: name of each class.
        official_test: the data set's own test split, (N,) bool; None if it has none.
        licence: of the images.
        sha256: of the source's content: the wheel or archive, or names and contents of all files used.
        read: decodes image i; raises UserError naming the file if it is broken.
        channels: 1 if every image is grey, else 3; how many the decoded cache stores.
        names: of the files, N of them; None: they are not files.
        contents: equal numbers for files with equal content, (N,) int64; None: not looked at.
        looked_at: copies have been looked for, near ones too, and `contents` holds them all.
        own: somebody's own files, of which one on both sides of a split is refused; in published sets it is told.
        interpolation: of resizing.
        notes: what was left out of it, each in a line.
    """

    name: str
    labels: np.ndarray
    strata: np.ndarray
    class_names: tuple[str, ...]
    official_test: np.ndarray | None
    licence: str
    sha256: str
    read: Callable[[int], Image.Image]
    channels: Literal[1, 3] = 3
    names: Sequence[str] | None = None
    contents: np.ndarray | None = None
    looked_at: bool = False
    own: bool = False
    interpolation: Interpolation = "bicubic"
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> np.ndarray:
        """Equal numbers for copies, (N,) int64; where nobody looked for copies every image is one of its own."""
        return np.arange(len(self.labels)) if self.contents is None else self.contents

    def title(self, i: int) -> str:
        """Return what to call image i."""
        return f"image {i}" if self.names is None else self.names[i]


def check_class_names(
    names: Iterable[str], file: str | Path | None, field: str | None = None, remedy: str = "rename it"
) -> None:
    """Raise UserError, with the file that says so, if a class has a name that could not be printed."""
    for name in names:
        if CONTROL_CHARACTER.search(name) or len(name) > _LONGEST_CLASS_NAME:
            problem = f"class {reprlib.repr(name)} holds a control character or more than {_LONGEST_CLASS_NAME} letters"
            raise UserError(f"{problem}; {remedy}", file=file, field=field)


def refuse_several_labels(labels: Iterable[str], file: str | Path, field: str) -> None:
    """Raise UserError if a label is made of others, such as cat|dog: an image then has several.

    It is, if it is divided by | or ; or , and each of its parts is also a label, or a part of another one.
    """
    for separator in "|;,":
        parts = {label: [part.strip() for part in label.split(separator)] for label in labels}
        seen = Counter(part for of in parts.values() for part in set(of))
        for label, of in parts.items():
            if len(of) > 1 and all(part and seen[part] > 1 for part in of):
                problem = f"{reprlib.repr(label)} stands for several labels; a model here tells one class of each image"
                raise UserError(f"{problem}, so keep one label, or take these images out", file=file, field=field)
