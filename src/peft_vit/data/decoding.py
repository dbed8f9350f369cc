"""One image file to upright pixels of 8 bits a channel.

- Of 16 bits a channel the upper 8 stay, floor(v / 256), in grey as in colour, which is how Pillow reads colour and how
  libpng's `png_set_strip_16` scales: black and white are those of the format, whatever the values of the image. Of 12
  bits (TIFF) the upper 8 stay too.
- CMYK becomes RGB by (255 - C)(255 - K) / 255 and so on, without colour profiles; Adobe's inverted JPEGs are turned
  back by Pillow.
- What is transparent lies on white, c a + 255 (1 - a), be it by an alpha channel, a palette or a transparent colour.
- What Pillow would read wrongly, or what has no black and white of its own (32 bits, floats, signed), is refused.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from peft_vit.errors import UserError

# By content, whatever the file is called: Pillow would hand an EPS to Ghostscript, which runs what stands in it.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
_MAX_PIXELS = 89_478_485  # where Pillow warns of a bomb by default; a quarter of a gigabyte as RGB
_MAX_SIDE = 1 << 16  # resizing a longer line takes gigabytes
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR = 258, 262, 284  # tags of TIFF 6.0
_WHITE_IS_ZERO, _IN_PLANES = 0, 2  # values of the last two
_GREY_LEVELS = {"L;2": 4, "L;4": 16}  # of PNGs whose grey Pillow spreads over 256


def decode_image(read: Callable[[], bytes], file: str, *, enough: int | None = None) -> Image.Image:
    """Decode one image file completely, turned upright by its EXIF orientation, to 8 bits a channel.

    Args:
        read: returns the file's content.
        file: what to call the file in an error.
        enough: pixels a side that will do: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that leaves as many,
            which takes less time. None: at its size.

    Raises:
        UserError: if it cannot be read, is truncated, not an image, too large, or of a kind that is not read right.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's, on damage that it can do with, and on many pixels
            image = Image.open(io.BytesIO(read()), formats=_FORMATS)  # noqa: TID251 - these alone
            width, height = image.size
            if width * height > _MAX_PIXELS or max(width, height) > _MAX_SIDE:
                raise ValueError(f"{width} x {height} pixels are too many, scale it down")
            raw_mode = _raw_mode(image)  # to be asked before it is loaded
            fault = _fault(image, raw_mode)
            if fault is not None:
                raise UserError(fault, file=file)
            if enough is not None:
                image.draft(None, (enough, enough))  # of JPEGs alone; its sides stay at least as long
            image.load()
            return _eight_bits(image, ImageOps.exif_transpose(image), raw_mode)
    except UserError:
        raise
    except UnidentifiedImageError:  # its text holds a memory address
        raise UserError("is not an image of a known format; replace it or take it out", file=file) from None
    except Exception as error:  # a foreign file can fail in any way; the user needs one line
        raise UserError(f"is not a readable image ({error}); replace it or take it out", file=file) from None


def sides_of(content: bytes) -> tuple[int, int]:
    """Return the shorter and the longer side of a sound image file, in pixels."""
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:  # noqa: TID251 - these alone
        return min(image.size), max(image.size)


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Return how pixels lie in the file, in Pillow's words; empty where a format's library alone knows."""
    if not image.tile:
        return ""
    arguments: Any = image.tile[0][3]
    return str(arguments if isinstance(arguments, str) else arguments[0])


def _is_grey_of_16_bits(image: Image.Image, raw_mode: str) -> bool:
    """Tell of grey values in 0 to 65,535, which older versions of Pillow hold as 32 bits; signed ones are others."""
    return image.mode.startswith("I") and raw_mode.startswith("I;1") and not raw_mode.endswith("S")


def _fault(image: ImageFile.ImageFile, raw_mode: str) -> str | None:
    """Return why a file is not read right, and what to do; None if it is."""
    if image.mode.startswith(("I", "F")) and not _is_grey_of_16_bits(image, raw_mode):
        problem = f"has pixels of mode {image.mode}, of which no format says what is black and what white"
        return f"{problem}; scale them and save it with 8 or 16 bits a channel"
    if isinstance(image, PngImageFile) and raw_mode == "RGB;16B" and "transparency" in image.info:
        return "has 16 bits a channel and a transparent colour; save it with an alpha channel"
    if not isinstance(image, TiffImageFile):
        return None
    if image.tag_v2.get(_PLANAR) == _IN_PLANES and (
        set(image.tag_v2.get(_BITS_PER_SAMPLE, ())) != {8} or image.tag_v2.get(_PHOTOMETRIC) not in (2, 5)
    ):
        return "holds its channels in planes of their own; save it with interleaved channels"
    try:
        image.seek(1)
    except EOFError:
        image.seek(0)
        return None
    return "holds several pages; save the one that is meant"


def _eight_bits(image: Image.Image, upright: Image.Image, raw_mode: str) -> Image.Image:
    """Return the upright image with 8 bits a channel and its transparent colour among them.

    Args:
        image: as it was loaded from the file.
        upright: the same, turned.
        raw_mode: see `_raw_mode`.
    """
    transparent = image.info.get("transparency")
    if raw_mode in _GREY_LEVELS and isinstance(transparent, int) and transparent < _GREY_LEVELS[raw_mode]:
        upright.info["transparency"] = transparent * 255 // (_GREY_LEVELS[raw_mode] - 1)
    if not _is_grey_of_16_bits(image, raw_mode):
        return upright
    values = np.asarray(upright)  # (H, W), 0 to 65,535
    grey = (values >> (4 if raw_mode == "I;12" else 8)).astype(np.uint8)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    plain = Image.fromarray(grey)
    if isinstance(transparent, int):
        plain.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return plain


def on_white(image: Image.Image) -> Image.Image:
    """Return an image as a viewer shows it: what is transparent lies on white, whatever colour stands behind it."""
    if not image.has_transparency_data:
        return image
    layered = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
