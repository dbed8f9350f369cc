"""A few images of a data set as small PNG files, for a report; nothing is downloaded for them."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from peft_vit.config import DataConfig
from peft_vit.data.pixels import on_white
from peft_vit.data.registry import open_index
from peft_vit.errors import UserError
from peft_vit.packages import no_downloads

SIDE_PX = 96


def thumbnails(config: DataConfig, positions: Sequence[int], *, data_sha256: str, smoke: bool = False) -> list[bytes]:
    """Return images as PNG, the longer side `SIDE_PX` pixels; smaller ones are enlarged without smoothing.

    Args:
        config: which data set, and where it lies.
        positions: in the data set.
        data_sha256: of the images that a run saw.
        smoke: the synthetic files, see `open_index`.

    Raises:
        UserError: if the images are not on this machine, are others than those, or can't be decoded.
    """
    with no_downloads():
        index = open_index(config, smoke=smoke)
    if index.sha256 != data_sha256 or not all(0 <= position < len(index.labels) for position in positions):
        raise UserError(f"the images of {config.dataset} on this machine are not those of the run", field="data")
    return [_png(index.read(position), index.channels) for position in positions]


def _png(image: Image.Image, channels: int) -> bytes:
    plain = on_white(image).convert("L" if channels == 1 else "RGB")
    scale = SIDE_PX / max(plain.size)
    size = (max(1, round(plain.width * scale)), max(1, round(plain.height * scale)))
    small = plain.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, format="PNG", optimize=True)
    return file.getvalue()
