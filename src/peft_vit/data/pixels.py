"""From an image file to pixels: decoded once, resized, and kept for each split in one .npy file of the user's cache.

How a file is read, as upright pixels of 8 bits a channel:

- Of 16 bits a channel the upper 8 stay, floor(v / 256), in grey as in colour, which is how Pillow reads colour and how
  libpng's `png_set_strip_16` scales: black and white are those of the format, whatever the values of the image. Of 12
  bits (TIFF) the upper 8 stay too.
- CMYK becomes RGB by (255 - C)(255 - K) / 255 and so on, without colour profiles; Adobe's inverted JPEGs are turned
  back by Pillow.
- Of several frames (GIF, animated PNG and WebP) the first is taken; several pages (TIFF) are refused.
- What is transparent lies on white, c a + 255 (1 - a), be it by an alpha channel, a palette or a transparent colour.
- What Pillow would read wrongly, or what has no black and white of its own (32 bits, floats, signed), is refused.

A cached file holds exactly the rows of one split. So a study on 512 of 110,000 images decodes 512, all methods and
seeds share a fixed split's file, and test and validation, which do not move with `train_images`, are shared
between studies. The price is one training file a seed with `train_subset: per_seed`, and three files a seed with
`test_split: per_seed`. With `folds` one file holds what all seeds divide.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, partial
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError, features
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from peft_vit.base.errors import UserError, foreign_fault
from peft_vit.base.extras import missing_packages, require_extra
from peft_vit.base.packages import cache_dir
from peft_vit.core.config import Interpolation, Resize
from peft_vit.data.files import in_threads, new_in_cache
from peft_vit.data.index import ImageIndex

_FORMAT_VERSION = 3  # raise when a reader, the resizing or the layout changes
_log = logging.getLogger(__name__)
# By content, whatever the file is called: Pillow would hand an EPS to Ghostscript, which runs what stands in it.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # ISO/IEC 23008-12
_MAX_PIXELS = 89_478_485  # where Pillow warns of a bomb by default; a quarter of a gigabyte as RGB
_MAX_SIDE = 1 << 16  # resizing a longer line takes gigabytes
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR = 258, 262, 284  # tags of TIFF 6.0
_WHITE_IS_ZERO, _IN_PLANES = 0, 2  # values of the last two
_THUMBNAIL_SIDE = 128  # pixels
REMEDY = "replace it or remove it"
LETTERBOX_COLOUR = "#7c7468"  # ImageNet's mean
_TRANSPARENT_COLOUR_IS_LOST = ("RGB;16B", "I;16B", "L;2", "L;4")  # of PNGs, whose values Pillow spreads or cuts


@cache
def formats() -> tuple[str, ...]:
    """Return what is decoded here: AVIF where Pillow was built with it, HEIC with the package of the extra."""
    known: tuple[str, ...] = _FORMATS
    if features.check("avif"):
        known += ("AVIF",)
    if not missing_packages("heic"):
        import pillow_heif

        pillow_heif.register_heif_opener()
        known += ("HEIF",)
    return known


def decoders() -> str:
    """Return what cached pixels and features depend on: how images are read here, and the versions of what does it."""
    versions = PIL.__version__ if missing_packages("heic") else f"{PIL.__version__} {metadata.version('pillow_heif')}"
    return f"{_FORMAT_VERSION} {versions}"


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
    with foreign_fault("is not a readable image", file, remedy=REMEDY), _quiet():
        image, raw_mode = _opened(read(), file)
        if enough is not None:
            image.draft(None, (enough, enough))  # of JPEGs alone; its sides stay at least as long
        image.load()
        upright = ImageOps.exif_transpose(image)
        if not _is_grey_of_16_bits(image, raw_mode):
            return upright
        values = np.asarray(upright)  # (H, W), 0 to 65,535
        grey = (values >> (4 if raw_mode == "I;12" else 8)).astype(np.uint8)
        if isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = 255 - grey
        return Image.fromarray(grey)


def _opened(content: bytes, file: str) -> tuple[ImageFile.ImageFile, str]:
    """Open an image file whose head is sound; return it with how pixels lie in it, and raise as `decode_image`."""
    if not content:
        raise UserError(f"is empty; {REMEDY}", file=file)
    try:
        image = Image.open(io.BytesIO(content), formats=formats())  # noqa: TID251 - these alone
    except UnidentifiedImageError:  # its text holds a memory address
        if content[4:8] == b"ftyp" and content[8:12] in _HEIC_BRANDS:
            require_extra("heic", "HEIC", file=file)
        raise UserError(f"is not an image of a known format; {REMEDY}", file=file) from None
    width, height = image.size
    if width * height > _MAX_PIXELS or max(width, height) > _MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels are too many, scale it down")
    # In Pillow's words, until it is loaded; empty where a format's library alone knows.
    arguments: Any = image.tile[0][3] if image.tile else ""
    raw_mode = str(arguments if isinstance(arguments, str) else arguments[0])
    if (fault := _fault(image, raw_mode)) is not None:
        raise UserError(fault, file=file)
    return image, raw_mode


def _quiet() -> AbstractContextManager[object]:
    """Silence Pillow's warnings on damage that it can do with, and on many pixels; threads are silenced together."""
    if threading.current_thread() is not threading.main_thread():
        return nullcontext()  # filters are those of the whole process: two threads would put back each other's
    return warnings.catch_warnings(action="ignore")


class Facts(NamedTuple):
    """What an image file says without being decoded.

    Attributes:
        short: the shorter side, in pixels.
        long: the longer one.
        is_animated: whether it has several frames.
        is_complete: whether it ends as its format does; of other formats False: decode it to be sure.
    """

    short: int
    long: int
    is_animated: bool
    is_complete: bool


def read_facts(content: bytes) -> Facts:
    """Return what a sound image file says; raises for others, in any way."""
    image, _ = _opened(content, "")
    is_animated = image.format in ("GIF", "PNG", "WEBP", "AVIF") and getattr(image, "is_animated", False)
    is_complete = {
        "JPEG": content.endswith(b"\xff\xd9"),  # end of image, ITU-T T.81, B.1.1.3
        "PNG": content.endswith(b"IEND\xaeB\x60\x82"),  # the last chunk with its checksum
        "WEBP": int.from_bytes(content[4:8], "little") + 8 <= len(content),  # of RIFF
    }
    return Facts(min(image.size), max(image.size), is_animated, is_complete.get(image.format or "", False))


def _is_grey_of_16_bits(image: Image.Image, raw_mode: str) -> bool:
    """Tell of grey values in 0 to 65,535, which older versions of Pillow hold as 32 bits; signed ones are others."""
    return image.mode.startswith("I") and raw_mode.startswith("I;1") and not raw_mode.endswith("S")


def _fault(image: ImageFile.ImageFile, raw_mode: str) -> str | None:
    """Return why a file is not read right, and what to do; None if it is."""
    if image.mode.startswith(("I", "F")) and not _is_grey_of_16_bits(image, raw_mode):
        message = f"has pixels of mode {image.mode}, of which no format says what is black and what white"
        return f"{message}; scale them and save it with 8 or 16 bits a channel"
    if isinstance(image, PngImageFile) and raw_mode in _TRANSPARENT_COLOUR_IS_LOST and "transparency" in image.info:
        return "has a transparent colour and 2, 4 or 16 bits a channel; save it with an alpha channel"
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


def on_white(image: Image.Image) -> Image.Image:
    """Return an image as a viewer shows it: what is transparent lies on white, whatever colour is behind it."""
    if not image.has_transparency_data:
        return image
    layered = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)


def thumbnail(image: Image.Image, channels: int) -> bytes:
    """Return an image as PNG, the longer side 128 pixels; a smaller one is enlarged without smoothing."""
    plain = on_white(image).convert("L" if channels == 1 else "RGB")
    scale = _THUMBNAIL_SIDE / max(plain.size)
    size = (max(1, round(plain.width * scale)), max(1, round(plain.height * scale)))
    file = io.BytesIO()
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    plain.resize(size, resampling).save(file, format="PNG", optimize=True)
    return file.getvalue()


def cached_pixels(index: ImageIndex, rows: np.ndarray, image_size: int) -> np.ndarray:
    """Return the images of some rows, decoded and resized, memory-mapped from the cache.

    A file of another shape or length than expected (cut off, say) is rebuilt. Two processes may build the
    same file at once: each writes its own and renames it, which is atomic, and both contents are equal.

    Args:
        index: the data set.
        rows: which images, (N,) indices.
        image_size: side S in pixels.

    Returns:
        (N, S, S, C) uint8, read-only; C = `index.channels`.

    Raises:
        UserError: if an image is broken, or the cache cannot be written.
    """
    shape = (len(rows), image_size, image_size, index.channels)
    key = hashlib.sha256(f"{pixels_key(index, image_size)} {index.sha256}".encode() + rows.astype("<i8").tobytes())
    file = cache_dir() / "pixels" / f"{index.name}-{image_size}px-{key.hexdigest()[:32]}.npy"
    load = partial(np.load, file, mmap_mode="r", allow_pickle=False)  # noqa: TID251 - numbers alone
    with suppress(Exception):  # there is none, or whatever was in its place: it is not this package's file
        pixels: np.ndarray = load()
        if (pixels.shape, pixels.dtype) == (shape, np.uint8):
            return pixels
    if file.is_file():
        _log.warning("%s is damaged; decoding its images again", file)

    def pixels_of(row: int) -> bytes:
        return to_pixels(index.read(row), image_size, index.channels, index.interpolation, index.resize).tobytes()

    _log.info("decoding %d images of %s at %d px", len(rows), index.name, image_size)
    # Written as a stream: on a full disk a memory map would end the process, write() raises.
    with new_in_cache(file) as temporary, temporary.open("wb") as handle:
        np.lib.format.write_array_header_1_0(handle, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with _quiet():
            handle.writelines(in_threads(pixels_of, rows.tolist()))
        handle.flush()
        os.fsync(handle.fileno())
    written: np.ndarray = load()
    return written


def pixels_key(index: ImageIndex, image_size: int) -> str:
    """Return what the pixels of an image depend on beside its content."""
    return f"{decoders()} {image_size} {index.channels} {index.interpolation} {index.resize}"


def split_pixels(
    index: ImageIndex, rows: np.ndarray, divided: np.ndarray | None, image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `cached_pixels` does of the rows of one split, or of what it is a part of.

    Args:
        index: the data set.
        rows: of the split, (N,) indices.
        divided: see `Splits`; sorted.
        image_size: side S in pixels.

    Returns:
        (M, S, S, C) uint8, read-only, and where the rows are in it, (N,) int64.
    """
    if divided is None:
        return cached_pixels(index, rows, image_size), np.arange(len(rows), dtype=np.int64)
    return cached_pixels(index, divided, image_size), np.searchsorted(divided, rows).astype(np.int64)


def to_pixels(
    image: Image.Image,
    image_size: int,
    channels: int,
    interpolation: Interpolation = "bicubic",
    resize: Resize | None = None,
) -> np.ndarray:
    """Return an image as (S, S, C) uint8, with antialiasing when it shrinks.

    To the last bit as timm does with crop_mode squash, border (for models with ImageNet's mean) and center.
    """
    plain = on_white(image).convert("L" if channels == 1 else "RGB")
    resampling = Image.Resampling[interpolation.upper()]
    if resize == "letterbox":
        ratio = max(plain.size) / image_size
        width, height = (max(1, round(side / ratio)) for side in plain.size)
    elif resize == "crop":
        width, height = (image_size * side // min(plain.size) for side in plain.size)
    else:
        width, height = image_size, image_size
    resized = plain.resize((width, height), resampling)
    if resized.size != (image_size, image_size):
        square = Image.new(plain.mode, (image_size, image_size), LETTERBOX_COLOUR)
        # Half a pixel goes to the right of bars, and to the even side of what is cut off.
        gaps = (image_size - width, image_size - height)
        left, top = (gap // 2 if gap > 0 else round(gap / 2) for gap in gaps)
        square.paste(resized, (left, top))
        resized = square
    return np.asarray(resized, dtype=np.uint8).reshape(image_size, image_size, channels)
