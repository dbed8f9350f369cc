"""What the page asks for: the next image or a wall of them, what was said of it, and how far one is.

Every fifth image is for the test, drawn by content before anything was chosen. It is labelled without a proposal, and
neither the order nor a proposal or a wall reads it: accuracy on images that a model has chosen says nothing of others.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from peft_vit.base.console import quoted, some_of
from peft_vit.base.errors import UserError, first_line
from peft_vit.core.tasks import TASKS
from peft_vit.data.sources.folders import UNSURE
from peft_vit.deploy.page.formatting import percent_interval, points_interval
from peft_vit.label.features import FolderFeatures
from peft_vit.label.images import LARGE, SMALL, TEST_EVERY, ImageFolder
from peft_vit.label.labels import ConflictError, LabelStore, Row, class_name
from peft_vit.label.order import FEWEST_OF_CLASS, Accuracy, expected_accuracy, herding, propose, wall
from peft_vit.label.training import Training

Order = Literal["herding", "random", "files", "unlike"]
_FEWEST = 2  # classes, and labels of each, before anything is proposed
_AHEAD = 5  # images chosen at once, and as many more as were labelled while they were chosen
_AFTER_REFUSAL = 10  # labels until a wall is offered again
_MORE = 1.1  # times as many features, before the order is computed again
_FEWEST_TESTED = 20  # images, before it is said what more labels bring
_NO_CLASS = -1
_ABOUT = (
    "Every fifth image is for the test. It is drawn by chance and comes without a proposal: accuracy on images that a "
    "model has chosen says nothing of others. Beside each class are its labels to train on + those for the test."
)
_WALLS = f"From {FEWEST_OF_CLASS} to train on per class, on average, images probably of one class come together."


class Shown(NamedTuple):
    """What the page shows: one image, several that may all be of one class, or none, as all are labelled."""

    ids: tuple[int, ...] = ()
    is_wall: bool = False
    is_test: bool = False
    proposed: str | None = None
    former: Row | None = None  # what was said of it, where one has gone back


class Session:
    """A folder that is being labelled; its methods may be called from any thread.

    Args:
        store: what is labelled.
        images: of the folder.
        features: of the images.
        order: how the next image is chosen.
        classes: those of the model that proposes.
    """

    def __init__(
        self,
        store: LabelStore,
        images: ImageFolder,
        features: FolderFeatures,
        order: Order = "herding",
        classes: Sequence[str] = (),
    ) -> None:
        self.store, self.images, self.features, self.order = store, images, features, order
        self.training = Training(store)
        self._lock, self._changed = threading.RLock(), threading.Event()
        self._classes = list(classes)
        self._history: list[tuple[tuple[int, ...], dict[str, Row]]] = []  # images, and rows that they came to
        self._at = 0  # how many of these come before what is shown; all, unless one has gone back
        self._shown = Shown()
        self._skipped: set[int] = set()
        self._doubted: list[int] = []  # on walls
        self._no_wall_before = 0  # labels
        self._tests_first = False
        self._trouble = ""
        # What the last fit has found:
        self._ready = 0
        self._chosen: list[int] = []
        self._proposals: dict[int, str] = {}
        self._offered: Shown | None = None
        self._accuracy: Accuracy | None = None

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes in the order of their buttons, also of those that no image has any more."""
        self._classes = [*dict.fromkeys((*self._classes, *self.store.classes))]
        return self._classes

    # --- what the page asks and says ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what is shown, and how far one is, as JSON."""
        with self._lock:
            self.store.refresh()
            ids = self._shown.ids
            if not ids or (self._at == len(self._history) and not all(map(self._is_open, ids))):
                self._shown = self._choose()
            tested = self.store.num_images["test"]
            labelled = tested + self.store.num_images["train"]
            images = len(self.images.names) - len(self.images.left_out)
            gone = len(self.store.rows.keys() - self.images.number.keys())
            away = f"; {gone} of them no longer there" if gone else ""
            return {
                **self._shown._asdict(),
                "former": self._shown.former and self._shown.former._asdict(),
                "names": [self.images.names[i] for i in self._shown.ids],
                "ahead": [i for i in self._chosen if self._is_open(i)][:3],
                "task": self.store.task,
                "classes": self.classes,
                "counts": self.store.num_labels["train"],
                "counts_of_test": self.store.num_labels["test"],
                "title": "Label images",
                "note": _note(self._shown),
                "finished": "All images are labelled.",
                "counted": f"{labelled} of {images} labelled, {tested} of them for the test{away}",
                "about": f"{_ABOUT} {_WALLS}" if self.store.task == "classification" else _ABOUT,
                "untested": _untested(self._lacking(), self._tests_first),
                "tests_first": self._tests_first,
                "labelled": labelled,
                "tested": tested,
                "images": images,
                "ready": self._ready,
                "accuracy": _in_words(self._accuracy),
                "left_out": self.images.faults(),
                "undoable": self._at > 0,
                "trouble": self.features.fault or self._trouble,
                "command": f"peft-vit tune {quoted(self.store.file)}",
                "training": self.training.state(),
            }

    def record(
        self,
        ids: Sequence[int],
        labels: Sequence[str],
        comment: str = "",
        unsure: bool = False,
        wrong: Sequence[int] = (),
    ) -> None:
        """Label images, and their copies that have no label; what was said is on disk when this returns.

        Where one has gone back, this replaces that answer alone.

        Args:
            ids: of the images.
            labels: of each, a class, several classes or none, or a number.
            comment: on each.
            unsure: nobody can tell; then there are no labels.
            wrong: those of the images that these are not the labels of; they are shown next, alone.

        Raises:
            ConflictError: if another page has labelled one meanwhile.
            UserError: if this can't be a label, or the disk doesn't take it; then nothing is labelled.
        """
        with self._lock:
            self.store.refresh()
            given = () if unsure else self._checked(labels)
            right, former = [i for i in ids if i not in wrong], self._former(ids)
            rows, after = self.store.rows.keys() - former.keys(), dict[str, Row]()
            for i in right:
                split: Any = UNSURE if unsure else "test" if self._is_test(i, self.store.rows) else "train"
                for copy in self.images.copies.get(self.images.digest(i), [i]):
                    name = self.images.names[copy]
                    if copy == i or (copy not in wrong and name not in rows):
                        after[name] = Row(given, split, " ".join(comment.split()))
            self._change(tuple(right), after, former)
            self._doubted += wrong
            self._go_on()

    def refuse(self, ids: Sequence[int]) -> None:
        """Show images later, or no wall for a while; where one has gone back, they have no label any more."""
        with self._lock:
            self._change((), {}, self._former(ids))
            if self._shown.is_wall:
                self._no_wall_before = len(self.store.rows) + _AFTER_REFUSAL
            else:
                self._skipped.update(ids)
            self._go_on()

    def ask_tests(self) -> None:
        """Show images for the test first, until each class that is trained on has one.

        Raises:
            UserError: if none is left.
        """
        with self._lock:
            self.store.refresh()
            self._go_on()
            if self._next(for_test=True) is None:
                raise UserError("no image for the test is left; add images", field="tests")
            self._tests_first = True

    def undo(self) -> None:
        """Go back an answer, and show its images again; their labels stay until others are given.

        Raises:
            ConflictError: if another page has said something else of one meanwhile.
        """
        with self._lock:
            self.store.refresh()
            if not self._at:
                raise UserError("no answer before this one since the page was started")
            self._at -= 1
            ids, after = self._history[self._at]
            if other := [name for name, row in after.items() if self.store.rows.get(name) != row]:
                del self._history[self._at]
                raise ConflictError("was changed since, from another page; continue, or go back further", file=other[0])
            row = after[self.images.names[ids[0]]]
            proposed = row.labels[0] if self.store.task == "classification" and row.labels else None
            self._shown = Shown(ids, len(ids) > 1, row.split == "test", proposed, row)

    # --- what is computed meanwhile -----------------------------------------------------------------------------------

    def fit(self) -> None:
        """Fit a model to what is labelled, and choose the next images by it; the page is answered meanwhile."""
        features, ids, known, distances = self.features.read()
        if not len(ids):
            return
        with self._lock:
            rows, classes, num_labelled = self.store.rows, self.classes, self.store.num_labels["train"].total()
            is_open = np.array([self._is_open(i) for i in ids.tolist()])  # (M,)
            self._ready = len(ids)
        is_test = np.array([self._is_test(i, rows) for i in ids.tolist()])  # (M,)
        available, labels = is_open & ~is_test, np.full(len(ids), _NO_CLASS)
        for place, i in enumerate(ids.tolist()):
            row = rows.get(self.images.names[i])
            if row is not None and row.labels and row.split != UNSURE:
                labels[place] = classes.index(row.labels[0]) if self.store.task == "classification" else 0
        train, test = np.where(is_test, _NO_CLASS, labels), np.where(is_test, labels, _NO_CLASS)
        probabilities, proposals, offered, accuracy = None, {}, None, None
        if (np.bincount(train[train >= 0], minlength=1) >= _FEWEST).sum() >= _FEWEST:
            probabilities = propose(features, train, len(classes))  # (M, K)
            accuracy = expected_accuracy(features, train, test, len(classes))
        if train.max(initial=0) < known.shape[1]:  # the model knows all of them
            probabilities = np.pad(known, ((0, 0), (0, len(classes) - known.shape[1])))
        if probabilities is not None:
            proposals = {i: classes[k] for i, k in zip(ids.tolist(), probabilities.argmax(1).tolist(), strict=True)}
            if found := wall(probabilities, available, num_labelled):
                offered = Shown(tuple(ids[found[1]].tolist()), is_wall=True, proposed=classes[found[0]])
        count, chosen = _AHEAD + max(0, len(self.store.rows) - len(rows)), list[int]()
        if self.order == "herding":
            chosen = herding(features, train, available, count, probabilities)
        elif self.order == "unlike":
            farthest = np.argsort(-distances, kind="stable")
            chosen = farthest[available[farthest]][:count].tolist()
        with self._lock:
            self._chosen, self._proposals = ids[chosen].tolist(), proposals
            self._offered, self._accuracy = offered, accuracy

    def work(self, stop: threading.Event) -> None:
        """Fit again and again, whenever there are other labels, features or copies, until asked to stop."""
        threading.Thread(target=self._find_copies, daemon=True).start()
        while not stop.is_set():
            most = len(self.images.names) - len(self.images.left_out)
            enough = min(_MORE * self._ready, most - 1)
            try:
                if self._changed.wait(1.0) or (self._ready < most and len(self.features.read()[1]) > enough):
                    self._changed.clear()
                    self.fit()
                    self._trouble = ""
            except Exception as error:  # images come in any order then, and what is labelled stays
                self._trouble = first_line(error)

    # --- inner --------------------------------------------------------------------------------------------------------

    def _find_copies(self) -> None:
        """Find them beside the fits, since with 20,000 images it takes a minute."""
        self.images.find_copies()
        self._changed.set()

    def _former(self, ids: Sequence[int]) -> dict[str, Row]:
        """Return the rows that an answer came to, if one has gone back to it and these are its images."""
        return next((rows for shown, rows in self._history[self._at : self._at + 1] if shown == tuple(ids)), {})

    def _change(self, ids: tuple[int, ...], after: dict[str, Row], former: dict[str, Row]) -> None:
        """Write what images came to, in place of a former answer where there is one."""
        if not (after or former):
            return
        replaced = slice(self._at, self._at + 1) if former else slice(len(self._history), None)
        try:
            self.store.change({**dict.fromkeys(former), **after}, former or dict.fromkeys(after))
        except ConflictError:  # from another page, so there is no going back to it any more
            del self._history[replaced]
            self._at = len(self._history)
            raise
        self._history[replaced] = [(ids, after)] if after else []

    def _go_on(self) -> None:
        if self._shown.is_wall:
            self._offered = None
        self._shown, self._at = Shown(), len(self._history)
        self._changed.set()

    def _checked(self, labels: Sequence[str]) -> tuple[str, ...]:
        if self.store.task != "multilabel" and len(labels) != 1:
            raise UserError(f"expected one, got {len(labels)}", field="label")
        if self.store.task == "regression":
            number = labels[0].strip().replace(",", ".")
            if TASKS["regression"].fault({"value": number}):
                raise UserError(f"expected a number such as 12.5, got {number!r}", field="label")
            return (number,)
        return tuple(dict.fromkeys(class_name(label, self.classes) for label in labels))

    def _is_open(self, i: int) -> bool:
        name = self.images.names[i]
        return name not in self.store.rows and name not in self.images.left_out and i not in self._skipped

    def _is_test(self, i: int, rows: Mapping[str, Row]) -> bool:
        """Return whether an image is for the test: as is written down of it or of a copy, or else as is drawn."""
        written = (rows.get(self.images.names[copy]) for copy in self.images.alike(i))
        split = next((row.split for row in written if row is not None and row.split in ("train", "test")), None)
        return self.images.is_test(i) if split is None else split == "test"

    def _choose(self) -> Shown:
        num_train, num_test = self.store.num_images["train"], self.store.num_images["test"]
        is_owed = num_train + num_test + 1 >= TEST_EVERY * (num_test + 1)
        self._tests_first = self._tests_first and bool(self._lacking())
        found = self._next(for_test=True) if is_owed or self._tests_first else None
        found = found or self._wall() or self._next(for_test=False) or self._next(for_test=True)
        if found is None and self._skipped:
            self._skipped.clear()
            return self._choose()
        return found or Shown()

    def _lacking(self) -> list[str]:
        """Return the classes that training would begin with, and no test image is labelled of."""
        of_test = self.store.num_labels["test"]
        return [] if self.training.missing() else [name for name in self.store.classes if not of_test[name]]

    def _next(self, for_test: bool) -> Shown | None:
        in_turn = range(len(self.images.names)) if self.order == "files" else self.images.shuffled
        first = () if for_test else (*self._doubted, *self._chosen)
        for i in (*first, *in_turn):
            if self._is_open(i) and self._is_test(i, self.store.rows) == for_test and self.images.is_sound(i, LARGE):
                return Shown((i,), is_test=for_test, proposed=None if for_test else self._proposals.get(i))
        return None

    def _wall(self) -> Shown | None:
        is_doubted = any(map(self._is_open, self._doubted))  # these come first, alone
        if self._offered is None or is_doubted or len(self.store.rows) < self._no_wall_before:
            return None
        ids = tuple(i for i in self._offered.ids if self._is_open(i) and self.images.is_sound(i, SMALL))
        return self._offered._replace(ids=ids) if ids else None


def _note(shown: Shown) -> str:
    if shown.former is None:
        return "For the test: without a proposal." if shown.is_test else ""
    is_unsure = shown.former.split == UNSURE
    said = "can't tell" if is_unsure else ", ".join(shown.former.labels) or "none"
    return f"You said: {said}. {'U' if is_unsure else 'Enter'} keeps it, another answer changes this one alone."


def _untested(classes: Sequence[str], comes_first: bool) -> str:
    if not classes:
        return ""
    named = some_of([f"'{name}'" for name in classes])
    of = "it" if len(classes) == 1 else "these classes"
    then = "Images for the test come first now." if comes_first else f"The test would say nothing of {of}."
    return f"No test image of {named} is labelled yet. {then}"


def _in_words(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return ""
    text = f"Right on {percent_interval(accuracy.now)} of {accuracy.now.n} labelled test images."
    if accuracy.gain is None or accuracy.now.n < _FEWEST_TESTED:
        return text
    return f"{text} As many labels again are expected to bring {points_interval(accuracy.gain)} points."
