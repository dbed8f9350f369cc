"""Labels of elsewhere: class folders and tables that are there, Label Studio's JSON, and folders made of labels."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from peft_vit.base.console import some_of
from peft_vit.base.errors import UserError, foreign_fault
from peft_vit.base.files import into_empty, read_bytes, write_whole
from peft_vit.core.tasks import TASKS
from peft_vit.data.sources.folders import UNSURE, find_images, split_of
from peft_vit.data.sources.tables import TABLES
from peft_vit.label.images import ImageFolder
from peft_vit.label.labels import LABELS_FILE, LabelStore, Row, class_name

_UPLOADED = re.compile("^[0-9a-f]{8}-")  # how Label Studio calls a file that was uploaded
_LOCAL = "/data/local-files/?d="


def adopt(store: LabelStore, images: ImageFolder, ignore_folders: bool) -> str | None:
    """Take over the labels that class folders or a table beside the images give, and mark the fifth that tests.

    Args:
        store: what is labelled; where it has labels, only images in folders that are called as its classes are added.
        images: of the folder.
        ignore_folders: whether folders aren't taken as classes.

    Returns:
        What was taken, in a line.
    """
    found, source = dict[str, Row](), None
    if not ignore_folders and store.rows:
        found = _later(images, store)
    elif not ignore_folders:
        found, source = _found(images, store)
    line = source
    if found:
        labels = list(dict.fromkeys(label for row in found.values() for label in row.labels))
        more = "more " if store.rows else ""
        line = f"{len(found):,} {more}images have labels by {source or 'their folders'}: {some_of(labels, 5)}."
        if source is None:
            line += f" If folders aren't classes: take their rows out of {LABELS_FILE}, and --ignore-folders."
    changes = {**store.rows, **found}
    unsplit = [name for name, row in changes.items() if row.split == "" and name in images.number]
    if unsplit:
        images.find_copies()
    for name in unsplit:
        found[name] = changes[name]._replace(split="test" if images.is_test(images.number[name]) else "train")
    if found:
        store.change(found, {})
    return line


def _found(images: ImageFolder, store: LabelStore) -> tuple[dict[str, Row], str | None]:
    """Return labels of class folders or a table, and the table's name, or else why there are none."""
    try:
        there = find_images(images.root, store.task)
    except UserError as error:
        tables = [path for path in images.root.iterdir() if path.suffix.lower() in TABLES and path.name != LABELS_FILE]
        folders = {name.partition("/")[0] for name in images.names if "/" in name}
        return {}, f"No labels were taken: {error}" if tables or len(folders) > 1 else None
    start = Path(os.path.relpath(there.tree.location, images.root))
    rows: dict[str, Row] = {}
    for name, label in there.classes.items():
        labels = label.split("|") if store.task == "multilabel" else [label]
        known = [class_name(text, []) for text in labels] if store.task != "regression" else labels
        split: Any = "" if not there.tested else "test" if name in there.tested else "train"
        rows[PurePosixPath(start, name).as_posix()] = Row(tuple(known), split)
    return rows, there.path.name if there.dataset == "csv" else None


def _later(images: ImageFolder, store: LabelStore) -> dict[str, Row]:
    """Return labels of images without one, by folders that are called as a class is."""
    rows: dict[str, Row] = {}
    classes = {*store.classes}
    for name in images.names if store.task == "classification" else ():
        split, parts = split_of(name), name.split("/")
        label = parts[0 if split is None else 1]
        if len(parts) > 1 and label in classes and name not in store.rows and name not in images.left_out:
            rows[name] = Row((label,), "test" if split == "test" else "train" if split == "train" else "")
    return rows


def to_folders(store: LabelStore, images: ImageFolder, output: Path) -> int:
    """Make train/CLASS and test/CLASS folders of links to the images, or on Windows of copies; return their number.

    Raises:
        UserError: if the output holds files, can't be written, or a class can't be a folder.
    """
    if store.task != "classification":
        raise UserError("needs one class an image; labels.csv can be read as it is", field="--to-folders")
    if output.resolve().is_relative_to(images.root):
        raise UserError("lies among your images; choose a folder elsewhere", file=output, field="--to-folders")
    known: list[str] = []
    for name in store.classes:
        known.append(class_name(name, known))
    rows = {name: row for name, row in store.rows.items() if row.split != UNSURE and name in images.number}
    of_test, of_train = (
        {row.labels[0] for row in rows.values() if (row.split == "test") is test} for test in (True, False)
    )
    if len(of_test | of_train) == 1 and any("/" in name for name in rows):  # folders below it would be the classes
        raise UserError("needs two classes; label more images", field="--to-folders")
    if of_test and (one_sided := sorted(of_test ^ of_train)):
        side = "test" if one_sided[0] in of_test else "train"
        fault = f"class {one_sided[0]!r} is in {side} only; label more, or train by {LABELS_FILE}"
        raise UserError(fault, field="--to-folders")
    with into_empty(output, "--to-folders"):
        for name, row in rows.items():
            target = output / row.split / row.labels[0] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.name == "nt":
                shutil.copyfile(images.root / name, target)
            else:
                target.symlink_to(os.path.relpath(images.root / name, os.path.realpath(target.parent)))
    return len(rows)


def to_label_studio(store: LabelStore, output: Path) -> None:
    """Write Label Studio's JSON; its local files are to be served from the folder of the images.

    Raises:
        UserError: if the file is there already, or can't be written.
    """
    if os.path.lexists(output):
        raise UserError("exists already; give another name", file=output, field="--to-label-studio")
    kind = "number" if store.task == "regression" else "choices"
    tasks = []
    for name, row in store.rows.items():
        value = {"number": float(row.labels[0])} if kind == "number" and row.labels else {"choices": row.labels}
        result = [{"type": kind, "from_name": "label", "to_name": "image", "value": value}] if row.labels else []
        annotation = {"result": result, "was_cancelled": row.split == UNSURE}
        data = {"image": _LOCAL + quote(name), "split": row.split, "comment": row.comment}
        tasks.append({"data": data, "annotations": [annotation]})
    write_whole(output, json.dumps(tasks, indent=1, ensure_ascii=False).encode())


def from_label_studio(store: LabelStore, images: ImageFolder, file: Path) -> str:
    """Take over the labels of Label Studio's JSON, and return how many, in a line.

    No address is opened: an image is found among those of the folder by its path, or else by its file's name.

    Raises:
        UserError: if it is another file, or a class's name can't be one.
    """
    with foreign_fault("is not Label Studio's JSON", file, remedy="export it as JSON"):
        tasks = json.loads(read_bytes(file))
        given = [(str(task["data"].get("image", "")), _labels(task)) for task in tasks]
    files = [PurePosixPath(name).name for name in images.names]
    count, changes, classes = Counter(files), dict[str, Row](), list(store.classes)
    only = {file: name for file, name in zip(files, images.names, strict=True) if count[file] == 1}
    for address, labels in given:
        name = _name_at(address, images, only)
        if name is None or name in store.rows or labels is None or (store.task != "multilabel" and len(labels) != 1):
            continue
        if store.task == "regression" and TASKS["regression"].fault({"value": labels[0]}):
            continue
        kept = labels if store.task == "regression" else [class_name(label, classes) for label in labels]
        classes += [label for label in kept if label not in classes]
        changes[name] = Row(tuple(kept), "test" if images.is_test(images.number[name]) else "train")
    store.change(changes, {})
    left = len(given) - len(changes)
    reasons = "no label, not one class or number, labelled here, or no image of that name"
    return f"{len(changes):,} labels taken, {left:,} left ({reasons})."


def _labels(task: Any) -> list[str] | None:
    """Return the labels of the first annotation that was not cancelled; None: there is none, or only boxes and such."""
    for annotation in task.get("annotations") or ():
        if not annotation.get("was_cancelled"):
            values = [result.get("value", {}) for result in annotation["result"]]
            usable = [value for value in values if "choices" in value or value.get("number") is not None]
            if values and not usable:
                return None
            return [str(text) for value in usable for text in value.get("choices", [value.get("number")])]
    return None


def _name_at(address: str, images: ImageFolder, only: dict[str, str]) -> str | None:
    try:
        parts = urlsplit(address)
        path = parse_qs(parts.query).get("d", [unquote(parts.path)])[0]
    except ValueError:  # it is no address
        return None
    file = PurePosixPath(path).name
    return path if path in images.number else only.get(file) or only.get(_UPLOADED.sub("", file))
