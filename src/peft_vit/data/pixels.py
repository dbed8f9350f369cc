"""Decode once: the images of one split, resized, in one .npy file of the user's cache.

A file holds exactly the rows of one split. So a study on 512 of 110,000 images decodes 512, all methods and
seeds share a fixed split's file, and test and validation, which do not move with `train_images`, are shared
between studies. The price is one training file a seed with `train_subset: per_seed`, and three files a seed with
`test_split: per_seed`. With `folds` one file holds what all seeds divide.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from peft_vit.config import Interpolation
from peft_vit.data.decoding import on_white
from peft_vit.data.files import cache_not_writable, new_in_cache
from peft_vit.data.index import ImageIndex
from peft_vit.packages import cache_dir

FORMAT_VERSION = 3  # raise when a reader, the resizing or the layout changes
_log = logging.getLogger(__name__)


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
    text = f"{FORMAT_VERSION} {PIL.__version__} {index.sha256} {image_size} {index.channels}{how(index)}"
    key = hashlib.sha256(text.encode() + rows.astype("<i8").tobytes()).hexdigest()[:32]
    file = cache_dir() / "pixels" / f"{index.name}-{image_size}px-{key}.npy"
    found = _open(file, shape)
    if found is None:
        _log.info("decoding %d images of %s at %d px", len(rows), index.name, image_size)
        _build(file, index, rows, shape)
        found = _open(file, shape)
    if found is None:
        raise cache_not_writable(file, OSError(0, "what was written does not read back"))
    return found


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
        (M, S, S, C) uint8, read-only, and where the rows stand in it, (N,) int64.
    """
    if divided is None:
        return cached_pixels(index, rows, image_size), np.arange(len(rows), dtype=np.int64)
    return cached_pixels(index, divided, image_size), np.searchsorted(divided, rows).astype(np.int64)


def _open(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    if not file.is_file():
        return None
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)  # noqa: TID251 - numbers alone
    except Exception:  # whatever was in its place, it is not this package's file
        array = None
    if array is not None and array.shape == shape and array.dtype == np.uint8:
        return array
    _log.warning("%s is damaged; decoding its images again", file)
    return None


def _build(file: Path, index: ImageIndex, rows: np.ndarray, shape: tuple[int, ...]) -> None:
    # Written as a stream: on a full disk a memory map would end the process, write() raises.
    with new_in_cache(file) as temporary, temporary.open("wb") as handle:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(handle, header)
        for row in rows:
            pixels = to_pixels(index.read(int(row)), shape[1], index.channels, index.interpolation)
            handle.write(pixels.tobytes())
        handle.flush()
        os.fsync(handle.fileno())


def how(index: ImageIndex) -> str:
    """Return what names of cached files depend on for their interpolation; bicubic was the only one once."""
    return "" if index.interpolation == "bicubic" else f" {index.interpolation}"


def to_pixels(
    image: Image.Image, image_size: int, channels: int, interpolation: Interpolation = "bicubic"
) -> np.ndarray:
    """Return an image as (S, S, C) uint8: with antialiasing when it shrinks, straight to S x S."""
    plain = on_white(image).convert("L" if channels == 1 else "RGB")
    resized = plain.resize((image_size, image_size), Image.Resampling[interpolation.upper()])
    return np.asarray(resized, dtype=np.uint8).reshape(image_size, image_size, channels)
