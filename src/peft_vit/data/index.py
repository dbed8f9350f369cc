"""What a data set is before anything is decoded: labels, names, and how to read one image."""

from __future__ import annotations

import io
import reprlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from peft_vit.errors import CONTROL_CHARACTER, UserError

# By content, whatever the file is called: Pillow would hand an EPS to Ghostscript, which runs what stands in it.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_MAX_PIXELS = 89_478_485  # where Pillow warns of a bomb by default; a quarter of a gigabyte as RGB
_MAX_SIDE = 1 << 16  # resizing a longer line takes gigabytes
_DEEP_MODES = ("I", "F")  # 16 or 32 bits a pixel; I;16 and its kin start with I as well
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

    @property
    def groups(self) -> np.ndarray:
        """Equal numbers for copies, (N,) int64; where nobody looked for copies every image is one of its own."""
        return np.arange(len(self.labels)) if self.contents is None else self.contents

    def title(self, i: int) -> str:
        """Return what to call image i."""
        return f"image {i}" if self.names is None else self.names[i]


def decode_image(read: Callable[[], bytes], file: str) -> Image.Image:
    """Decode one image file completely, turned upright by its EXIF orientation.

    Args:
        read: returns the file's content.
        file: what to call the file in an error.

    Raises:
        UserError: if it cannot be read, is truncated, not an image, too large, or has more than 8 bits a channel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's, on damage that it can do with, and on many pixels
            image = Image.open(io.BytesIO(read()), formats=_FORMATS)  # noqa: TID251 - these alone
            deep = _is_deep_png(image)  # to be asked before it is loaded
            width, height = image.size
            if width * height > _MAX_PIXELS or max(width, height) > _MAX_SIDE:
                raise ValueError(f"{width} x {height} pixels are too many, scale it down")
            image.load()
            upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:  # its text holds a memory address
        raise UserError("is not an image of a known format; replace it or take it out", file=file) from None
    except Exception as error:  # a foreign file can fail in any way; the user needs one line
        raise UserError(f"is not a readable image ({error}); replace it or take it out", file=file) from None
    if deep:
        raise UserError(f"has 16 bits a channel ({upright.mode}); convert it to 8 bits a channel", file=file)
    if upright.mode.startswith(_DEEP_MODES):
        raise UserError(f"has pixels of mode {upright.mode}; convert it to 8 bits a channel", file=file)
    return upright


def _is_deep_png(image: Image.Image) -> bool:
    """Tell whether Pillow is about to cut a PNG's 16 bits a channel to 8, as it does with all but plain grey ones."""
    if not isinstance(image, PngImageFile) or image.mode.startswith(_DEEP_MODES):
        return False
    return any(str(tile[3]).endswith(";16B") for tile in image.tile)


def check_class_names(
    names: Iterable[str], file: str | Path | None, field: str | None = None, remedy: str = "rename it"
) -> None:
    """Raise UserError, with the file that says so, if a class has a name that could not be printed."""
    for name in names:
        if CONTROL_CHARACTER.search(name) or len(name) > _LONGEST_CLASS_NAME:
            problem = f"class {reprlib.repr(name)} holds a control character or more than {_LONGEST_CLASS_NAME} letters"
            raise UserError(f"{problem}; {remedy}", file=file, field=field)
