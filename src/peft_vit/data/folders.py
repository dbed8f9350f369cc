"""Readers of image files with labels: Tiny ImageNet, a folder of class folders, a CSV of paths and labels."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Container, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from peft_vit.data.decoding import decode_image
from peft_vit.data.files import IMAGE_SUFFIXES, FileTree, decode_text, downloaded, hashes, open_tree, refuse_outside
from peft_vit.data.index import ImageIndex, ImagesFile, check_class_names, refuse_several_labels
from peft_vit.errors import UserError, os_fault
from peft_vit.safe_io import read_bytes

_TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_JUNK = ("/Thumbs.db", "/desktop.ini")
_TEST_FOLDERS = ("test", "val", "valid", "validation")  # the first that is there is the test split
_CSV_SPLITS = ("train", "test")


def _index(
    tree: FileTree,
    files: list[str],
    classes: list[str],
    is_test: list[bool] | None,
    *,
    titles: dict[str, str] | None = None,
    beside: tuple[str, ...] = (),
) -> ImageIndex:
    """Index files; what stands `beside` them is hashed too, and then files of equal content are not looked for."""
    hashed = tree.hashed([*beside, *files])
    contents = None if beside else np.unique([hashed.each[name] for name in files], return_inverse=True)[1]
    class_ids = sorted(set(classes))
    number = {class_id: k for k, class_id in enumerate(class_ids)}
    labels = np.array([number[class_id] for class_id in classes], dtype=np.int64)
    return ImageIndex(
        labels=labels,
        strata=labels,
        class_names=tuple((titles or {}).get(class_id, class_id) for class_id in class_ids),
        official_test=np.array(is_test, dtype=bool) if is_test and any(is_test) else None,
        sha256=hashed.sha256,
        read=lambda i: decode_image(lambda: tree.read(files[i]), tree.file(files[i])),
        names=files,
        contents=None if contents is None else contents.astype(np.int64),
        own=not beside,
    )


def read_tiny_imagenet(path: Path | None) -> ImageIndex:
    """Index Tiny ImageNet. Its test images have no labels, so its validation images are the test split.

    Args:
        path: tiny-imagenet-200.zip, or its unpacked folder; None downloads it.
    """
    location = path or downloaded(_TINY_URL, _TINY_MD5)
    if location.is_dir() and (location / "tiny-imagenet-200.zip").is_file():
        location = location / "tiny-imagenet-200.zip"
    tree = open_tree(location)
    words_file, annotations_file = tree.only("words.txt"), tree.only("val/val_annotations.txt")
    root = PurePosixPath(words_file).parent
    files, classes = [], []
    for name in tree.names:
        match PurePosixPath(name).parts[len(root.parts) :]:
            case ("train", wordnet_id, "images", _):
                files.append(name)
                classes.append(wordnet_id)
    known, present, training = set(classes), set(tree.names), len(files)
    for number, line in enumerate(tree.text(annotations_file).splitlines(), start=1):
        where = f"{tree.file(annotations_file)}:{number}"
        image, wordnet_id = [*line.split("\t"), "", ""][:2]
        files.append(str(root / "val" / "images" / image))
        classes.append(wordnet_id)
        if wordnet_id not in known:
            raise UserError(f"class {wordnet_id!r} has no training image; unpack the archive again", file=where)
        if files[-1] not in present:
            raise UserError(f"val/images/{image} is not there; unpack the archive again", file=where)
    words = dict(line.split("\t", 1) for line in tree.text(words_file).splitlines() if "\t" in line)
    titles = {id_: f"{id_} {words.get(id_, '').split(',')[0]}".strip() for id_ in known}
    check_class_names(titles.values(), tree.file(words_file))
    is_test = [k >= training for k in range(len(files))]
    beside = (words_file, annotations_file)
    return _index(tree, files, classes, is_test, titles=titles, beside=beside)


def read_image_folder(path: Path | None, images_file: Path | None = None) -> ImageIndex:
    """Index ROOT/<class>/<image>, or ROOT/train/<class>/<image> with ROOT/test/... or ROOT/val/... beside it.

    In the second layout test/ is the official test split; without test/, val/ is. If all three are there, val/ joins
    train/ as images that training and validation are drawn from. val/ may be called valid/ or validation/.

    Args:
        path: ROOT, a folder or a zip of one.
        images_file: what was found when they were looked at: it says what is left out, what is a copy of what, and
            which images are tested in the end, whatever their folders are.
    """
    if path is None:
        raise UserError("is missing; name the folder that holds a folder of images per class", field="data.path")
    tree = open_tree(path)
    looked_at = None if images_file is None else ImagesFile.read(images_file)
    files = class_files(tree, path, () if looked_at is None else looked_at.left_out)
    index = _index(tree, list(files.classes), list(files.classes.values()), files.is_test)
    return index if looked_at is None else looked_at.applied(index, path, images_file)


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
    parts = {name: name.split("/") for name in files_in_use(tree) if name not in left_out}
    tops = {part[0] for part in parts.values() if len(part) == 3}
    is_split = "train" in tops and bool(tops.intersection(_TEST_FOLDERS))
    for name, part in parts.items():
        if not is_image(name):
            problem = f"is none of {' '.join(IMAGE_SUFFIXES)}; convert it or take it out"
            raise UserError(problem, file=tree.file(name))
        if len(part) != (3 if is_split else 2):
            layout = "train|val|test/<class>/<image>" if is_split else "<class>/<image>"
            raise UserError(f"does not lie at {layout}; move it or take it out", file=tree.file(name))
    if not parts:
        problem = f"holds no image ({' '.join(IMAGE_SUFFIXES)}) in a class folder"
        raise UserError(problem, file=path, field="data.path")
    classes = {name: part[-2] for name, part in parts.items()}
    if not is_split:
        return ClassFiles(classes, None)
    # What is left out counts here: a class may have lost its last image of val, which is trained on.
    _check_split(path, [part for name in files_in_use(tree) if len(part := name.split("/")) == 3])
    test = next(folder for folder in _TEST_FOLDERS if folder in tops)
    return ClassFiles(classes, [part[0] == test for part in parts.values()])


def files_in_use(tree: FileTree) -> list[str]:
    """Return the files that have to be images: all but what systems leave behind, and a README beside the folders."""
    return [name for name in tree.names if ("/" in name or is_image(name)) and not name.endswith(_JUNK)]


def is_image(name: str) -> bool:
    """Return whether a file is called as an image is; what it holds is told when it is decoded."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def _check_split(path: Path, parts: Sequence[Sequence[str]]) -> None:
    """Refuse folders beside train/ that hold other classes; `parts` are each image's folder, class and name."""
    present = {part[0] for part in parts}
    unknown = sorted(present - {"train", *_TEST_FOLDERS})
    if unknown:
        raise UserError("lies beside train/; expected only train, val or valid, and test", file=path / unknown[0])
    classes_of = {folder: {part[1] for part in parts if part[0] == folder} for folder in present}
    for folder in present - {"train"}:
        odd = sorted(classes_of[folder] ^ classes_of["train"])
        if odd:
            problem = f"class '{odd[0]}' is in only one of train and {folder}; both need the same classes"
            raise UserError(problem, file=path)


def read_csv(path: Path | None) -> ImageIndex:
    """Index the images of a CSV with columns path, label and perhaps split (train or test).

    Paths are relative to the CSV's folder and may not leave it.

    Args:
        path: the CSV.
    """
    if path is None:
        raise UserError("is missing; name a CSV with the columns path, label[, split]", field="data.path")
    if not path.is_file():
        raise UserError("is not a file; name a CSV with the columns path, label[, split]", file=path, field="data.path")
    root = path.parent.resolve()
    with os_fault("can't be read", path, field="data.path"):
        content = read_bytes(path)
    rows = csv.DictReader(io.StringIO(decode_text(content, path), newline=""), strict=True)
    labels: dict[str, str] = {}
    splits = []
    try:
        columns = rows.fieldnames or []
        if sorted(columns) not in (["label", "path"], ["label", "path", "split"]):
            problem = f"has the columns {', '.join(columns)}; expected path, label and perhaps split"
            raise UserError(problem, file=f"{path}:1")
        for row in rows:
            labels[_checked_row(row, f"{path}:{rows.line_num}", root, labels)] = row["label"]
            splits.append(row.get("split"))
    except csv.Error as error:
        raise UserError(f"is no valid CSV ({error})", file=f"{path}:{rows.reader.line_num}") from None
    if not labels:
        raise UserError("names no image; add rows", file=path)
    refuse_several_labels(dict.fromkeys(labels.values()), path, "label")
    files = {name: root / name for name in labels}
    tree = FileTree(root, tuple(files), lambda name: read_bytes(files[name]), lambda _: hashes({"": path, **files}))
    is_test = [split == "test" for split in splits] if "split" in columns else None
    return _index(tree, list(files), list(labels.values()), is_test)


def _checked_row(row: dict[str, str], where: str, root: Path, labels: dict[str, str]) -> str:
    """Return the image's name; raises UserError if the row is incomplete or has no file of its own."""
    if None in row or None in row.values() or not row["path"] or not row["label"]:
        raise UserError("expected a path and a label, one value a column", file=where)
    name = PurePosixPath(row["path"]).as_posix()
    if PurePosixPath(name).is_absolute() or Path(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise UserError(f"{name} leaves the CSV's folder; write a path below it", file=where, field="path")
    if not os.path.isfile(root / name):  # unlike Path.is_file, also False for an impossible name
        raise UserError(f"{root / name} does not exist; correct the path", file=where, field="path")
    refuse_outside(root / name, root)
    if labels.get(name, row["label"]) != row["label"]:
        problem = (
            f"{name} is '{row['label']}' here and '{labels[name]}' before; an image has one label, keep one of them"
        )
        raise UserError(problem, file=where, field="label")
    if name in labels:
        raise UserError(f"{name} stands twice, it could land in train and test; remove one", file=where, field="path")
    if row.get("split") not in (None, *_CSV_SPLITS):
        raise UserError(
            f"expected train or test, got {row['split']!r}; validation is drawn from train", file=where, field="split"
        )
    return name
