"""Reader of what the library `datasets` of Hugging Face opens: a name on its hub, a local folder, or a Parquet file.

Only image folders, Parquet and Arrow files are read by it: other kinds of files hold no images with labels, and some
are parsed by code that may do more than that. From the hub nothing is asked once a set is in the library's cache, so
that a study continues with the images it began with.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np

from peft_vit.base.errors import UserError, foreign_fault, named
from peft_vit.base.extras import require_extra
from peft_vit.base.files import LARGEST_BYTES, read_bytes
from peft_vit.base.packages import ask_hub, cache_dir, check_download
from peft_vit.core.config import DataConfig
from peft_vit.core.tasks import TASKS, Task
from peft_vit.data.files import FETCH_AGAIN, hashes, remembered, stamps
from peft_vit.data.index import ImageIndex, numbered
from peft_vit.data.pixels import decode_image
from peft_vit.data.sources.folders import SPLITS, TESTED

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, Features
    from pyarrow import ChunkedArray

_KINDS = SPLITS | {"dev": "val"}  # of splits, by their names
_HUB_NAME = re.compile(r"\w[\w.\-]*(/\w[\w.\-]*)?")
_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves
_NO_BYTES = "0" * 64  # instead of the hash of an image that is a file of its own


@dataclass(frozen=True)
class _Split:
    """A split with its columns, each of N rows."""

    name: str
    images: ChunkedArray  # of structs {bytes, path}, or of bytes
    classes: list[Any]  # a class's number, or the label itself; None where there is none
    files: dict[str, Path]  # that hold the table, by what is read of them


def read_hf(config: DataConfig) -> ImageIndex:
    """Index a data set that the library `datasets` reads, see `open_splits`.

    Its split `test` is the official test split; without it, `validation` is. If both are there, `validation` joins
    `train` as images that training and validation are drawn from. A split without any label is as if it were not
    there, and so is one of another name; both are reported. A single split is divided as the configuration says.

    Args:
        config: path, and perhaps columns and configuration of the set.

    Raises:
        UserError: as `open_splits`, and if images or labels can't be distinguished from other columns, an image has no
            label or one that is none of its task, or a file lies elsewhere.
    """
    path = str(config.path)  # the configuration has seen to it
    splits = open_splits(path, config.hub_subset)
    from pyarrow import chunked_array

    with named(path):
        features = next(
            (rows for name, rows in splits.items() if _KINDS.get(name) == "train"), next(iter(splits.values()))
        ).features
        image, label = _columns(features, config)
        notes: list[str] = []
        parts = _labelled([_split(name, rows, image, label, features, path) for name, rows in splits.items()], notes)
        is_test = _official_test(parts, notes)
        feature = features[label]
        holds = "numbers" if getattr(feature, "dtype", "").startswith(("float", "double")) else "classes"
        holds = "lists" if _inner(feature) else holds
        fitting = (task for task in TASKS.values() if task.column == holds)
        task = TASKS[config.task] if config.task else next(fitting)
        if task.one_class and holds == "lists":
            message = f"column '{label}' holds lists, which are not {task.name}; leave task out"
            raise UserError(message, field="data.task")
        titles = [f"{part.name}[{row}]" for part in parts for row in range(len(part.classes))]
        values = [value for part in parts for value in part.classes]
        images = chunked_array([chunk for part in parts for chunk in part.images.chunks])
        if task.one_class:
            names, labels = _classes(values, feature, label, notes)
            texts = [names[k] for k in labels]
        else:
            column = "label" if holds == "lists" else label  # they stand in one cell, as in a table
            texts = _texts(values, titles, feature, column, task)
            names, labels = task.read_split(texts, (column,), is_test)
        digests = [digest for part in parts for digest in _digests(part)]
        titles, digests = _with_files(images, titles, digests, path)
        lines = [f"{part.name}\0{len(part.images)}\n" for part in parts]
        lines += [f"{text}\0{digest}\n" for text, digest in zip(texts, digests, strict=True)]

        def read(i: int) -> bytes:
            content, file = _stored(images[i])
            if content is None:
                return read_bytes(str(file))
            if len(content) > LARGEST_BYTES:
                raise OSError(f"larger than {LARGEST_BYTES} bytes")
            return content

        return ImageIndex(
            labels=labels,
            class_names=names,
            official_test=is_test,
            sha256=hashlib.sha256("".join(lines).encode()).hexdigest(),
            read=lambda i: decode_image(lambda: read(i), f"{path}: {titles[i]}"),
            names=titles,
            contents=numbered(digests)[1],
            notes=tuple(notes),
            task=task,
        )


# --- opening ----------------------------------------------------------------------------------------------------------


def open_splits(path: str, subset: str | None) -> dict[str, Dataset]:
    """Return the splits of a set by name, memory-mapped; nothing is decoded.

    Args:
        path: an existing folder or Parquet file, or else a name on the hub.
        subset: which of the configurations of the set, for those that have several.

    Raises:
        UserError: if the library is missing or too old, nothing is there, it can't be loaded from the hub, or it is of
            a kind that is not read.
    """
    require_extra("hf", "hf", field="data.dataset")
    place = Path(os.path.abspath(os.path.expanduser(path)))
    with _quiet():
        try:
            if os.path.exists(os.path.expanduser(path)):  # unlike Path.exists, also False for an impossible name
                return _local(place, subset)
            if not _HUB_NAME.fullmatch(path):
                raise UserError(
                    "does not exist, and is not a name on the hub; correct it", file=path, field="data.path"
                )
            return _from_hub(path, subset)
        except UserError:
            raise
        except Exception as error:  # a foreign set can fail in any way; the user needs one line
            field = "data.hub_subset" if "config" in str(error).lower() else "data.path"
            message = f"can't be read by the library datasets ({_reason(error)})"
            raise UserError(message, file=_damaged(place) or path, field=field) from None


def _damaged(place: Path) -> Path | None:
    """Return the first Parquet file at or below a place that can't be read; the library's errors name none."""
    from pyarrow.parquet import ParquetFile

    for file in [place] if place.suffix == ".parquet" else sorted(place.rglob("*.parquet")):
        try:
            for _ in ParquetFile(file).iter_batches():
                pass
        except Exception:  # of whatever kind, the library's own error is told
            return file
    return None


def _reason(error: BaseException) -> str:
    """Return what went wrong, on one line; the library names it in the cause of its own error."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's notes and bars off the terminal; bars of downloads, which are the hub client's, stay."""
    import datasets
    from tqdm import tqdm

    tqdm.set_lock(RLock())  # its own one is between processes, and is warned of when a command ends
    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors are raised too
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _cache() -> Path:
    return cache_dir() / "datasets"


def _local(place: Path, subset: str | None) -> dict[str, Dataset]:
    import datasets

    saved = any((place / name).is_file() for name in _SAVED)
    if subset is not None and (saved or not place.is_dir()):
        raise UserError("has no effect here: this is one set; remove it", field="data.hub_subset")
    if saved:
        loaded = datasets.load_from_disk(str(place))
        return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    if place.is_dir():
        builder = datasets.load_dataset_builder(str(place), subset, cache_dir=str(_cache()))
        root = os.path.realpath(place)
        for file in (file for files in (builder.config.data_files or {}).values() for file in files):
            if not Path(os.path.realpath(file)).is_relative_to(root):
                raise UserError(f"leads out of {root}; copy the file into it", file=file)
    elif place.is_file() and place.suffix == ".parquet":
        builder = datasets.load_dataset_builder("parquet", data_files={"train": str(place)}, cache_dir=str(_cache()))
    else:
        raise UserError("expected a folder, a .parquet file or a name on the hub", file=place, field="data.path")
    return _prepared(builder, str(place))


def _prepared(builder: DatasetBuilder, path: str) -> dict[str, Dataset]:
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.cache.cache import Cache
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    from datasets.packaged_modules.parquet.parquet import Parquet

    if not isinstance(builder, (ImageFolder, Parquet, Arrow, Cache)):
        kind = type(builder).__module__.rpartition(".")[2]
        message = f"is a set of the kind {kind}; only image folders, Parquet and Arrow files are read"
        raise UserError(message, file=path, field="data.path")
    builder.download_and_prepare()
    return dict(builder.as_dataset())


def _from_hub(name: str, subset: str | None) -> dict[str, Dataset]:
    """Return a set of the hub, from the library's cache if it is there."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    cached = {"dataset_name": name.rpartition("/")[2], "config_name": subset, "repo_id": name}
    try:
        return _prepared(Cache(**cached, version="auto", hash="auto"), name)
    except Exception as error:  # is not there, or only a part of it
        if "multiple" in str(error):
            raise
    check_download(f"the data set {name} of the hub")
    try:
        ask_hub(f"{huggingface_hub.constants.ENDPOINT}/api/datasets/{name}")
        builder = datasets.load_dataset_builder(name, subset)
    except ValueError:  # its configurations, by name
        raise
    except Exception as error:  # the client's errors differ by version; each means that there is no set
        raise UserError(
            f"is not here, and can't be fetched from the hub ({_reason(error)}); correct the path or name; "
            f"without a network, name a local folder, made elsewhere by: hf download {name} --repo-type dataset "
            "--local-dir FOLDER",
            file=name,
            field="data.path",
        ) from None
    return _prepared(builder, name)


# --- columns ----------------------------------------------------------------------------------------------------------


def _columns(features: Features, config: DataConfig) -> tuple[str, str]:
    """Return the columns of images and of labels: those asked for, or else the only likely ones.

    Labels are likely to be those of classes, or else lists of these, or else texts or whole numbers, or
    else lists of texts or other numbers; or what is called label.
    """
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    possible = list(images)
    classes, lists, singles, others = [], [], [], []  # columns that could hold labels, the likeliest first
    for name, feature in features.items():
        dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
        # As Parquet files have images that do not say that they are some.
        if dtype in ("binary", "large_binary") or (isinstance(feature, dict) and set(feature) == {"bytes", "path"}):
            possible.append(name)
        inner = _inner(feature)
        if isinstance(feature, datasets.ClassLabel):
            classes.append(name)
        elif isinstance(inner, datasets.ClassLabel):
            lists.append(name)
        elif dtype.startswith(("int", "uint", "string", "large_string", "bool")):
            singles.append(name)
        elif inner or dtype.startswith(("float", "double")):
            others.append(name)
    image = _column("image", "hold images", features, config.image_column, images or possible, possible)
    singles = [name for name in singles if name != image]
    possible = classes + lists + singles + others
    likely = classes or lists or singles or others
    if "label" in (classes or lists or possible):
        likely = ["label"]
    return image, _column("label", "could be the label", features, config.label_column, likely, possible)


def _inner(feature: Any) -> Any:
    """Return the feature of what a list of labels holds; None: it is none."""
    import datasets

    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    text = isinstance(inner, datasets.Value) and inner.dtype in ("string", "large_string")
    return inner if text or isinstance(inner, datasets.ClassLabel) else None


def _column(what: str, why: str, features: Features, column: str | None, likely: list[str], possible: list[str]) -> str:
    """Return the column asked for, which has to be a possible one, or else the only likely one."""
    if column is None and len(likely) == 1:
        return likely[0]
    if column is None:
        message = f"{len(likely)} of the columns {', '.join(features)} {why}; name the one to read"
    elif column not in features:
        message = f"there is no column '{column}'; expected one of {', '.join(features)}"
    elif column in possible:
        return column
    else:
        dtype = getattr(features[column], "dtype", None)
        kind = dtype if isinstance(dtype, str) else type(features[column]).__name__
        names = f"; name one of {', '.join(possible)}" if possible else ""
        message = f"column '{column}' holds no {what}s, but {kind}{names}"
    raise UserError(message, field=f"data.{what}_column")


# --- splits and classes -----------------------------------------------------------------------------------------------


def _split(name: str, rows: Dataset, image: str, label: str, features: Features, path: str) -> _Split:
    """Return a split's columns, which have to be those of `features`; only the labels may be missing."""
    import datasets

    columns = [column for column in (image, label) if column in rows.features]
    for column in (image, *columns):
        if rows.features.get(column) != features[column]:  # classes in another order would be other numbers
            message = f"column '{column}' of split {name} is not as in the others; save all splits with equal columns"
            raise UserError(message, field="data.path")
    with foreign_fault(f"has a damaged split {name}", path, remedy=FETCH_AGAIN):
        table = rows.select_columns(columns).with_format("arrow")[:]
        for column in columns:
            table.column(column).validate(full=True)  # a file of others may lie about where a value ends
    classes = [None] * len(table)
    if label in columns:
        numbers = isinstance(features[label], datasets.ClassLabel)  # of which -1 is kept back
        values = table.column(label).to_pylist()
        classes = [None if value in (None, "") or (numbers and value < 0) else value for value in values]
    files = {f"{name} {image} {k}": Path(file["filename"]) for k, file in enumerate(rows.cache_files)}
    return _Split(name, table.column(image), classes, files)


def _labelled(parts: list[_Split], notes: list[str]) -> list[_Split]:
    """Return the splits that have labels."""
    labelled = []
    for part in parts:
        missing = [row for row, value in enumerate(part.classes) if value is None]
        if missing and len(missing) == len(part.classes):
            notes.append(f"split {part.name} has no labels and is left out")
        elif missing:
            among = f", as {len(missing)} of {len(part.classes)} there" if len(missing) > 1 else ""
            message = f"{part.name}[{missing[0]}] has no label{among}; remove it, or name another column"
            raise UserError(message, field="data.label_column")
        elif part.classes:
            labelled.append(part)
    if not labelled:
        raise UserError("holds no image with a label", field="data.path")
    return labelled


def _official_test(parts: list[_Split], notes: list[str]) -> np.ndarray | None:
    """Take out what is no split of a known name, and return which images are test images, (N,) bool, if any are."""
    if len(parts) == 1:
        return None
    for part in [part for part in parts if part.name not in _KINDS]:
        notes.append(f"split {part.name} is left out; only train, validation and test are read")
        parts.remove(part)
    kinds = {_KINDS[part.name] for part in parts}
    if "train" not in kinds:
        named = ", ".join(sorted(part.name for part in parts)) or "of other names"
        raise UserError(f"has the splits {named}; expected train beside them", field="data.path")
    test = next((kind for kind in TESTED if kind in kinds), None)
    is_test = [np.full(len(part.images), _KINDS[part.name] == test) for part in parts]
    return np.concatenate(is_test) if test else None


def _texts(values: list[Any], titles: list[str], feature: Any, column: str, task: Task) -> list[str]:
    """Return labels as a table has them, N of them: a number, or names with | between them."""
    inner, texts = _inner(feature), []
    names = getattr(inner, "names", None)  # of numbered classes
    for title, value in zip(titles, values, strict=True):
        several = list(value) if inner else [value]
        if names is not None:
            several = [names[k] if k is not None and 0 <= k < len(names) else k for k in several]
        text = "|".join(map(str, several))
        odd = [name for name in several if inner and (not isinstance(name, str) or "|" in name or not name.strip())]
        fault = f"{odd[0]!r} is not the name of a class without |" if odd else task.fault({column: text})
        if fault:
            raise UserError(f"{title}: {fault}", field="data.label_column")
        texts.append(text)
    return texts


def _classes(values: list[Any], feature: Any, label: str, notes: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of classes that have images, in the order of the set or sorted, and labels (N,) int64."""
    import datasets

    present, labels = numbered(values)
    if not isinstance(feature, datasets.ClassLabel):
        return tuple(map(str, present)), labels
    if present[-1] >= feature.num_classes:
        message = f"column '{label}' holds {present[-1]}, but has only {feature.num_classes} classes"
        raise UserError(message, field="data.label_column")
    if absent := [name for k, name in enumerate(feature.names) if k not in present]:
        notes.append(f"{len(absent)} of {feature.num_classes} classes have no image, such as '{absent[0]}'")
    return tuple(feature.names[k] for k in present), labels


# --- images -----------------------------------------------------------------------------------------------------------


def _with_files(images: ChunkedArray, titles: list[str], digests: list[str], path: str) -> tuple[list[str], list[str]]:
    """Return titles and digests with those of files beside the table: in a local folder the path there is the title."""
    import datasets

    library = (_cache(), datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    roots = [Path(os.path.realpath(root)) for root in (os.path.expanduser(path), *library)]
    beside: dict[str, Path] = {}  # by row
    named_as = list(titles)
    for row, title in enumerate(titles):
        if digests[row] == _NO_BYTES:
            file = str(_stored(images[row])[1])
            real = Path(os.path.realpath(file))
            fault = ""
            if not os.path.isfile(file):
                fault = "does not exist, and holds no image itself"
            elif not any(map(real.is_relative_to, roots)):
                fault = "leads out of the data set; copy it into it"
            if fault:
                raise UserError(f"names the file {file}, which {fault}", file=f"{path}: {title}")
            beside[title] = Path(file)
            if real.is_relative_to(roots[0]):
                named_as[row] = real.relative_to(roots[0]).as_posix()
    of_files = hashes(beside).each if beside else {}
    return named_as, [of_files.get(title, digest) for title, digest in zip(titles, digests, strict=True)]


def _digests(part: _Split) -> list[str]:
    """Return the SHA-256 of each image, `_NO_BYTES` of those that are files of their own."""

    def compute() -> list[str]:
        digests = []
        for row, scalar in enumerate(part.images):
            content, file = _stored(scalar)
            if content is None and not file:
                raise UserError(f"{part.name}[{row}] has no image; remove it", field="data.image_column")
            digests.append(_NO_BYTES if content is None else hashlib.sha256(content).hexdigest())
        return digests

    def read(digests: list[str]) -> list[str]:
        if len(digests) != len(part.images):
            raise ValueError
        return digests

    return remembered("hashes", stamps(part.files), compute, read) if part.files else compute()


def _stored(scalar: Any) -> tuple[bytes | None, str | None]:
    """Return an image file's content, or its path, out of a row."""
    value = scalar.as_py()
    return (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)


SOURCES = {"hf": read_hf}
