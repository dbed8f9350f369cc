"""What the page asks for: the next image or a wall of them, what was said of it, and how far one is.

Every fifth image is for the test, drawn by content before anything was chosen. It is labelled without a proposal, and
neither the order nor a proposal or a wall reads it: accuracy on images that a model has chosen says nothing of others.
"""

from __future__ import annotations

import shlex
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import Interval
from peft_vit.data.sources.folders import UNSURE
from peft_vit.label.features import FeatureFile, FeatureProcess
from peft_vit.label.images import TEST_SHARE, ImageFolder
from peft_vit.label.labels import LabelStore, Row, class_name
from peft_vit.label.order import Accuracy, expected_accuracy, herding, propose, wall

Order = Literal["herding", "random", "files"]
LARGE, SMALL = 1024, 256  # pixels a side of an image alone, and of one on a wall
_FEWEST_OF_A_CLASS, _FEWEST_CLASSES = 2, 2  # before anything is proposed
_AHEAD = 5  # images chosen at once, and as many more as were labelled while they were chosen
_AFTER_REFUSAL = 10  # labels until a wall is offered again
_OPEN = -1


class Shown(NamedTuple):
    """What the page shows: one image, several of which all are taken for one class, or none, as all are labelled."""

    ids: tuple[int, ...] = ()
    is_wall: bool = False
    is_test: bool = False
    proposed: str | None = None
    former: Row | None = None  # what was taken back


class Change(NamedTuple):
    """What one answer has changed: the images that were shown, and the rows of these and of their copies."""

    ids: tuple[int, ...]
    before: dict[str, Row | None]
    after: dict[str, Row | None]


class Fitted(NamedTuple):
    """What a regression on the labels so far says of the images whose features are there.

    Attributes:
        ids: their numbers, (M,) int64.
        classes: K names.
        probabilities: (M, K) float.
        labelled: class of each that is learned from, (M,) int64; -1: of the others.
        accuracy: on the labelled test images, see `expected_accuracy`.
    """

    ids: np.ndarray
    classes: Sequence[str]
    probabilities: np.ndarray
    labelled: np.ndarray
    accuracy: Accuracy | None


class Features(Protocol):
    """What is computed of the images meanwhile."""

    @property
    def fault(self) -> str:
        """Return why nothing more is computed, or ""."""

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the features that are there, (M, D) float32, and of which images, (M,) int64."""


class FolderFeatures:
    """Those of a folder, which a process computes; it ends when this one stops it, or ends."""

    def __init__(self, images: ImageFolder) -> None:
        self._images, self._process = images, FeatureProcess(images.root, images.names)
        self._file: FeatureFile | None = None

    @property
    def fault(self) -> str:
        """Return why it has ended too early, or ""."""
        return self._process.fault or ""

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Return what is there; the first call reads all images, to know which features are whose."""
        if self._file is None:
            digests = [self._images.digest(i) for i in range(len(self._images.names))]
            self._file = FeatureFile(self._process.file, digests)
        self._file.update()
        ready = self._file.ready
        for i in np.flatnonzero(self._file.done & ~ready).tolist():
            self._images.is_sound(i, SMALL)  # which says why not
        ids = np.flatnonzero(ready)
        return self._file.values[ids], ids

    def stop(self) -> None:
        """End the process."""
        self._process.stop()


class Session:
    """A folder that is being labelled; its methods may be called from any thread.

    Args:
        store: what is labelled.
        images: of the folder.
        features: of the images.
        order: how the next image is chosen.
    """

    def __init__(self, store: LabelStore, images: ImageFolder, features: Features, order: Order = "herding") -> None:
        self.store, self.images, self.features, self.order = store, images, features, order
        self.changed = threading.Event()
        self._lock = threading.RLock()
        self._classes = list(store.classes)
        self._history: list[Change] = []
        self._skipped: set[int] = set()
        self._doubted: deque[int] = deque()  # on walls
        self._chosen: deque[int] = deque()
        self._labelled_since = 0  # the order was computed
        self._no_wall_before = 0  # labels
        self._fitted: Fitted | None = None
        self._ready = 0
        self._shown: Shown | None = None

    # --- what the page asks -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what is shown, and how far one is, as JSON."""
        with self._lock:
            self.store.refresh()
            if self._shown is None or not self._is_current(self._shown):
                self._shown = self._choose()
            rows, fitted = self.store.rows, self._fitted
            labelled = [row for row in rows.values() if row.split != UNSURE]
            ahead = [i for i in list(self._chosen)[:3] if i not in self._shown.ids]
            return {
                "task": self.store.task,
                "ids": self._shown.ids,
                "names": [self.images.names[i] for i in self._shown.ids],
                "wall": self._shown.is_wall,
                "test": self._shown.is_test,
                "proposed": self._shown.proposed,
                "former": self._shown.former and self._shown.former._asdict(),
                "ahead": ahead,
                "classes": self.classes,
                "counts": Counter(label for row in labelled for label in row.labels),
                "labelled": len(labelled),
                "tested": sum(row.split == "test" for row in labelled),
                "images": len(self.images.names) - len(self.images.left_out),
                "ready": self._ready,
                "accuracy": _in_words(fitted and fitted.accuracy),
                "left_out": [f"{name} {why}" for name, why in self.images.left_out.items()],
                "gone": sum(name not in self.images.number for name in rows),
                "undoable": bool(self._history),
                "trouble": self.features.fault,
                "command": f"peft-vit tune {shlex.quote(str(self.store.file))}",
            }

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes in the order of their buttons, also of those that no image has any more."""
        self._classes += [name for name in self.store.classes if name not in self._classes]
        return self._classes

    def record(self, ids: Sequence[int], labels: Sequence[str], comment: str = "", unsure: bool = False) -> None:
        """Label images, and their copies; what was said is on disk when this returns.

        Args:
            ids: of the images.
            labels: of each, a class, several classes or none, or a number.
            comment: on each.
            unsure: nobody can tell; then there are no labels.

        Raises:
            ConflictError: if another page has labelled one meanwhile.
            UserError: if this is no label, or the disk doesn't take it; then nothing is labelled.
        """
        with self._lock:
            self.store.refresh()
            given = () if unsure else self._checked(labels)
            changes: dict[str, Row | None] = {}
            for i in ids:
                split: Any = UNSURE if unsure else "test" if self.images.is_test(i) else "train"
                for copy in self.images.copies.get(self.images.digest(i), [i]):
                    changes[self.images.names[copy]] = Row(given, split, " ".join(comment.split()))
            before = {name: self.store.rows.get(name) for name in changes}
            self.store.change(changes, {self.images.names[i]: None for i in ids})
            self._history.append(Change(tuple(ids), before, changes))
            self._labelled_since += len(ids)
            self._go_on()

    def refuse(self, ids: Sequence[int]) -> None:
        """Show images later, or no wall for a while."""
        with self._lock:
            if self._shown is not None and self._shown.is_wall:
                self._no_wall_before = len(self.store.rows) + _AFTER_REFUSAL
            else:
                self._skipped.update(ids)
            self._go_on()

    def doubt(self, ids: Sequence[int]) -> None:
        """Show images of a wall alone, next: those that are not of its class."""
        with self._lock:
            self._doubted.extend(ids)

    def undo(self) -> None:
        """Take back what was said last, and show its image again.

        Raises:
            ConflictError: if another page has said something else of it meanwhile.
        """
        with self._lock:
            if not self._history:
                raise UserError("nothing to take back since this page was started")
            ids, before, after = self._history[-1]
            self.store.change(before, after)
            self._history.pop()
            self._go_on()
            if len(ids) == 1:
                former = after[self.images.names[ids[0]]]
                self._shown = Shown(ids, is_test=self.images.is_test(ids[0]), former=former)

    # --- what is computed meanwhile -----------------------------------------------------------------------------------

    def fit(self) -> None:
        """Fit a model to what is labelled, and choose the next images by it; the page is answered meanwhile."""
        features, ids = self.features.read()  # (M, D), (M,)
        with self._lock:
            rows, classes, skipped = dict(self.store.rows), list(self.classes), set(self._skipped)
            self._ready, self._labelled_since = len(ids), 0
        is_test = np.array([self.images.is_test(i) for i in ids.tolist()], dtype=bool)  # (M,)
        number = {name: k for k, name in enumerate(classes)}
        labels = np.full(len(ids), _OPEN, dtype=np.int64)
        available = np.zeros(len(ids), dtype=bool)
        for place, i in enumerate(ids.tolist()):
            row = rows.get(self.images.names[i])
            if row is None:
                available[place] = i not in skipped and self.images.names[i] not in self.images.left_out
            elif row.split != UNSURE:
                labels[place] = number[row.labels[0]] if self.store.task == "classification" else 0
        available &= ~is_test
        train = np.where(is_test, _OPEN, labels)
        fitted, probabilities = None, None
        counts = np.bincount(train[train >= 0], minlength=1)
        if self.store.task == "classification" and (counts >= _FEWEST_OF_A_CLASS).sum() >= _FEWEST_CLASSES:
            probabilities = propose(features, train, len(classes))  # (M, K)
            accuracy = expected_accuracy(features, train, np.where(is_test, labels, _OPEN), len(classes))
            fitted = Fitted(ids, classes, probabilities, train, accuracy)
        with self._lock:
            count = _AHEAD + self._labelled_since
        order = herding(features, train, available, count, probabilities) if self.order == "herding" else []
        with self._lock:
            self._fitted, self._chosen = fitted, deque(ids[order].tolist())

    def work(self, stop: threading.Event) -> None:
        """Fit again and again, whenever there are other labels or features, until asked to stop."""
        while not stop.is_set():
            if self.changed.wait(1.0) or len(self.features.read()[1]) > self._ready:
                self.changed.clear()
                self.fit()

    # --- inner --------------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        self._shown = None
        self.changed.set()

    def _checked(self, labels: Sequence[str]) -> tuple[str, ...]:
        if self.store.task == "regression":
            text = "".join(labels).strip().replace(",", ".")
            try:
                if not np.isfinite(float(text)):
                    raise ValueError
            except ValueError:
                raise UserError(f"expected a number such as 12.5, got {text!r}", field="label") from None
            return (text,)
        if self.store.task == "classification" and len(labels) != 1:
            raise UserError("expected one class", field="label")
        return tuple(dict.fromkeys(class_name(label, self.classes, self.store.task) for label in labels))

    def _is_open(self, i: int) -> bool:
        name = self.images.names[i]
        return name not in self.store.rows and name not in self.images.left_out and i not in self._skipped

    def _is_current(self, shown: Shown) -> bool:
        """Return whether nobody else has labelled what is shown; what was taken back stays."""
        return bool(shown.ids) and all(map(self._is_open, shown.ids))

    def _choose(self) -> Shown:
        rows = self.store.rows.values()
        tested, labelled = sum(row.split == "test" for row in rows), sum(row.split != UNSURE for row in rows)
        is_owed = labelled + 1 >= TEST_SHARE * (tested + 1)
        if is_owed and (test := self._first(self._others(for_test=True))):
            return test
        if labelled >= self._no_wall_before and (offered := self._wall()):
            return offered
        if found := self._first(chain(self._doubted, self._chosen, self._others(for_test=False))):
            return found
        if found := self._first(self._others(for_test=True)):
            return found
        if self._skipped:
            self._skipped.clear()
            return self._choose()
        return Shown()

    def _others(self, for_test: bool) -> Iterator[int]:
        in_turn = range(len(self.images.names)) if self.order == "files" else self.images.shuffled.tolist()
        return (i for i in in_turn if self._is_open(i) and self.images.is_test(i) == for_test)

    def _first(self, ids: Iterator[int]) -> Shown | None:
        found = next((i for i in ids if self._is_open(i) and self.images.is_sound(i, LARGE)), None)
        if found is None:
            return None
        is_test = self.images.is_test(found)
        return Shown((found,), is_test=is_test, proposed=None if is_test else self._proposed(found))

    def _proposed(self, i: int) -> str | None:
        fitted = self._fitted
        if fitted is None or not (place := np.flatnonzero(fitted.ids == i)).size:
            return None
        return fitted.classes[int(fitted.probabilities[place[0]].argmax())]

    def _wall(self) -> Shown | None:
        if self._fitted is None:
            return None
        ids, classes, probabilities, labelled, _ = self._fitted
        available = np.array([self._is_open(i) and not self.images.is_test(i) for i in ids.tolist()], dtype=bool)
        offered = wall(probabilities, available, labelled)
        if offered is None:
            return None
        number, places = offered
        sound = tuple(i for i in ids[places].tolist() if self.images.is_sound(i, SMALL))
        return Shown(sound, is_wall=True, proposed=classes[number]) if sound else None


def _in_words(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return ""
    now, gain = accuracy.now, accuracy.gain
    text = f"Right on {now.estimate:.0%} of {now.n} labelled test images{_range(now)}."
    if gain is None:
        return text
    return f"{text} As many labels again are expected to bring {gain.estimate:.0%} more{_range(gain)}."


def _range(interval: Interval) -> str:
    return "" if interval.low is None else f" ({interval.low:.0%} to {interval.high:.0%})"
