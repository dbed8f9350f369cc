"""Reader of labelled images in tables: data sets of Hugging Face's hub, folders of Parquet or images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_vit.config import DataConfig
from peft_vit.data.decoding import decode_image
from peft_vit.data.files import hashes, remembered
from peft_vit.data.hub import open_splits, reason, roots
from peft_vit.data.index import ImageIndex, refuse_several_labels
from peft_vit.errors import UserError
from peft_vit.safe_io import LARGEST_BYTES, read_bytes

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from pyarrow import ChunkedArray

_LABEL = "label"  # what a column of labels is mostly called
_TRAIN = ("train", "training")
_VALIDATION = ("validation", "valid", "val", "dev")
_TEST = ("test", "testing")
_NO_BYTES = "0" * 64  # in place of the hash of an image that is a file of its own


@dataclass(frozen=True)
class _Split:
    """A split with its columns, each of N rows."""

    name: str
    images: ChunkedArray  # of structs {bytes, path}, or of bytes
    classes: list[Any]  # a class's number, or the label itself; None where there is none
    files: tuple[Path, ...]  # that hold the table


def read_hf(config: DataConfig) -> ImageIndex:
    """Index a data set that the library `datasets` reads, see `open_splits`.

    Its split `test` is the official test split; without it, `validation` is. If both are there, `validation` joins
    `train` as images that training and validation are drawn from. A split without any label is as if it were not
    there, and so is one of another name; both are told. A single split is divided as the configuration says.

    Args:
        config: path, and perhaps columns and configuration of the set.

    Raises:
        UserError: as `open_splits`, and if images or labels can't be told from other columns, an image has several
            labels or none, or a file lies elsewhere.
    """
    path = str(config.path)  # the configuration has seen to it
    splits = open_splits(path, config.hub_subset)
    features = next((splits[name] for name in _TRAIN if name in splits), next(iter(splits.values()))).features
    image = _image_column(features, config.image_column, path)
    label = _label_column(features, image, config.label_column, path)
    notes: list[str] = []
    tables = [_split(name, rows, image, label, features, path) for name, rows in splits.items()]
    parts = _labelled(tables, path, notes)
    is_test = _official_test(parts, path, notes)
    names, labels = _classes(parts, features[label], label, path, notes)
    titles, digests = _titles_and_digests(parts, path)
    lines = (f"{names[k]}\0{digest}\n" for k, digest in zip(labels, digests, strict=True))
    starts = np.cumsum([0, *(len(part.images) for part in parts)])

    def read(i: int) -> bytes:
        k = int(np.searchsorted(starts, i, side="right")) - 1
        return _content(parts[k].images[i - int(starts[k])].as_py())

    return ImageIndex(
        labels=labels,
        strata=labels,
        class_names=names,
        official_test=is_test,
        sha256=hashlib.sha256("".join([*(f"{p.name}\0{len(p.images)}\n" for p in parts), *lines]).encode()).hexdigest(),
        read=lambda i: decode_image(lambda: read(i), f"{path}: {titles[i]}"),
        names=titles,
        contents=np.unique(digests, return_inverse=True)[1].astype(np.int64),
        notes=tuple(notes),
    )


# --- columns --------------------------------------------------------------------------------------------------------


def _image_column(features: Features, asked: str | None, path: str) -> str:
    import datasets

    def holds_bytes(feature: Any) -> bool:  # as Parquet files have them that do not say that they are images
        plain = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
        return plain or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = images or [name for name, feature in features.items() if holds_bytes(feature)]
    possible = [name for name, feature in features.items() if name in images or holds_bytes(feature)]
    return _column("image", "hold images", features, asked, found, possible, path)


def _label_column(features: Features, image: str, asked: str | None, path: str) -> str:
    """Return the column asked for; else the one of classes, or else of texts or whole numbers, or called label."""
    import datasets

    several = [
        name
        for name, feature in features.items()
        if isinstance(feature, (datasets.List, datasets.LargeList)) and _is_plain_label(feature.feature)
    ]
    plain = [name for name, feature in features.items() if _is_plain_label(feature) and name != image]
    classes = [name for name in plain if isinstance(features[name], datasets.ClassLabel)]
    only = several[0] if asked is None and not plain and len(several) == 1 else asked
    if only in several:
        problem = f"column '{only}' holds several labels an image; a model here tells one class of each image"
        raise UserError(f"{problem}{_such_as(plain)}", file=path, field="data.label_column")
    found = classes or plain
    found = [_LABEL] if _LABEL in found else found
    return _column("label", "could be the label", features, asked, found, plain, path)


def _column(
    what: str, why: str, features: Features, asked: str | None, found: list[str], possible: list[str], path: str
) -> str:
    """Return the column asked for, which has to be a possible one, or else the one that is found."""
    field = f"data.{what}_column"
    if asked is None:
        if len(found) != 1:
            problem = f"{len(found)} of the columns {', '.join(features)} {why}; name the one to read"
            raise UserError(problem, file=path, field=field)
        return found[0]
    if asked not in features:
        raise UserError(f"there is no column '{asked}'; expected one of {', '.join(features)}", file=path, field=field)
    if asked not in possible:
        dtype = getattr(features[asked], "dtype", None)
        kind = dtype if isinstance(dtype, str) else type(features[asked]).__name__
        problem = f"column '{asked}' holds no {what}s, but {kind}{_such_as(possible)}"
        raise UserError(problem, file=path, field=field)
    return asked


def _is_plain_label(feature: Any) -> bool:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and (
        feature.dtype in ("string", "large_string", "bool") or feature.dtype.startswith(("int", "uint"))
    )


def _such_as(columns: list[str]) -> str:
    return f"; name one of {', '.join(columns)}" if columns else ""


# --- splits and classes ---------------------------------------------------------------------------------------------


def _split(name: str, rows: Dataset, image: str, label: str, features: Features, path: str) -> _Split:
    """Return a split's columns, which have to be those of `features`; only the labels may be missing."""
    import datasets

    columns = [column for column in (image, label) if column in rows.features]
    for column in (image, *columns):
        if rows.features.get(column) != features[column]:  # classes in another order would be other numbers
            problem = f"column '{column}' of split {name} is not as in the others; save all splits with equal columns"
            raise UserError(problem, file=path, field="data.path")
    try:
        table = rows.select_columns(columns).with_format("arrow")[:]
        for column in columns:
            table.column(column).validate(full=True)  # a file of others may lie about where a value ends
    except Exception as error:  # a foreign table can fail in any way; the user needs one line
        raise UserError(f"has a damaged split {name} ({reason(error)}); fetch it again", file=path) from None
    classes = [None] * len(table)
    if label in columns:
        classes = [None if value in (None, "") else value for value in table.column(label).to_pylist()]
    if isinstance(features[label], datasets.ClassLabel):
        classes = [None if value is None or value < 0 else value for value in classes]  # -1: kept back
    return _Split(name, table.column(image), classes, tuple(Path(file["filename"]) for file in rows.cache_files))


def _labelled(parts: list[_Split], path: str, notes: list[str]) -> list[_Split]:
    """Return the splits that have labels."""
    kept = []
    for part in parts:
        missing = [row for row, value in enumerate(part.classes) if value is None]
        if missing and len(missing) == len(part.classes):
            notes.append(f"split {part.name} has no labels and is left out")
        elif missing:
            among = f", as {len(missing)} of {len(part.classes)} there" if len(missing) > 1 else ""
            problem = f"{part.name}[{missing[0]}] has no label{among}; take it out, or name another column"
            raise UserError(problem, file=path, field="data.label_column")
        elif part.classes:
            kept.append(part)
    if not kept:
        raise UserError("holds no image with a label", file=path, field="data.path")
    return kept


def _official_test(parts: list[_Split], path: str, notes: list[str]) -> np.ndarray | None:
    """Take out what is no split of a known name, and return which images are test images, (N,) bool, if any are."""
    if len(parts) == 1:
        return None
    known = (*_TRAIN, *_VALIDATION, *_TEST)
    for part in [part for part in parts if part.name not in known]:
        notes.append(f"split {part.name} is left out; only train, validation and test are read")
        parts.remove(part)
    present = {part.name for part in parts}
    if not present.intersection(_TRAIN):
        named = ", ".join(sorted(present)) or "of other names"
        raise UserError(f"has the splits {named}; expected train beside them", file=path, field="data.path")
    test = next((names for names in (_TEST, _VALIDATION) if present.intersection(names)), ())
    if not test:
        return None
    return np.concatenate([np.full(len(part.images), part.name in test) for part in parts])


def _classes(
    parts: list[_Split], feature: Any, label: str, path: str, notes: list[str]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of classes that have images, in the order of the set or sorted, and labels (N,) int64."""
    import datasets

    values = [value for part in parts for value in part.classes]
    present = sorted(set(values))
    number = {value: k for k, value in enumerate(present)}
    labels = np.array([number[value] for value in values], dtype=np.int64)
    if not isinstance(feature, datasets.ClassLabel):
        names = tuple(str(value) for value in present)
        refuse_several_labels(names, path, f"column '{label}'")
        return names, labels
    if present[-1] >= feature.num_classes:
        problem = f"column '{label}' holds {present[-1]}, but has only {feature.num_classes} classes"
        raise UserError(problem, file=path, field="data.label_column")
    absent = [name for k, name in enumerate(feature.names) if k not in number]
    if absent:
        notes.append(f"{len(absent)} of {feature.num_classes} classes have no image, such as '{absent[0]}'")
    return tuple(feature.names[k] for k in present), labels


# --- images ---------------------------------------------------------------------------------------------------------


def _titles_and_digests(parts: list[_Split], path: str) -> tuple[list[str], list[str]]:
    """Return what to call each image, and the SHA-256 of its content."""
    import pyarrow.compute as pc

    digests: list[str] = []
    own = [f"{part.name}[{row}]" for part in parts for row in range(len(part.images))]
    inside = roots(path)
    beside: dict[str, Path] = {}
    for part in parts:
        start = len(digests)
        files = {f"{part.name} {k}": file for k, file in enumerate(part.files)}
        digests += remembered(files, len(part.images), partial(_digests, part, path))
        if _NO_BYTES in digests[start:]:
            paths = pc.struct_field(part.images, "path").to_pylist()
            for row, (digest, file) in enumerate(zip(digests[start:], paths, strict=True)):
                if digest == _NO_BYTES:
                    beside[own[start + row]] = _own_file(file, inside, f"{path}: {own[start + row]}")
    of_files: Mapping[str, str] = hashes(beside).each if beside else {}
    titles = []  # of a file in a local folder its path there, else the row
    for title in own:
        real = Path(os.path.realpath(beside[title])) if title in beside else None
        below = real is not None and real.is_relative_to(inside[0])
        titles.append(real.relative_to(inside[0]).as_posix() if real is not None and below else title)
    return titles, [of_files.get(title, digest) for title, digest in zip(own, digests, strict=True)]


def _digests(part: _Split, path: str) -> list[str]:
    digests = []
    for row, scalar in enumerate(part.images):
        value = scalar.as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is not None:
            digests.append(hashlib.sha256(content).hexdigest())
        elif isinstance(value, dict) and value.get("path"):
            digests.append(_NO_BYTES)
        else:
            raise UserError(f"{part.name}[{row}] has no image; take it out", file=path, field="data.image_column")
    return digests


def _own_file(file: str, inside: tuple[Path, ...], title: str) -> Path:
    """Return the path of an image that a row names; raises UserError if it is none of the set's files."""
    if not os.path.isfile(file):
        raise UserError(f"names the file {file}, which does not exist, and holds no image itself", file=title)
    if not any(Path(os.path.realpath(file)).is_relative_to(root) for root in inside):
        raise UserError(f"names the file {file}, which leads out of the data set; copy it into it", file=title)
    return Path(file)


def _content(value: Any) -> bytes:
    """Return an image file's content out of a row; raises OSError if it can't be read."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None:
        return read_bytes(value["path"])
    if len(content) > LARGEST_BYTES:
        raise OSError(f"larger than {LARGEST_BYTES} bytes")
    return bytes(content)
