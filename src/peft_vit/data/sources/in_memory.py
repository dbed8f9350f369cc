"""Images that a program holds: arrays, PIL images, paths, and tables and data sets of them.

Each becomes a path or pixels, which a model takes. To be trained on they are written to the cache, once each, and
listed in a table, which is read as a person's own is.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from peft_vit.base.errors import UserError
from peft_vit.base.files import write_atomically
from peft_vit.base.packages import cache_dir
from peft_vit.data.files import cache_fault, new_in_cache
from peft_vit.data.pixels import on_white

_COLUMNS = ("image", "img", "path", "file", "filename", "file_name", "filepath")
_LABEL_COLUMNS = ("label", "class", "category")
_CHANNELS = (1, 3, 4)
_LARGEST = {"u": 255, "i": 255, "f": 1}  # value, by the kind of a number
_BATCH = "(N, H, W), (N, H, W, 3) or (N, 3, H, W)"

HeldImage: TypeAlias = Path | NDArray[np.uint8]


def held_folder() -> Path:
    """Return where images are written that a program holds."""
    return cache_dir() / "held"


def held_images(held: Any) -> Iterator[tuple[HeldImage, Any]]:
    """Yield images as paths or as pixels (H, W), (H, W, 3) or (H, W, 4), each with its label, None where it has none.

    Args:
        held: several paths, PIL images or arrays; one array or tensor (N, H, W), (N, H, W, C) or (N, C, H, W); a
            DataFrame or a Hugging Face Dataset with a column image, img, path, file or filename, and perhaps label or
            class; a torch Dataset, or a list, of pairs of image and label. Numbers are integers from 0 to 255 or
            floats from 0 to 1.

    Raises:
        UserError: in one line, if they are none of these.
    """
    for position, item in enumerate(_items(held)):
        image, label = _pair(item)
        yield _pixels(image, position), label.item() if hasattr(label, "item") else label


def _items(held: Any) -> Iterable[Any]:
    if isinstance(held, str | os.PathLike | Image.Image):
        return [held]
    of_label = getattr(held, "features", {}).get("label")
    if names := getattr(getattr(of_label, "feature", None), "names", None):  # lists of numbered classes
        return ({**row, "label": [names[k] for k in row["label"]]} for row in held)
    if hasattr(held, "iloc"):  # of pandas
        return held.to_dict("records") if held.ndim == 2 else held.tolist()
    if getattr(held, "dtype", None) is not None:
        array = np.asarray(held)  # of tensors, too
        if array.dtype.kind in "biufc" and (
            array.ndim not in (3, 4) or (array.ndim == 3 and array.shape[2] in _CHANNELS)
        ):
            message = f"expected images as {_BATCH}, got {array.shape}; of one image give [image]"
            raise UserError(message, field="images")
        return array
    return held if hasattr(held, "__iter__") else (held[position] for position in range(len(held)))


def _pair(item: Any) -> tuple[Any, Any]:
    """Return an image as it is held, and its label."""
    if isinstance(item, Mapping):
        label = next((name for name in _LABEL_COLUMNS if name in item), "label")
        others = [name for name in item if name != label]
        name = next((name for name in _COLUMNS if name in item), others[0] if len(others) == 1 else None)
        if name is None:
            message = f"expected a column {', '.join(_COLUMNS)}, and perhaps label; got {', '.join(map(str, item))}"
            raise UserError(message, field="images")
        return item[name], item.get(label)
    return item if isinstance(item, tuple) and len(item) == 2 else (item, None)


def _pixels(image: Any, position: int) -> HeldImage:
    where = f"images[{position}]"
    if isinstance(image, str | os.PathLike):
        return Path(image).expanduser()
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise UserError(f"has pixels of mode {image.mode}; scale them to 8 bits a channel", field=where)
        return np.asarray(on_white(ImageOps.exif_transpose(image)).convert("RGB"))
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in _CHANNELS:
        array = np.moveaxis(array, 0, 2)  # (C, H, W) -> (H, W, C)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    largest = _LARGEST.get(array.dtype.kind)
    is_shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS)
    if largest is None or not is_shaped or not array.size:
        got = f"{array.shape} {array.dtype}" if array.ndim else type(image).__name__
        message = f"expected a path, a PIL image or numbers (H, W), (H, W, 3) or (3, H, W), got {got}"
        raise UserError(message, field=where)
    if array.dtype == np.uint8:
        return array
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= largest):  # nan is neither
        message = f"has values from {low:g} to {high:g}; integers are 0 to 255, floats 0 to 1"
        raise UserError(message, field=where)
    return np.rint(array * (255 / largest)).astype(np.uint8)


def _refuse_missing(labels: Iterable[Any], first: int = 0) -> None:
    for position, label in enumerate(labels, first):
        if label is None or (isinstance(label, float) and math.isnan(label)):
            message = f"are missing, the first at {position}; give one for each image, or leave such images out"
            raise UserError(message, field="labels")


def write_table(images: Any, labels: Any = None, *, of_classes: bool = True) -> tuple[Path, NDArray[Any]]:
    """Write a table of images and labels, as `find_images` reads it, to the cache; equal ones of a class are one row.

    Args:
        images: see `held_images`.
        labels: of each, N; None: `images` hold them.
        of_classes: each has one class; False: lists of names and numbers are labels, too.

    Returns:
        Its path, and the different labels, sorted.

    Raises:
        UserError: see `held_images`; if there are no labels, or they can't be names of classes.
        ValueError: of scikit-learn, for labels that are not classes, or not as many as images.
    """
    from sklearn.utils import check_consistent_length, column_or_1d
    from sklearn.utils.multiclass import check_classification_targets

    if labels is not None:
        check_consistent_length(images, labels)
        _refuse_missing(labels if of_classes else ())  # before scikit-learn makes texts of them
        labels = column_or_1d(labels) if of_classes else list(labels)
    rows: list[tuple[str, Any]] = []
    for position, (image, held_label) in enumerate(held_images(images)):
        label = held_label if labels is None else labels[position]
        if labels is None or label is None:
            _refuse_missing([label], position)
        place = os.path.abspath(image) if isinstance(image, Path) else _written(image, str(label))
        rows.append((place, label if of_classes else _cell(label)))
    if not rows:
        raise UserError("are none; give some of each class", field="images")
    known = column_or_1d([label for _, label in rows]) if labels is None or not of_classes else labels
    if of_classes:
        check_classification_targets(known)
    texts = dict.fromkeys((place, str(label)) for place, label in rows)
    if wrong := [label for _, label in texts if (of_classes and not label) or label != label.strip()]:
        raise UserError(f"{wrong[0]!r} is empty, or begins or ends with a space; correct it", field="labels")
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(("path", "label"))
    writer.writerows(texts)
    encoded = content.getvalue().encode()
    table = held_folder() / f"images-{hashlib.sha256(encoded).hexdigest()[:16]}.csv"
    with cache_fault(table):
        write_atomically(table, encoded)
    return table, np.unique(known)


def _cell(label: Any) -> str:
    """Return a label as a table has it: a name, a number, or names with | between them."""
    if not isinstance(label, list | tuple | np.ndarray):
        return str(label)
    if odd := [name for name in label if not isinstance(name, str) or "|" in name or not name]:
        message = f"{odd[0]!r} in a list is not the name of a class; of several numbers give a table, a column each"
        raise UserError(message, field="labels")
    return "|".join(label)


def _written(pixels: NDArray[np.uint8], label: str) -> str:
    """Write an image, unless it is there, and return its file's name: equal ones of two labels stay two files."""
    name = f"{hashlib.sha256(repr((label, pixels.shape)).encode() + pixels.tobytes()).hexdigest()[:32]}.png"
    file = held_folder() / name
    if not file.exists():
        with new_in_cache(file) as made:
            Image.fromarray(pixels).save(made, compress_level=1)
    return name
