"""What a data set is before anything is decoded: labels, names, and how to read one image."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from peft_vit.errors import UserError

# What Pillow and zipfile raise on broken content; RuntimeError: an encrypted or exotically compressed member.
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error,
    zipfile.BadZipFile, Image.DecompressionBombError,
)  # fmt: skip
_DEEP_MODES = ("I", "F")  # 16 or 32 bits a pixel; I;16 and its kin start with I as well


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


def decode_image(read: Callable[[], bytes], file: str) -> Image.Image:
    """Decode one image file completely, turned upright by its EXIF orientation.

    Args:
        read: returns the file's content.
        file: what to call the file in an error.

    Raises:
        UserError: if it cannot be read, is truncated, not an image, or has more than 8 bits a channel.
    """
    try:
        image = Image.open(io.BytesIO(read()))
        image.load()
        upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:  # its text holds a memory address
        raise UserError("is not an image of a known format; replace it or take it out", file=file) from None
    except _BROKEN as error:
        raise UserError(f"is not a readable image ({error}); replace it or take it out", file=file) from None
    if upright.mode.startswith(_DEEP_MODES):
        raise UserError(f"has pixels of mode {upright.mode}; convert it to 8 bits a channel", file=file)
    return upright
