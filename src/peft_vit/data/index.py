"""What a data set is before anything is decoded: labels, names, and how to read one image."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from peft_vit.base.errors import CONTROL_CHARACTER, UserError, checked, os_fault
from peft_vit.base.files import read_bytes
from peft_vit.base.settings import Frozen
from peft_vit.core.config import Interpolation, Resize
from peft_vit.core.tasks import CLASSIFICATION, Task

DIGEST_LETTERS = 16  # of a file's SHA-256 that are kept
_LONGEST_CLASS_NAME = 255
_REMEDY = "inspect the images again"


@dataclass(frozen=True)
class ImageIndex:
    """A labelled image set of N images; cheap to open, nothing is decoded yet.

    Attributes:
        labels: class of each image, (N,) int64 in [0, len(class_names)), or as its task says.
        class_names: name of each class, label or number.
        official_test: the data set's own test split, (N,) bool; None if it has none.
        sha256: of the source's content: the wheel or archive, or names and contents of all files used.
        read: decodes image i; raises UserError naming the file if it is broken.
        own_strata: what splits are stratified by, (N,) int64, label x module type for elpv; None: as the task says.
        name: the data set's name in the configuration.
        licence: of the images.
        channels: 1 if every image is grey, else 3; how many the decoded cache stores.
        names: of the files, N of them; None: they are not files.
        digests: of what each file holds, N of them; None: they are not files.
        contents: equal numbers for files with equal content, (N,) int64; None: not looked at.
        inspected: copies have been looked for, near ones too, and `contents` holds them all.
        sampled: likewise, but near ones among some of the images alone.
        own: somebody's own files, of which one on both sides of a split is refused; in published sets it is reported.
        interpolation: of resizing.
        resize: how images become square; None: both sides are resized alike.
        notes: what was left out of it, each in a line.
        left_out: why, by the names of files that an inspection has left out.
        task: what is learned of the images, which says what labels are.
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
    digests: Sequence[str] | None = None
    contents: np.ndarray | None = None
    inspected: bool = False
    sampled: bool = False
    own: bool = False
    interpolation: Interpolation = "bicubic"
    resize: Resize | None = None
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    task: Task = CLASSIFICATION

    @property
    def strata(self) -> np.ndarray:
        """Return what splits are stratified by, (N,) int64."""
        return self.task.strata(self.labels) if self.own_strata is None else self.own_strata

    def class_counts(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of images of each class among some, (K,) int64."""
        return self.task.counts(self.labels[rows], len(self.class_names))

    @property
    def dev(self) -> np.ndarray:
        """Return which images are not of the data set's own test split, (N,) bool."""
        test = self.official_test
        return np.ones(len(self.labels), dtype=bool) if test is None else ~test

    @property
    def groups(self) -> np.ndarray:
        """Equal numbers for copies, (N,) int64; where nobody looked for copies every image is one of its own."""
        return np.arange(len(self.labels)) if self.contents is None else self.contents

    def label(self, i: int) -> str:
        """Return the label of image i in words."""
        return self.task.text(self.labels[i], self.class_names)

    def title(self, i: int) -> str:
        """Return what to call image i."""
        return f"image {i}" if self.names is None else self.names[i]


def numbered(values: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """Return the different values, sorted, and the place of each of N values among them, (N,) int64."""
    different = sorted(set(values))
    number = {value: k for k, value in enumerate(different)}
    return different, np.array([number[value] for value in values], dtype=np.int64)


class ImagesFile(Frozen):
    """What looking at a folder of images has found, as a file that a study names: `data.images_file`.

    It says which images are used, by their names relative to the folder.

    `sha256` is of the names and contents of those that are used, `digests` has the beginning of each one's, by name.
    """

    version: Literal[1] = 1
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    left_out: dict[str, str]  # why, by name
    copies: tuple[tuple[str, ...], ...]  # and what else is to stay together: on one side of every split
    sealed: tuple[str, ...]  # tested once in the end; in no fold, and neither trained on nor validated with
    digests: dict[str, str]
    labels: tuple[str, ...]  # of the same images, as a folder or a table said them
    asked: tuple[str, int | None, int | None] | None = None  # path, seed and number of test images
    trained: tuple[str, ...]  # digests of what the earlier models of a call with --from have learned from
    compared: int | None = Field(default=None, exclude_if=lambda count: count is None)  # images; None: all

    @model_validator(mode="after")
    def _has_all(self) -> Self:
        if len(self.labels) != len(self.digests) or not self.digests.keys() >= {*self.sealed}:
            raise ValueError("is of an earlier version, or changed: it lacks contents or labels of images")
        return self

    @property
    def tested(self) -> set[str]:
        """Return the digests of the test images."""
        return {self.digests[name] for name in self.sealed}

    @property
    def learned_from(self) -> set[str]:
        """Return the digests of what trained or validated, also in the calls that this one started from."""
        return {*self.digests.values(), *self.trained} - self.tested

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
            message = f"holds other images than when {file} was written; put those back, or {_REMEDY}"
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
        counts = self.model_copy(update={"left_out": {}})  # what is not read makes no other images
        later = {"digests", "labels", "asked", "trained"}  # which say nothing of what is used
        said = counts.model_dump_json(exclude=later)
        content = hashlib.sha256(f"{index.sha256}\0{said}".encode()).hexdigest()
        own_test = holdout if holdout.any() else None
        return replace(
            index,
            contents=groups,
            official_test=own_test,
            sha256=content,
            inspected=True,
            sampled=self.compared is not None,
            left_out=self.left_out,
        )


def check_class_names(
    names: Iterable[str], file: str | Path | None, field: str | None = None, remedy: str = "rename it"
) -> None:
    """Raise UserError, with the file that says so, if a class name can't be printed or looks like another."""
    known: set[str] = set()
    for name in dict.fromkeys(names):
        if CONTROL_CHARACTER.search(name) or len(name) > _LONGEST_CLASS_NAME:
            message = f"class {reprlib.repr(name)} holds a control character or more than {_LONGEST_CLASS_NAME} letters"
            raise UserError(f"{message}; {remedy}", file=file, field=field)
        if (plain := " ".join(name.split())) in known:
            raise UserError(f"class {plain!r} is there twice, with different spaces; {remedy}", file=file, field=field)
        known.add(plain)
