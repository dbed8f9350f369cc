"""Image files and archives as these tests write them."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


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


def png_by_hand(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """Return a PNG with any header and rows, after the specification (W3C, PNG third edition)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def member(name: str, **fields: Any) -> tarfile.TarInfo:
    """Return a member of a tar with some of its fields set."""
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar_gz(file: Path | str, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """Write a tar.gz."""
    with tarfile.open(file, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return Path(file)
