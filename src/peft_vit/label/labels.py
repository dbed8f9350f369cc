"""Labels of a folder's images: in labels.csv beside them, on disk before anything else happens.

The file is what `train` and `tune` read. Its rows are in the order in which they were labelled. Another program may
change it, or another page on the same folder: it is read again whenever it is not as this one has left it.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from peft_vit.base.errors import UserError
from peft_vit.base.files import write_whole
from peft_vit.core.config import TaskName
from peft_vit.core.tasks import TASKS
from peft_vit.data.index import check_class_names
from peft_vit.data.sources.folders import UNSURE
from peft_vit.data.sources.tables import table_rows

try:
    import fcntl
except ImportError:  # on Windows two servers that write in the same millisecond are not kept apart
    fcntl = None  # type: ignore[assignment]

LABELS_FILE = "labels.csv"
_COMPUTED = ("=", "+", "-", "@", "\t", "\r", "'")  # how a cell begins that a spreadsheet computes
_LONGEST = 80  # letters of a class name, which may become a folder's
# What can be a folder, on Windows too, and nothing that a spreadsheet computes.
_NAME = re.compile(r'(?!(con|prn|aux|nul|com\d|lpt\d)(\.|$))\w([^/\\:*?"<>|]*[^/\\:*?"<>|.])?', re.IGNORECASE)


class Row(NamedTuple):
    """What is known of an image: one class, several or none of them, or a number as text; () where it is unsure."""

    labels: tuple[str, ...]
    split: Literal["train", "test", "unsure", ""]
    comment: str = ""


class ConflictError(UserError):
    """An image has another label by now than the one that was shown."""


class LabelStore:
    """The labels of a folder.

    Args:
        folder: of the images.
        task: says what a label is.

    Attributes:
        file: labels.csv.
        rows: by name, the image's path relative to the folder, in the order of labelling.
        classes: names that occur, in their order.
        num_images: by split, train if a row names none.
        num_labels: how many images of a split have each label.

    Raises:
        UserError: if the file is there and can't be read, or holds columns that would be lost.
    """

    def __init__(self, folder: Path, task: TaskName = "classification") -> None:
        self.file, self.task = folder / LABELS_FILE, task
        self._take({}, None)
        if not os.access(folder, os.W_OK):
            raise UserError(f"can't be written to, and {LABELS_FILE} goes there; copy your images", file=folder)
        self.refresh()

    def _take(self, rows: dict[str, Row], read_as: tuple[int, ...] | None) -> None:
        self.rows, self._read_as = rows, read_as
        self.num_images, self.num_labels = Counter[str](), defaultdict[str, Counter[str]](Counter)
        for row in rows.values():
            self.num_images[row.split or "train"] += 1
            self.num_labels[row.split or "train"].update(row.labels)
        labels = (label for row in rows.values() for label in row.labels)
        self.classes = [] if self.task == "regression" else list(dict.fromkeys(labels))

    def refresh(self) -> None:
        """Read the file again if it is another one by now."""
        now = _state(self.file)
        if now == self._read_as:
            return
        if now is None:
            raise UserError("is gone, with all labels; put it back, or close the page and start again", file=self.file)
        self._take(dict(_rows_of(self.file, self.task)), now)

    def change(self, changes: Mapping[str, Row | None], expected: Mapping[str, Row | None]) -> None:
        """Change rows on disk, all or none; None: there is no row.

        Args:
            changes: by image.
            expected: what the person saw of some images.

        Raises:
            ConflictError: if one of these has been labelled otherwise meanwhile.
            UserError: if the file can't be read or written; it stays as it was.
        """
        with alone(self.file.parent):
            self.refresh()
            for name, row in expected.items():
                if (now := self.rows.get(name)) != row:
                    label = "without a label" if now is None else f"'{', '.join(now.labels)}'"
                    raise ConflictError(f"is {label} by now, from another page; look at it again", file=name)
            rows = {name: row for name, row in self.rows.items() if name not in changes}
            rows |= {name: row for name, row in changes.items() if row is not None}
            write_whole(self.file, _text_of(rows, self.task).encode())
            self._take(rows, _state(self.file))


def class_name(text: str, known: list[str]) -> str:
    """Return a class's name as it is kept.

    Raises:
        UserError: if it can't be that of a folder, is one that a spreadsheet computes, or is nearly another one.
    """
    name = " ".join(text.split())
    if name in known:
        return name
    twin = next((other for other in known if other.casefold() == name.casefold()), name)
    if twin != name:
        raise UserError(f"differs from {twin!r} in capitals only; take that one", field=f"class {name!r}")
    if not (_NAME.fullmatch(name) and len(name) <= _LONGEST):
        expected = f'1 to {_LONGEST} letters, first a letter or a digit, none of / \\ : * ? " < > |, no dot at the end'
        raise UserError(f"expected {expected}, and no device of Windows such as con", field=f"class {name!r}")
    check_class_names([name], None)
    return name


def _column(task: TaskName) -> str:
    return "value" if task == "regression" else "label"


def _rows_of(file: Path, task: TaskName) -> Iterator[tuple[str, Row]]:
    column = _column(task)
    seen: dict[str, Row] = {}
    for where, cells in table_rows(file, every=True):
        if column not in cells or cells.keys() - {"path", column, "split", "comment"}:
            fault = f"has the columns {', '.join(cells)}; expected path, {column}, split and comment"
            remedy = "take the others out" if column in cells else "see --task"
            raise UserError(f"{fault}, and others would be lost here; {remedy}, or rename the file", file=file)
        cell, split = cells[column], cells.get("split", "").lower()
        if not cells["path"] or split not in ("train", "test", UNSURE, "") or not (cell or split == UNSURE):
            raise UserError(f"expected a path, a {column}, and train, test, {UNSURE} or nothing as split", file=where)
        if task == "classification" and "|" in cell:
            raise UserError("holds several labels an image; see --task multilabel", file=where)
        if cell and (no_label := TASKS[task].fault({column: cell})):
            raise UserError(no_label, file=where)
        labels = tuple(filter(None, cell.split("|") if task == "multilabel" else [cell]))
        row = Row(labels, split, cells.get("comment", "").removeprefix("'"))  # type: ignore[arg-type]
        name = name_of(cells["path"], file.parent)
        if seen.setdefault(name, row) != row:
            raise UserError(f"{name} is there twice; keep one", file=where)
        yield name, row


def name_of(typed: str, folder: Path) -> str:
    """Return an image's path relative to the folder, as a table of another program may not have it."""
    if "\\" in typed and not os.path.lexists(folder / typed):
        typed = typed.replace("\\", "/")
    if os.path.isabs(typed):
        for start in (folder.absolute(), folder.resolve()):
            if Path(typed).is_relative_to(start):
                return Path(typed).relative_to(start).as_posix()
    return PurePosixPath(typed).as_posix()


def _text_of(rows: Mapping[str, Row], task: TaskName) -> str:
    """Return the file's text. No cell that somebody has chosen begins as a formula does."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", _column(task), "split", "comment"))
    for name, row in rows.items():
        label = "|".join(row.labels)
        if task == "multilabel" and row.split != UNSURE:
            label += "|"  # also of one class or none: by it `train` knows that there may be several
        path = f"./{name}" if name.startswith((*_COMPUTED, " ")) else name
        comment = f"'{row.comment}" if row.comment.startswith(_COMPUTED) else row.comment
        writer.writerow((path, label, row.split, comment))
    return text.getvalue()


def _state(file: Path) -> tuple[int, ...] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other servers on the same folder from writing meanwhile; the lock is the kernel's, and ends with us."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
