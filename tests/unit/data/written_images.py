"""Image files and archives as these tests write them."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from peft_vit.core.config import DataConfig
from peft_vit.data import ImageIndex


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """Return an image as a file of a format."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def save(file: Path, pixels: np.ndarray | Image.Image, **options: Any) -> Path:
    """Write an image, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, **options)
    return file


def textured(seed: int, side: int = 48) -> np.ndarray:
    """Return an image (side, side, 3) whose detail is its own: blocks of random levels."""
    levels = np.random.default_rng(seed).integers(40, 215, (12, 12, 3), dtype=np.uint8)
    return levels.repeat(side // 12, 0).repeat(side // 12, 1)


def zip_of(folder: Path) -> Path:
    """Write a zip of a folder's files beside it."""
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
    return folder.with_suffix(".zip")


def png_by_hand(
    width: int, height: int, depth: int, colour_type: int, rows: bytes, transparent: tuple[int, ...] = ()
) -> bytes:
    """Return a PNG with any header and rows, after the specification (W3C, PNG third edition).

    Args:
        transparent: the samples of the one colour that can't be seen, if there is one (tRNS).
    """

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    hidden = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    chunks = chunk(b"IHDR", header) + hidden + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def png_of(samples: np.ndarray, depth: int, colour_type: int, transparent: tuple[int, ...] = ()) -> bytes:
    """Return a PNG of samples (H, W, C) of 8 or 16 bits."""
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in samples)
    return png_by_hand(samples.shape[1], samples.shape[0], depth, colour_type, rows, transparent)


def tiff_of(
    samples: np.ndarray, order: Literal["<", ">"], photometric: int, *, planar: bool = False, **tags: int
) -> bytes:
    """Return an uncompressed TIFF of samples (H, W, C), after the specification (Adobe, TIFF 6.0, sections 2 and 8).

    Args:
        samples: of any of numpy's types; floats get the sample format of floats, integers theirs.
        order: of bytes, "<" or ">".
        photometric: 0 white is zero, 1 black is zero, 2 RGB, 5 CMYK.
        planar: a plane a channel, one after the other.
        tags: `bits` instead of those of the type, `orientation`, `extra` (ExtraSamples).
    """
    height, width, channels = samples.shape
    content = (samples.transpose(2, 0, 1) if planar else samples).astype(samples.dtype.newbyteorder(order)).tobytes()
    strips = channels if planar else 1
    bits, kind = tags.get("bits", 8 * samples.itemsize), {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    values: dict[int, list[int]] = {256: [width], 257: [height], 258: [bits] * channels, 259: [1], 262: [photometric]}
    values |= {273: [0] * strips, 274: [tags.get("orientation", 1)], 277: [channels], 278: [height]}
    values |= {279: [len(content) // strips] * strips, 284: [2 if planar else 1], 339: [kind] * channels}
    if "extra" in tags:
        values[338] = [tags["extra"]]
    start = 8 + 2 + 12 * len(values) + 4 + sum(4 * len(of) for of in values.values() if len(of) > 1)
    values[273] = [start + strip * len(content) // strips for strip in range(strips)]
    entries, beside = b"", b""
    for tag, of in sorted(values.items()):
        packed = struct.pack(f"{order}{len(of)}I", *of)
        if len(of) > 1:
            place = 8 + 2 + 12 * len(values) + 4 + len(beside)
            packed, beside = struct.pack(f"{order}I", place), beside + packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(of)) + packed
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(values))
    return head + entries + bytes(4) + beside + content


def record_of(config: DataConfig, data_sha256: str) -> Any:
    """Return what a record says of the images that its run saw."""
    spec = SimpleNamespace(data=config, smoke=False)
    return SimpleNamespace(spec=spec, provenance=SimpleNamespace(data_sha256=data_sha256))


def index_of(labels: Any, strata: Any = None, groups: Any = None, official_test: Any = None) -> ImageIndex:
    """Return a data set without images."""
    labels, strata, groups = (None if of is None else np.asarray(of, dtype=np.int64) for of in (labels, strata, groups))
    return ImageIndex(
        name="toy",
        labels=labels,
        own_strata=strata,
        contents=groups,
        class_names=tuple(f"class{k}" for k in range(labels.max() + 1)),
        official_test=official_test,
        licence="none",
        sha256="0" * 64,
        read=lambda i: pytest.fail("splits must not decode"),
    )
