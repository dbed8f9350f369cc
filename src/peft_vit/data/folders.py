"""Readers of image files with labels: Tiny ImageNet, a folder of class folders, a CSV of paths and labels."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Container, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from peft_vit.config import DataConfig
from peft_vit.data.files import (
    IMAGE_SUFFIXES,
    FileTree,
    decode_text,
    downloaded,
    existing,
    hashes,
    open_tree,
    refuse_outside,
)
from peft_vit.data.index import ImageIndex, ImagesFile, check_class_names, numbered
from peft_vit.data.pixels import decode_image
from peft_vit.errors import UserError, os_fault
from peft_vit.safe_io import read_bytes

_TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_JUNK = ("/Thumbs.db", "/desktop.ini")
_TEST_FOLDERS = ("test", "val", "valid", "validation")  # the first that is there is the test split


def _index(
    tree: FileTree,
    classes: Mapping[str, str],
    is_test: list[bool] | None,
    *,
    titles: Mapping[str, str] | None = None,
    beside: tuple[str, ...] = (),
) -> ImageIndex:
    """Index files by their classes; what stands `beside` them is hashed too, and then copies are not looked for."""
    files = list(classes)
    hashed = tree.hashed([*beside, *files])
    names, labels = numbered(list(classes.values()))
    return ImageIndex(
        labels=labels,
        class_names=tuple(titles[name] if titles else name for name in names),
        official_test=np.array(is_test, dtype=bool) if is_test and any(is_test) else None,
        sha256=hashed.sha256,
        read=lambda i: decode_image(lambda: tree.read(files[i]), tree.file(files[i])),
        names=files,
        digests=[hashed.each[name] for name in files],
        contents=None if beside else numbered([hashed.each[name] for name in files])[1],
        own=not beside,
    )


# --- Tiny ImageNet ----------------------------------------------------------------------------------------------------


def read_tiny_imagenet(config: DataConfig) -> ImageIndex:
    """Index Tiny ImageNet. Its test images have no labels, so its validation images are the test split.

    The path is tiny-imagenet-200.zip, or its unpacked folder; without one it is downloaded.
    """
    tree = open_tree(downloaded(_TINY_URL, _TINY_MD5) if config.path is None else existing(config.path))
    words_file, annotations_file = tree.only("words.txt"), tree.only("val/val_annotations.txt")
    root = PurePosixPath(words_file).parent
    classes: dict[str, str] = {}
    for name in tree.names:
        match PurePosixPath(name).parts[len(root.parts) :]:
            case ("train", wordnet_id, "images", _):
                classes[name] = wordnet_id
    known, present, training = set(classes.values()), set(tree.names), len(classes)
    for number, line in enumerate(tree.lines(annotations_file), start=1):
        where = f"{tree.file(annotations_file)}:{number}"
        image, wordnet_id = [*line.split("\t"), "", ""][:2]
        name = str(root / "val" / "images" / image)
        if wordnet_id not in known:
            raise UserError(f"class {wordnet_id!r} has no training image; unpack the archive again", file=where)
        if name not in present:
            raise UserError(f"val/images/{image} is not there; unpack the archive again", file=where)
        classes[name] = wordnet_id
    words = dict(line.split("\t", 1) for line in tree.lines(words_file) if "\t" in line)
    titles = {id_: f"{id_} {words.get(id_, '').split(',')[0]}".strip() for id_ in known}
    check_class_names(titles.values(), tree.file(words_file))
    is_test = [k >= training for k in range(len(classes))]
    return _index(tree, classes, is_test, titles=titles, beside=(words_file, annotations_file))


# --- class folders ----------------------------------------------------------------------------------------------------


def read_image_folder(config: DataConfig) -> ImageIndex:
    """Index ROOT/<class>/<image>, or ROOT/train/<class>/<image> with ROOT/test/... or ROOT/val/... beside it.

    In the second layout test/ is the official test split; without test/, val/ is. If all three are there, val/ joins
    train/ as images that training and validation are drawn from. val/ may be called valid/ or validation/.

    `images_file` is what was found when they were looked at: it says what is left out, what is a copy of what, and
    which images are tested in the end, whatever their folders are.
    """
    path = existing(str(config.path))
    tree = open_tree(path)
    file = None if config.images_file is None else Path(config.images_file).expanduser()
    inspected = None if file is None else ImagesFile.read(file)
    index = _index(tree, *class_files(tree, path, () if inspected is None else inspected.left_out))
    return index if inspected is None or file is None else inspected.applied(index, path, file)


class ClassFiles(NamedTuple):
    """The class of each image file by its name, and which of them are of the folder's own test split, if it has one."""

    classes: dict[str, str]
    is_test: list[bool] | None


def class_files(tree: FileTree, path: Path, left_out: Container[str] = ()) -> ClassFiles:
    """Return the image files of a folder whose layout is as `read_image_folder` says.

    Args:
        tree: of the folder.
        path: named in errors.
        left_out: names that are passed over.
    """
    in_use = {name: name.split("/") for name in files_in_use(tree)}
    parts = {name: part for name, part in in_use.items() if name not in left_out}
    tops = {part[0] for part in parts.values() if len(part) == 3}
    test = next((folder for folder in _TEST_FOLDERS if "train" in tops and folder in tops), None)
    for name, part in parts.items():
        if not is_image(name):
            message = f"is none of {' '.join(IMAGE_SUFFIXES)}; convert it or take it out"
            raise UserError(message, file=tree.file(name))
        if len(part) != (3 if test else 2):
            layout = "train|val|test/<class>/<image>" if test else "<class>/<image>"
            raise UserError(f"does not lie at {layout}; move it or take it out", file=tree.file(name))
    if not parts:
        message = f"holds no image ({' '.join(IMAGE_SUFFIXES)}) in a class folder"
        raise UserError(message, file=path, field="data.path")
    classes = {name: part[-2] for name, part in parts.items()}
    if test is None:
        return ClassFiles(classes, None)
    # What is left out counts here: a class may have lost its last image of val, which is trained on.
    classes_of: dict[str, set[str]] = {}
    for part in in_use.values():
        if len(part) == 3:
            classes_of.setdefault(part[0], set()).add(part[1])
    for folder in sorted(classes_of):
        if folder not in ("train", *_TEST_FOLDERS):
            raise UserError("lies beside train/; expected only train, val or valid, and test", file=path / folder)
        if odd := sorted(classes_of[folder] ^ classes_of["train"]):
            message = f"class '{odd[0]}' is in only one of train and {folder}; both need the same classes"
            raise UserError(message, file=path)
    return ClassFiles(classes, [part[0] == test for part in parts.values()])


def files_in_use(tree: FileTree) -> list[str]:
    """Return the files that have to be images: all but what systems leave behind, and a README beside the folders."""
    return [name for name in tree.names if ("/" in name or is_image(name)) and not name.endswith(_JUNK)]


def is_image(name: str) -> bool:
    """Return whether a file is called as an image is; what it holds is told when it is decoded."""
    return name.lower().endswith(IMAGE_SUFFIXES)


# --- CSV --------------------------------------------------------------------------------------------------------------


def read_csv(config: DataConfig) -> ImageIndex:
    """Index the images of a CSV with columns path, label and perhaps split (train or test).

    Paths are relative to the CSV's folder and may not leave it.
    """
    path = existing(str(config.path))
    if not path.is_file():
        raise UserError("is not a file; name a CSV with the columns path, label[, split]", file=path, field="data.path")
    root = path.parent.resolve()
    with os_fault("can't be read", path, field="data.path"):
        content = read_bytes(path)
    rows = csv.DictReader(io.StringIO(decode_text(content, path), newline=""), strict=True)
    labels: dict[str, str] = {}
    is_test = []
    try:
        columns = rows.fieldnames or []
        if sorted(columns) not in (["label", "path"], ["label", "path", "split"]):
            message = f"has the columns {', '.join(columns)}; expected path, label and perhaps split"
            raise UserError(message, file=f"{path}:1")
        for row in rows:
            name = PurePosixPath(row["path"] or "").as_posix()
            if fault := _fault(row, name, root, labels):
                column, message = fault
                raise UserError(message, file=f"{path}:{rows.line_num}", field=column)
            refuse_outside(root / name, root)
            labels[name] = row["label"]
            is_test.append(row.get("split") == "test")
    except csv.Error as error:
        raise UserError(f"is no valid CSV ({error})", file=f"{path}:{rows.reader.line_num}") from None
    if not labels:
        raise UserError("names no image; add rows", file=path)
    files = {name: root / name for name in labels}
    tree = FileTree(root, tuple(files), lambda name: read_bytes(files[name]), lambda _: hashes({"": path, **files}))
    return _index(tree, labels, is_test)


def _fault(row: dict[str, str], name: str, root: Path, labels: Mapping[str, str]) -> tuple[str | None, str] | None:
    """Return the column and what is wrong with a row, if it is incomplete or has no file of its own."""
    if None in row or None in row.values() or not row["path"] or not row["label"]:
        return None, "expected a path and a label, one value a column"
    if PurePosixPath(name).is_absolute() or Path(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return "path", f"{name} leaves the CSV's folder; write a path below it"
    if not os.path.isfile(root / name):  # unlike Path.is_file, also False for an impossible name
        return "path", f"{root / name} does not exist; correct the path"
    if (before := labels.get(name)) == row["label"]:
        return "path", f"{name} stands twice, it could land in train and test; remove one"
    if before is not None:
        return "label", f"{name} is '{row['label']}' here and '{before}' before; an image has one label, keep one"
    if row.get("split") not in (None, "train", "test"):
        return "split", f"expected train or test, got {row['split']!r}; validation is drawn from train"
    return None


SOURCES = {"tiny-imagenet": read_tiny_imagenet, "image-folder": read_image_folder, "csv": read_csv}
