"""Labels that are corrected after a review: in class folders a file moves, in a table its row changes.

Each answer is a line of corrections.jsonl beside the labels, written before anything changes: the SHA-256 of an image,
its name and label before and after. Lines are only added. Content says which image it was, so an answer can be undone
after files were moved or renamed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from peft_vit.base.errors import UserError, checked
from peft_vit.base.files import make_folder, read_bytes, sha256_of, write_whole
from peft_vit.base.settings import Frozen
from peft_vit.data.files import files_below
from peft_vit.data.sources.folders import Images, is_image
from peft_vit.data.sources.tables import relabelled, table_rows
from peft_vit.label.images import LARGE, ImageFolder
from peft_vit.label.labels import ConflictError, alone, name_of

CORRECTIONS_FILE = "corrections.jsonl"
_OF_TEST = "It tests, and was drawn at random: no model was asked."
_ABOUT_TEST = "Test labels are drawn at random, never by what a model doubts: or the test favours models like it."


class Answer(Frozen):
    """What a person said of a label; the same label before and after: it is right."""

    at: str = ""  # when it was written down, in UTC
    sha256: str
    name: str
    renamed: str  # in class folders, to here
    before: str
    after: str
    is_test: bool
    undoes: int | None = None  # the line, counted from 0, that this one takes back


class Corrections:
    """The labels of images, one class each, and what was corrected of them.

    Args:
        found: the images.

    Raises:
        UserError: if labels can't be changed there.
    """

    def __init__(self, found: Images) -> None:
        self.root, self._table = found.tree.location, found.path if found.dataset == "csv" else None
        self._at = 1 if found.tested else 0  # of the class among a name's folders
        if not self.root.is_dir() or (self._table is not None and self._table.suffix.lower() == ".parquet"):
            raise UserError("can't be changed here; unpack a zip, and write a table as CSV", file=found.path)

    def answers(self) -> list[Answer]:
        """Return what was said, in its order; raises UserError if the file was damaged."""
        file = self.root / CORRECTIONS_FILE
        lines = read_bytes(file).splitlines() if file.exists() else []
        with checked(file, "take out the line that is none"):
            return [Answer.model_validate_json(line) for line in lines]

    def standing(self) -> dict[int, Answer]:
        """Return what was not taken back, by its line."""
        answers = self.answers()
        undone = {answer.undoes for answer in answers}
        return {k: answer for k, answer in enumerate(answers) if answer.undoes is None and k not in undone}

    def record(self, name: str, before: str, after: str, is_test: bool) -> str:
        """Correct the label of an image, or confirm it, and return the image's name from now on.

        Args:
            name: of the image, relative to the root.
            before: the label that the person saw.
            after: the label that is right.
            is_test: whether it tests.

        Raises:
            ConflictError: if it has another label by now, or is gone.
            UserError: if the last image would leave a class folder, or the disk doesn't take it.
        """
        with alone(self.root):
            if (label := self._label(name)) != before:
                state = "gone" if label is None else f"'{label}' by now"
                raise ConflictError(f"is {state}; look at it again", file=name)
            digest = sha256_of(self.root / name)
            answer = Answer(sha256=digest, name=name, renamed=name, before=before, after=after, is_test=is_test)
            return self._change(answer).renamed

    def undo(self) -> Answer:
        """Take back what was said last, and return that.

        Raises:
            ConflictError: if its image is gone, or was labelled otherwise since. Then it counts as taken back.
            UserError: if there is nothing to take back.
        """
        with alone(self.root):
            line, last = max(self.standing().items(), default=(0, None))
            if last is None:
                raise UserError("holds nothing to undo", file=self.root / CORRECTIONS_FILE)
            taken_back = last.model_copy(update={"undoes": line, "before": last.after, "after": last.before})
            state = "is gone"
            for name in (last.renamed, *files_below(self.root)):
                file = self.root / name
                if is_image(name) and file.is_file() and sha256_of(file) == last.sha256:
                    if (label := self._label(name)) == last.after:
                        to = last.name if name == last.renamed else None
                        return self._change(taken_back.model_copy(update={"name": name, "renamed": name}), to)
                    state = f"is '{label}' by now"
            self._add(taken_back)
            raise ConflictError(f"{state}, so '{last.after}' can't be undone; what came before can", file=last.renamed)

    def _label(self, name: str) -> str | None:
        """Return the label of an image; None: it has none, or is gone."""
        if not (self.root / name).is_file():
            return None
        if self._table is None:
            return name.split("/")[self._at]
        rows = (row for _, row in table_rows(self._table) if name_of(row["path"], self.root) == name)
        return next((row["label"] for row in rows), None)

    def _change(self, answer: Answer, to: str | None = None) -> Answer:
        """Write an answer down, then give its image the label; return what was written."""
        name = answer.name
        if answer.after == self._label(name):
            self._add(answer)
        elif self._table is None:
            folders = name.split("/")
            if sum(map(is_image, files_below(self.root.joinpath(*folders[: self._at + 1])))) < 2:
                reason = "is the last image of its class folder, which can't be empty; add one, or remove the class"
                raise UserError(reason, file=name)
            folders[self._at] = answer.after
            target = wanted = self.root / (to or "/".join(folders))
            number = 1
            while os.path.lexists(target):
                number += 1
                target = wanted.with_stem(f"{wanted.stem}-{number}")
            make_folder(target.parent)
            answer = answer.model_copy(update={"renamed": target.relative_to(self.root).as_posix()})
            self._add(answer)
            (self.root / name).rename(target)
        else:
            content = relabelled(self._table, lambda typed: name_of(typed, self.root) == name, answer.after)
            self._add(answer)
            write_whole(self._table, content)
        return answer

    def _add(self, answer: Answer) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with (self.root / CORRECTIONS_FILE).open("a", encoding="utf-8") as lines:
            lines.write(answer.model_copy(update={"at": now}).model_dump_json() + "\n")


# --- the page ---------------------------------------------------------------------------------------------------------


class Doubt(NamedTuple):
    """A label to look at, and what is believed instead how surely; of a test image, drawn at random, nothing."""

    name: str
    label: str
    is_test: bool
    believed: str | None = None
    sure: float = 0.0


class Checking:
    """Labels that are looked at one after the other; what the page shows of them is as of a `Session`.

    Args:
        corrections: of the images.
        images: of the same folder.
        doubts: the labels, in their order; those that were confirmed before are passed over.
        classes: names of all of them.
        command: that trains on the images.
    """

    def __init__(
        self,
        corrections: Corrections,
        images: ImageFolder,
        doubts: Sequence[Doubt],
        classes: Sequence[str],
        command: str,
    ) -> None:
        self.images, self._corrections, self._classes, self._command = images, corrections, list(classes), command
        known = {(answer.sha256, answer.after) for answer in corrections.standing().values()}
        hashed = [(images.digest(images.number[doubt.name]), doubt) for doubt in doubts if doubt.name in images.number]
        self._queue = [doubt for digest, doubt in hashed if (digest, doubt.label) not in known]
        self._doubts = dict(hashed)
        self._lock = threading.RLock()

    def state(self) -> dict[str, Any]:
        """Return what is shown, and how far one is, as JSON."""
        with self._lock:
            while self._queue and not self.images.is_sound(self.images.number[self._queue[0].name], LARGE):
                self._queue.pop(0)
            ids = [self.images.number[doubt.name] for doubt in self._queue[:4]]
            standing = [*self._corrections.standing().values()]
            tested = [answer for answer in standing if answer.is_test]
            wrong, of_test = (sum(one.before != one.after for one in some) for some in (standing, tested))
            shown = self._queue[0] if self._queue else Doubt("", "", is_test=False)
            why = _OF_TEST if shown.is_test else ""
            if shown.believed:
                why = f"Models that were not trained on it say '{shown.believed}' ({shown.sure:.0%})."
            return {
                "ids": ids[:1],
                "proposed": shown.label or None,
                "believed": shown.believed or shown.label,
                "title": "Check labels",
                "note": f"Its label is '{shown.label}'. {why}" if ids else "",
                "finished": "All of these labels are checked.",
                "counted": f"{len(self._queue):,} to check, {len(standing):,} checked, {wrong:,} of them corrected",
                "about": f"{_ABOUT_TEST} Checked: {len(tested):,}. Wrong before: {of_test:,}; now: 0.",
                "names": [doubt.name for doubt in self._queue[:1]],
                "ahead": ids[1:],
                "task": "classification",
                "classes": self._classes,
                "left_out": self.images.faults(),
                "undoable": bool(standing),
                "command": self._command,
            }

    def record(self, ids: Sequence[int], labels: Sequence[str], **_: Any) -> None:
        """Correct or confirm the label of the image that is shown; it is on disk when this returns.

        Raises:
            ConflictError: if it has another label by now, or is gone; then it is shown no more.
            UserError: if it is another image or class, or the disk doesn't take it.
        """
        with self._lock:
            shown = [doubt for doubt in self._queue[:1] if [self.images.number[doubt.name]] == list(ids)]
            if not shown or len(labels) != 1 or labels[0] not in self._classes:
                raise UserError("expected one of the classes, of the image that is shown", field="label")
            (doubt,) = shown
            try:
                renamed = self._corrections.record(doubt.name, doubt.label, labels[0], doubt.is_test)
            except ConflictError:
                self._queue.pop(0)
                raise
            self._queue.pop(0)
            self.images.rename(ids[0], renamed)

    def refuse(self, ids: Sequence[int]) -> None:
        """Show an image later."""
        with self._lock:
            self._queue.sort(key=lambda doubt: self.images.number[doubt.name] in ids)

    def undo(self) -> None:
        """Take back what was said last, also before this page was started, and show its image; see `Corrections`."""
        with self._lock:
            answer = self._corrections.undo()
            if (i := self.images.number.get(answer.name)) is not None:
                self.images.rename(i, answer.renamed)
                doubt = self._doubts.get(answer.sha256, Doubt("", answer.after, answer.is_test))
                self._queue.insert(0, doubt._replace(name=answer.renamed))
