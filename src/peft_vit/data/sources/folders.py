"""Readers of a person's image files with labels: class folders, a table of paths and labels, shards.

Studies say exactly where their images are. `find_images` takes them as people have them, before they are inspected.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np

from peft_vit.base.console import quoted, some_of
from peft_vit.base.errors import UserError, named
from peft_vit.base.files import read_bytes
from peft_vit.core.config import DataConfig, TaskName
from peft_vit.core.tasks import CLASSIFICATION, TASKS, Labels, Task
from peft_vit.data.files import IMAGE_SUFFIXES, SHARDS, FileTree, Hashes, existing, hashes, open_tree
from peft_vit.data.index import DIGEST_LETTERS, ImageIndex, ImagesFile, numbered
from peft_vit.data.pixels import decode_image
from peft_vit.data.shards import read_shards
from peft_vit.data.sources.tables import INCOMPLETE, TABLES, table_rows

_JUNK = ("/thumbs.db", "/desktop.ini")
_BESIDE = IMAGE_SUFFIXES[:7]  # beside class folders: not to be told of. Kept studies pass over the other ones there
_TABLES_BESIDE = ("images.csv", "labels.csv", "images.parquet", "labels.parquet")  # of images that lie there
UNSURE = "unsure"  # in a table's column split: of an image whose label nobody could tell
IS_UNSURE = f"is marked {UNSURE}"
_REPEATED = "occurs twice; the first row is used"
_CLASSES = ("label",)
_NO_IMAGE = f"holds no image ({' '.join(IMAGE_SUFFIXES)}) in a class folder"
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "val"
)
TESTED = ("test", "val")  # the first that is there is the test split


# --- class folders ----------------------------------------------------------------------------------------------------


def read_image_folder(config: DataConfig) -> ImageIndex:
    """Index ROOT/<class>/<image>, or ROOT/train/<class>/<image> with ROOT/test/... or ROOT/val/... beside it.

    In the second layout test/ is the official test split; without test/, val/ is. If all three are there, val/ joins
    train/ as images that training and validation are drawn from. val/ may be called valid/ or validation/, and all of
    them may be written in capitals, and as training/ and testing/. An image is of the class of its highest folder
    there, however deep it lies. Links to folders that are read elsewhere are reported.

    `images_file` is what was found when they were looked at: it says what is left out, what is a copy of what, and
    which images are tested in the end, whatever their folders are. Without it nothing may have to be left out.
    """
    return _read(config, _found(existing(str(config.path)), is_said=True))


def _read(config: DataConfig, images: Images) -> ImageIndex:
    if config.images_file is not None:
        file = Path(config.images_file).expanduser()
        return index_inspected(images, ImagesFile.read(file), file, as_then=True)
    if images.dataset != config.dataset or images.taken is not None:
        place = images.path if images.dataset == "csv" else images.tree.location
        message = f"has no class folders; use {place} instead, with dataset: {images.dataset}"
        raise UserError(message, file=config.path, field="data.path")
    for name, why in images.left_out.items():
        if not name.endswith("/"):
            raise UserError(f"{why}; repair it or remove it", file=images.tree.file(name))
    notes = tuple(f"{folder} {why}" for folder, why in sorted(images.left_out.items()))
    return replace(_index(images), notes=notes)


def index_inspected(images: Images, inspected: ImagesFile, file: Path, *, as_then: bool = False) -> ImageIndex:
    """Index images that were inspected.

    Args:
        images: as they are now.
        inspected: what was found then.
        file: that holds it, named in errors.
        as_then: where labels have changed or images came, take those of then, by which the splits were drawn.

    Raises:
        UserError: if they are others than those.
    """
    index = _index(images.without(inspected.left_out))
    if as_then and index.sha256 != inspected.sha256:
        index = _labelled_then(index, images, inspected)
    return inspected.applied(index, images.path, file)


def _index(images: Images) -> ImageIndex:
    tree, files, tests = images.tree, list(images.classes), images.tests
    hashed = tree.hashed(files)
    names, labels = images.read()
    digests = [hashed.each[name] for name in files]
    return ImageIndex(
        labels=labels,
        class_names=names,
        official_test=tests if tests.any() else None,
        sha256=hashed.sha256,
        read=lambda i: decode_image(lambda: tree.read(files[i]), tree.file(files[i])),
        names=files,
        digests=digests,
        contents=numbered(digests)[1],
        own=True,
        task=images.task,
    )


def _labelled_then(index: ImageIndex, images: Images, inspected: ImagesFile) -> ImageIndex:
    """Return the index with the images, labels, names and order of then; as it is, if one is gone or changed."""
    assert index.digests is not None
    place = {digest[:DIGEST_LETTERS]: i for i, digest in enumerate(index.digests)}
    if not place.keys() >= {*inspected.digests.values()}:
        return index
    rows = [place[digest] for digest in inspected.digests.values()]
    then = dict(zip(inspected.digests, inspected.labels, strict=True))
    names, labels = images._replace(classes=then, tested=frozenset()).read()
    texts = (images.task.text(label, names) for label in labels)
    changed = sum(index.label(row) != text for row, text in zip(rows, texts, strict=True))
    return replace(
        index,
        labels=labels,
        class_names=names,
        sha256=inspected.sha256,
        read=lambda i: index.read(rows[i]),
        names=[*then],
        digests=[index.digests[row] for row in rows],
        notes=(f"{changed:,} labels are others by now; here those of the training count",) if changed else (),
    )


class Images(NamedTuple):
    """Images with labels as people have them.

    Attributes:
        dataset: how a configuration names their kind.
        path: of the folder, zip, table or shards.
        tree: of their files.
        classes: the class of each file by its name; of several labels, or of numbers, the table's cells, joined by '|'.
        tested: files of their own test split; empty: there is none.
        left_out: why, by name, files are not to be opened.
        task: what is learned of them.
        columns: of the table that hold labels.
        taken: a line on where they were found, if that is not where they were said to be.
        together: by name; files whose text is equal stay on one side of every split.
    """

    dataset: Literal["image-folder", "csv", "webdataset"]
    path: Path
    tree: FileTree
    classes: dict[str, str]
    tested: frozenset[str]
    left_out: dict[str, str]
    task: Task = CLASSIFICATION
    columns: tuple[str, ...] = _CLASSES
    taken: str | None = None
    together: Mapping[str, str] | None = None

    @property
    def tests(self) -> np.ndarray:
        """Return which are of their own test split, (N,) bool."""
        return np.array([name in self.tested for name in self.classes], dtype=bool)

    def read(self) -> tuple[tuple[str, ...], Labels]:
        """Return the names of what is learned, and the labels.

        Raises:
            UserError: if nothing can be learned from them.
        """
        with named(self.path):
            return self.task.read_split(list(self.classes.values()), self.columns, self.tests)

    def without(self, left_out: Container[str]) -> Images:
        """Return those of other names."""
        return self._replace(classes={name: label for name, label in self.classes.items() if name not in left_out})


def find_images(path: Path, task: TaskName | None = None, group: str | None = None) -> Images:
    """Find the images of a folder or zip, of shards, or of a table of paths and labels, without opening one.

    What is learned of a table's is the given task, or else what its labels look like. What stays together is said by
    `group`: a column of the table; "folder", in which an image lies; or a pattern of names, by its first group.

    Class folders may lie deeper, links are followed, and what is not an image or has no place in the layout of
    `read_image_folder` is left out. A folder may hold a table, images.csv or labels.csv; beside class folders it has to
    list all of their images.

    Raises:
        UserError: if there are none; for a class folder without images, a layout or table that can't be right, and
            where a table and class folders say of different images what they are.
    """
    images = _found(path, task, group)
    if group is None or images.together is not None:
        return images
    return images._replace(together=groups_by_name(list(images.classes), group))


def groups_by_name(names: Sequence[str], group: str) -> dict[str, str]:
    """Return the group of each image by its name; raises UserError if no name matches. See `find_images`."""
    with suppress(re.error):
        pattern = re.compile("(.*)/" if group == "folder" else group)
        matches = {name: match[1] for name in names if pattern.groups and (match := pattern.search(name))}
        if matches:
            return {name: matches.get(name) or name for name in names}
    message = f"{group!r} is not a column, and as a pattern has no group, or matches none, such as {names[0]}"
    raise UserError(f"{message}; give a column, folder, or a pattern as in '(.+)_[0-9]+'", field="--group")


def _found(path: Path, task: TaskName | None = None, group: str | None = None, *, is_said: bool = False) -> Images:
    """Find images; `is_said`: of class folders if there are any, whatever table lies beside them."""
    if path.suffix.lower() in TABLES and path.is_file():
        return _listed(path, task, group)
    if path.name.lower().endswith(SHARDS) and not path.is_dir():
        return _sharded(path, task)
    tree = open_tree(path)
    if path.is_dir() and any(name.endswith(".tar") for name in tree.names) and not any(map(is_image, tree.names)):
        return _sharded(path / "**" / "*.tar", task)
    root = _class_root(tree, path)
    table = None if is_said and root is not None else _table_beside(tree, path, root)
    if root is None or table is not None:
        assert table is not None
        return _listed(table, task, group)._replace(taken=f"Using the images and labels that {table} lists.")
    if task is not None and not TASKS[task].one_class:
        message = (
            f"has a folder for each class, which is not {task}; list the images and their labels in a CSV, or "
            "leave it out"
        )
        raise UserError(message, file=path, field="data.task")
    return _of_class_folders(tree, path, root)


def _of_class_folders(tree: FileTree, path: Path, root: str) -> Images:
    """Return the images of class folders in a folder of a tree."""
    outside = (name for name in tree.names if root and is_image(name) and not name.startswith(f"{root}/"))
    left_out = {
        f"{os.path.relpath(folder, root)}/": f"its images ({count:,}) lie outside {root}, where class folders are"
        for folder, count in Counter(str(PurePosixPath(name).parent) for name in outside).items()
    }
    tree = tree.below(root)
    images = list(filter(is_image, tree.names))
    splits = set(map(split_of, images))
    test = next((split for split in TESTED if {"train", split} <= splits), None)
    at = 0 if test is None else 1  # of the class among a name's folders
    classes: dict[str, str] = {}  # also of what can't be read: it stays a class
    for name in tree.names:
        folders = name.split("/")[:-1]
        if f"/{name}".lower().endswith(_JUNK) or not (folders or name.lower().endswith(_BESIDE)):
            continue
        if not is_image(name):
            left_out[name] = "is not an image file"
        elif len(folders) <= at:
            left_out[name] = "is in no class folder"
        elif test is not None and split_of(name) is None:
            raise UserError("is beside train/; expected only train, val or valid, and test", file=path / folders[0])
        else:
            classes[name] = folders[at]
            if fault := tree.fault(name):
                left_out[name] = fault
    if classes.keys() <= left_out.keys():
        raise UserError(_NO_IMAGE, file=path, field="data.path")
    left_out |= {
        name: f"leads to the images of {place}, which are used there" for name, place in tree.unused.items() if place
    }
    every = [*tree.names, *(name for name, place in tree.unused.items() if not place)]
    with_image, folders_there = (
        {"/".join(name.split("/")[: at + 1]) for name in names if name.count("/") > at} for names in (images, every)
    )
    if empty := sorted(folders_there - with_image):
        message = f"has class folders without an image ({some_of(empty)}); add images, or remove them"
        raise UserError(message, file=path / root, field="data.path")
    if test is not None:
        trained = {label for name, label in classes.items() if split_of(name) == "train"}
        for split, label in sorted({(split_of(name), label) for name, label in classes.items()}):
            if label not in trained:
                message = f"class '{label}' is in {split} and not in train; add images to train on, or remove the class"
                raise UserError(message, file=path)

    def hashed(used: list[str]) -> Hashes:
        """Hash the used images; a zip's hash alone does not say which of them these are."""
        contents = tree.hashed(used)
        if len(used) == len(classes) or path.is_dir():
            return contents
        names = "".join(f"{name}\0" for name in used)
        return Hashes(hashlib.sha256(f"{contents.sha256}\0{names}".encode()).hexdigest(), contents.each)

    tested = frozenset(name for name in classes if test is not None and split_of(name) == test)
    taken = f"Using the images in {path / root}, where the class folders are." if root else None
    images_of = replace(tree, hashed=hashed)
    return Images("image-folder", path, images_of, classes, tested, left_out, taken=taken).without(left_out)


def _table_beside(tree: FileTree, path: Path, root: str | None) -> Path | None:
    """Return the table that lists a folder's images; None: there is none, or it lists others.

    Args:
        tree: of the folder.
        path: of it.
        root: see `_class_root`.

    Raises:
        UserError: if it lacks images that class folders have.
    """
    name = next((name for name in _TABLES_BESIDE if name in tree.names), None) if path.is_dir() else None
    if name is None:
        return None
    try:
        rows = [row for _, row in table_rows(path / name)]
    except UserError:
        if root is None:
            raise
        return None  # it is about something else
    places = (tree.location / row["path"].replace("\\", "/") for row in rows)  # also as Windows writes them
    listed = {os.path.relpath(place, tree.location).replace(os.sep, "/") for place in places}
    if root is not None and listed.isdisjoint(tree.names):
        return None
    classes = {row.get("label") for row in rows}
    others = (image for image in tree.names if "/" in image and image not in listed and is_image(image))
    if more := [image for image in others if root is not None or image.split("/")[0] in classes]:
        add = f"add them by peft-vit label {quoted(path)}" if name == "labels.csv" else "add them"
        reason = f"doesn't list {len(more):,} of the images in folders beside it, such as {more[0]}"
        raise UserError(f"{reason}; {add}, or name this file to leave them out, or move it away", file=path / name)
    return path / name


def _class_root(tree: FileTree, path: Path) -> str | None:
    """Return the folder that class folders lie in, the highest one; None: there are none, and a table lies there.

    It is the one in which two folders at least hold images, at any depth; or train/, if no other one there has folders.
    """
    folders = {name.rpartition("/")[0] for name in tree.names if is_image(name)}
    classes = {PurePosixPath(folder) for folder in folders if folder}
    root = PurePosixPath()
    while True:
        below = [folder.relative_to(root).parts for folder in classes if root in folder.parents]
        inside, deep = {parts[0] for parts in below}, {parts[0] for parts in below if len(parts) > 1}
        divided = {_split(name) for name in deep} & {"train", *TESTED}
        only = deep if [_split(name) for name in deep] == ["train"] else inside
        if len(only) == 1 and only == deep:
            root /= only.pop()
        elif len(inside) > 1 and ("train" in divided or not all(map(_split, inside))):
            return "" if root == PurePosixPath() else str(root)
        else:
            break
    if path.is_dir() and any(name in tree.names for name in _TABLES_BESIDE):
        return None
    images = sum(map(is_image, tree.names))
    if not images:
        raise UserError(_NO_IMAGE, file=path, field="data.path")
    where = f"one class alone, '{min(classes).name}'" if len(classes) == 1 else "no class folders"
    raise UserError(
        f"holds {images} images and {where}; make one folder for each class, at least two, or list them in "
        "images.csv with the columns path,label, or label them: peft-vit label",
        file=path,
        field="data.path",
    )


def _listed(path: Path, task: TaskName | None, group: str | None = None) -> Images:
    """Return the images that a table names, those of which can't be read left out."""
    root = path.parent.resolve()

    def hashed(used: list[str]) -> Hashes:
        return hashes({name: root / name for name in used})

    tree = FileTree(root, (), lambda name: read_bytes(root / name), hashed)
    return _of_rows("csv", path, list(table_rows(path, group)), tree, {}, task, group)


def _sharded(path: Path, task: TaskName | None) -> Images:
    """Return the images of shards, of which samples without one image and one label are left out."""
    tree, samples, left_out = read_shards(path)
    splits = {
        shard: next(filter(_split, reversed(re.split(r"[\W_]+", shard))), "train")
        for shard in {shard for _, _, shard in samples}
    }
    trains = any(_split(word) == "train" for word in splits.values())
    rows = [
        (tree.file(name), {"path": name, "label": label, "split": splits[shard] if trains else "train"})
        for name, label, shard in samples
    ]
    return _of_rows("webdataset", path, rows, tree, left_out, task)


def _of_rows(
    dataset: Literal["csv", "webdataset"],
    path: Path,
    listed: Sequence[tuple[str, Mapping[str, str]]],
    tree: FileTree,
    faulty: dict[str, str],
    task_name: TaskName | None,
    group: str | None = None,
) -> Images:
    """Return the images of rows, some of which can't be used, and others are faulty, by name, before they are read."""
    rows = [(where, row) for where, row in listed if row.get("split", "").lower() != UNSURE]
    count = len(rows) + len(faulty)
    if not count:
        raise UserError("names no image; add rows", file=path)
    columns = tuple(name for name in rows[0][1] if name not in ("path", "split", group)) if rows else _CLASSES
    if rows and group in rows[0][1] and columns != _CLASSES:  # runs, which know no groups, would take it for a label
        raise UserError("--group can be a column only beside a column label; give a pattern of names", file=path)
    task = TASKS[task_name] if task_name else _task_of(path, columns, [row for _, row in rows])
    found, unused = _by_name(rows, columns, task, tree.location, group)
    faults = {where: fault for where, fault in unused.items() if not fault.endswith(_REPEATED)}
    faults |= {tree.file(name): fault for name, fault in faulty.items()}
    if 2 * len(faults) >= count:
        where, fault = next(iter(faults.items()))
        raise UserError(
            f"{fault}; {len(faults):,} of {count:,} {'rows' if dataset == 'csv' else 'samples'} can't be used",
            file=where,
        )
    splits = {row.split for row in found.values()}
    test = next((split for split in TESTED if split in splits), None)
    tested = frozenset(name for name, row in found.items() if row.split == test)
    header = "" if columns == _CLASSES else "\0".join(columns) + "\n"

    def hashed(used: list[str]) -> Hashes:
        """Hash what is used of the table, in its order, and of the images: spaces and other columns are not."""
        contents = tree.hashed(used)
        lines = "".join(f"{name}\0{found[name].label}\0{found[name].split == test:d}\n" for name in used)
        return Hashes(hashlib.sha256(f"{header}{lines}{contents.sha256}".encode()).hexdigest(), contents.each)

    left_out = {name: unread for name in found if (unread := tree.fault(name)) is not None}
    if len(left_out) == len(found) and not any(os.path.lexists(tree.location / name) for name in found):
        message = f"none of {len(found):,} paths exists, such as {rows[0][1]['path']}"
        raise UserError(f"{message}; they begin at {tree.location}, or are whole", file=path, field="path")
    left_out |= {os.path.relpath(where, tree.base or path.parent): fault for where, fault in unused.items()} | faulty
    left_out |= {row["path"]: IS_UNSURE for _, row in listed if row.get("split", "").lower() == UNSURE}
    labels = {name: row.label for name, row in found.items()}
    of_column = {name: row.group for name, row in found.items()} if rows and group in rows[0][1] else None
    used = replace(tree, names=tuple(found), hashed=hashed)
    images = Images(dataset, path, used, labels, tested, left_out, task, columns, together=of_column)
    return images.without(left_out)


class _Row(NamedTuple):
    label: str
    split: str
    group: str


def _by_name(
    rows: Sequence[tuple[str, Mapping[str, str]]], columns: Sequence[str], task: Task, root: Path, group: str | None
) -> tuple[dict[str, _Row], dict[str, str]]:
    """Return rows by the names of their images, and why others are not used, by where they stand."""
    found: dict[str, _Row] = {}
    unused: dict[str, str] = {}
    for where, row in rows:
        typed, split = row["path"], _split(row.get("split") or "train")
        if "\\" in typed and not os.path.exists(root / typed):  # it may have been written on Windows
            typed = typed.replace("\\", "/")
        name = PurePosixPath(typed).as_posix()
        if split is None:
            raise UserError(f"expected train, val or test, got {row['split']!r}", file=where, field="split")
        cells = {column: row[column] for column in columns}
        one = _Row("|".join(cells.values()), split, row.get(group or "") or name)
        fault = task.fault(cells) if typed else INCOMPLETE
        if fault and typed and one.label.strip("|"):
            raise UserError(fault, file=where)
        if fault:
            unused[where] = fault
        elif (first := found.setdefault(name, one)) is one:
            continue
        elif (first.label, first.split) == (one.label, split):
            unused[where] = f"{name} {_REPEATED}"
        else:
            message = f"{name} is '{one.label}' in {split} here and '{first.label}' in {first.split} before; keep one"
            raise UserError(message, file=where, field="label")
    return found, unused


def _task_of(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Task:
    """Return the task that a table's labels, or most of its rows look like; the last of those that recognize them."""
    cells = {column: [row[column] for row in rows] for column in columns}
    if fitting := [task for task in TASKS.values() if task.recognizes(cells)]:
        return fitting[-1]
    for task in reversed(TASKS.values()):  # its fault in another row is told where it is read
        sound = [row for row in rows if task.fault({column: row[column] for column in columns}) is None]
        if 2 * len(sound) > len(rows) and task.recognizes({name: [row[name] for row in sound] for name in columns}):
            return task
    for column in columns:
        if not any(task.recognizes({column: cells[column]}) for task in TASKS.values()):
            values = sorted(set(cells[column]))
            message = f"column {column} holds {values[0]!r} and {values[-1]!r}, neither numbers nor 0, 1 or nothing"
            raise UserError(f"{message}; call the column of the classes label, or take it out", file=path)
    raise UserError("has columns of 0, 1 or nothing, and others of numbers; keep those of one kind", file=path)


def split_of(file: str) -> str | None:
    """Return which split the folder is called as that a file's class folder lies in; None: in none."""
    folder, *below = file.split("/")
    return _split(folder) if len(below) > 1 else None


def _split(name: str) -> str | None:
    """Return which split a folder or a row is called as, in small or capital letters: train, test or val."""
    return SPLITS.get(name.lower())


def is_image(name: str) -> bool:
    """Return whether a file is called as an image is; what it holds is known when it is decoded."""
    return name.lower().endswith(IMAGE_SUFFIXES)


# --- tables of paths and labels ---------------------------------------------------------------------------------------


def read_csv(config: DataConfig) -> ImageIndex:
    """Index the images of a CSV or Parquet file with columns path, label and perhaps split (train or test).

    Instead of label there may be a column a class, with 0, 1 or nothing, or columns of numbers. Paths are relative to
    the file's folder. Without a value in split an image is not a test image; val is to test as in `read_image_folder`.
    A CSV's delimiter is a comma, a semicolon or a tab, as in its first line.
    """
    path = existing(str(config.path))
    if not path.is_file():
        raise UserError("is not a file; name a CSV with the columns path, label[, split]", file=path, field="data.path")
    return _read(config, _listed(path, config.task))


def read_webdataset(config: DataConfig) -> ImageIndex:
    """Index shards, see `read_shards`; those whose name says test, or else val, are the official test split."""
    path = existing(str(config.path))
    return _read(config, _sharded(path / "**" / "*.tar" if path.is_dir() else path, config.task))


SOURCES = {"image-folder": read_image_folder, "csv": read_csv, "webdataset": read_webdataset}
