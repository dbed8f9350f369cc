"""A first look at somebody's folder of images: what is there, what can't be used, and what is a copy of what.

Every image is decoded once, JPEGs at a fraction of their size. Exact copies have the same pixels, whatever their files
are called and hold; near copies are those of `duplicates`: saved anew, scaled or brightened, and what a chain of such
pairs links. What no comparison of pixels tells, nobody sees here: photographs of one object one after the other, crops,
mirrored images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from peft_vit.data.duplicates import near_groups, thumbnails_of
from peft_vit.data.files import IMAGE_SUFFIXES, FileTree, existing, open_tree
from peft_vit.data.folders import class_files, files_in_use, is_image
from peft_vit.data.index import ImagesFile, check_class_names, numbered
from peft_vit.data.pixels import decode_image, on_white, sides_of, to_pixels
from peft_vit.data.splits import crossing, stratified_draw
from peft_vit.errors import UserError
from peft_vit.seeding import numpy_generator

LARGEST_IMBALANCE = 3.0  # largest class over smallest; above, a constant guess is right in three of four at least
_LEAST_BESIDE_SEALED = 8  # different images of a class, for training, validation and test
_ENOUGH, _SIDE = 256, 64  # pixels a side of a JPEG that is decoded, and of what is compared
_NAMED, _CLASSES_NAMED = 3, 12  # in a line


@dataclass(frozen=True)
class Seen:
    """What a folder of images holds: N that can be used, of K classes, and what is left out.

    Attributes:
        path: of the folder or zip.
        class_names: K of them.
        names: of the files, relative to the folder, N of them, sorted.
        labels: class of each, (N,) int64.
        copies: equal numbers for exact copies, (N,) int64.
        groups: equal numbers for exact and near copies, (N,) int64.
        sealed: the folder's own test split, (N,) bool; None if it has none.
        sides: shorter and longer side of each, pixels, (N, 2) int64.
        left_out: why, by name, of what can't be read, is of two classes, or copies an image of the own test split.
    """

    path: Path
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    labels: np.ndarray
    copies: np.ndarray
    groups: np.ndarray
    sealed: np.ndarray | None
    sides: np.ndarray
    left_out: Mapping[str, str]

    @property
    def chosen_on(self) -> np.ndarray:
        """Return which images are not of the own test split, (N,) bool: what is chosen may rest on these alone."""
        return np.ones(len(self.names), dtype=bool) if self.sealed is None else ~self.sealed

    @property
    def chosen_counts(self) -> np.ndarray:
        """Return the number of these images of each class, (K,) int64."""
        return np.bincount(self.labels[self.chosen_on], minlength=len(self.class_names))

    @property
    def imbalance(self) -> float:
        """Return how many times as many of these the largest class has as the smallest."""
        return float(self.chosen_counts.max() / self.chosen_counts.min())

    @property
    def balanced(self) -> bool:
        """Return whether accuracy decides; where it does not, balanced accuracy does."""
        return self.imbalance <= LARGEST_IMBALANCE

    def lines(self) -> list[str]:
        """Return what there is to know, each in a line."""
        return [*self._of_images(), *self._of_copies(), self._of_balance()]

    def _of_images(self) -> Iterator[str]:
        counts = np.bincount(self.labels, minlength=len(self.class_names))  # (K,)
        each = f"{counts.min():,} to {counts.max():,} of each"
        if len(counts) <= _CLASSES_NAMED:
            each = ", ".join(f"{name} {count:,}" for name, count in zip(self.class_names, counts, strict=True))
        yield f"{len(self.names):,} images of {len(counts)} classes: {each}"
        short, long = np.median(self.sides, axis=0).astype(int)
        smallest, largest = self.sides.min(), self.sides.max()
        between = "" if smallest == largest else f"; the shortest side has {smallest:,}, the longest {largest:,}"
        yield f"{short:,} x {long:,} pixels (median of the shorter and of the longer side){between}"
        if self.sealed is not None:
            yield f"{np.count_nonzero(self.sealed):,} of them are the folder's own test split, which is read once"
        if self.left_out:
            reasons = [f"{name} ({why})" for name, why in self.left_out.items()]
            more = f" and {len(reasons) - _NAMED:,} more" if len(reasons) > _NAMED else ""
            yield f"{_are(len(reasons), 'file')} left out: {', '.join(reasons[:_NAMED])}{more}"

    def _of_copies(self) -> Iterator[str]:
        every = np.arange(len(self.names))
        for what, groups, within in (("equal", self.copies, every), ("nearly equal", self.groups, self.copies)):
            count = len(np.unique(within)) - len(np.unique(groups))
            if count:
                a, b = crossing(groups, within)[1]
                such_as = f"such as {self.names[a]} and {self.names[b]}"
                yield f"{_are(count, 'image')} {what} to others, {such_as}; they stay on one side of every split"
        count, pair = crossing(self.groups, self.labels)
        if count:
            a_title, b_title = (f"{self.names[i]} ('{self.class_names[self.labels[i]]}')" for i in pair)
            such_as = f"such as {a_title} and {b_title}"
            yield f"{_are(count, 'image')} nearly equal to one of another class, {such_as}; is one of the labels wrong?"

    def _of_balance(self) -> str:
        counts = self.chosen_counts
        large, small = (self.class_names[int(at)] for at in (counts.argmax(), counts.argmin()))
        times = f"class '{large}' has {self.imbalance:.1f} times as many images as class '{small}'"
        if counts.max() == counts.min():
            times = "all classes have as many images"
        if self.balanced:
            return f"accuracy decides: {times}; balanced accuracy would from {LARGEST_IMBALANCE:g} times on"
        return f"balanced accuracy decides: {times}, more than {LARGEST_IMBALANCE:g}"


def _are(count: int, what: str) -> str:
    return f"1 {what} is" if count == 1 else f"{count:,} {what}s are"


def look_at(
    path: str | Path,
    *,
    folds: int = 5,
    sealed_share: float = 0.2,
    on_progress: Callable[[int, int], None] | None = None,
) -> Seen:
    """Decode every image of a folder once, and say what is there.

    Args:
        path: a folder or a zip of <class>/<image>, or of train/, test/ and val/ with such folders.
        folds: that the images will be divided into.
        sealed_share: of the images, to be put by for one test in the end, if the folder has no test split of its own.
        on_progress: told how many images are decoded, and of how many.

    Raises:
        UserError: if there is no image, fewer than two classes, too few different images of a class (with the number
            that would do), or a test split of other classes.
    """
    path = existing(str(path))
    tree = open_tree(path)
    left_out = {name: f"is none of {' '.join(IMAGE_SUFFIXES)}" for name in files_in_use(tree) if not is_image(name)}
    files = class_files(tree, path, left_out)
    classes, labels = numbered(list(files.classes.values()))
    class_names = tuple(classes)
    if len(class_names) < 2:
        problem = f"holds one class alone, '{class_names[0]}'; add a folder with images of another one"
        raise UserError(problem, file=path)
    check_class_names(class_names, path)
    names = np.array(list(files.classes), dtype=object)
    sealed = None if files.is_test is None else np.array(files.is_test, dtype=bool)
    # Different images of a class that are needed: one in each fold, or what is trained on would be few.
    trained_share = 1.0 if sealed is not None else 1 - sealed_share
    least = math.ceil(round(max(folds, _LEAST_BESIDE_SEALED) / trained_share, 6))
    _refuse_few(path, class_names, labels, np.arange(len(labels)), sealed, least)  # before anything is decoded
    copies, groups, sides, faults = _decoded(tree, list(files.classes), on_progress)
    left_out |= faults | _contradictions(names, labels, copies, groups, sealed)
    kept = np.array([name not in left_out for name in names], dtype=bool)
    labels, groups, sealed = labels[kept], groups[kept], None if sealed is None else sealed[kept]
    _refuse_few(path, class_names, labels, groups, sealed, least)
    return Seen(path, class_names, tuple(names[kept]), labels, copies[kept], groups, sealed, sides[kept], left_out)


def images_file(seen: Seen, sealed_share: float = 0.2, seed: int = 0) -> dict[str, Any]:
    """Return what `data.images_file` holds, plain values: what is left out, copies, and what is sealed.

    Sealed is the folder's own test split, or else a share of the different images, each class with its own, by `seed`:
    of a group of copies one, whose others are left out.

    Args:
        seen: the folder.
        sealed_share: of the different images; has no effect on a test split of one's own.
        seed: of the draw.

    Raises:
        UserError: if the share leaves a class without a sealed image, or a file can't be read any more.
    """
    names = np.array(seen.names, dtype=object)
    left_out = dict(seen.left_out)
    sealed = seen.sealed
    if sealed is None:
        first = np.unique(seen.groups, return_index=True)[1]
        count = round(sealed_share * len(first))
        drawn = stratified_draw(np.sort(first), seen.labels, count, numpy_generator(seed, "sealed"))
        sealed = np.isin(np.arange(len(names)), drawn)
        of_group = dict(zip(seen.groups[drawn].tolist(), names[drawn], strict=True))
        for i in np.flatnonzero(np.isin(seen.groups, seen.groups[drawn]) & ~sealed):
            left_out[names[i]] = f"a copy of {of_group[int(seen.groups[i])]}, which is sealed"
    missing = np.flatnonzero(np.bincount(seen.labels[sealed], minlength=len(seen.class_names)) == 0)
    if len(missing):
        problem = f"no image of class '{seen.class_names[missing[0]]}' would be sealed; seal a larger share"
        raise UserError(problem, file=seen.path)
    used = np.array([name not in left_out for name in seen.names], dtype=bool)
    content = ImagesFile(
        sha256=open_tree(seen.path).hashed(names[used].tolist()).sha256,
        left_out=left_out,
        copies=tuple(tuple(names[used][some]) for some in _several(seen.groups[used])),
        sealed=tuple(names[sealed].tolist()),
    )
    return content.model_dump(mode="json")


# --- counting ---------------------------------------------------------------------------------------------------------


def _refuse_few(
    path: Path,
    class_names: Sequence[str],
    labels: np.ndarray,
    groups: np.ndarray,
    sealed: np.ndarray | None,
    least: int,
) -> None:
    """Raise UserError if a class has too few different images, beside an own test split, or none in that."""
    chosen_on = np.ones(len(labels), dtype=bool) if sealed is None else ~sealed
    counts = np.array([len(np.unique(groups[chosen_on & (labels == k)])) for k in range(len(class_names))])
    scarce = int(counts.argmin())
    if counts[scarce] < least:
        few = np.count_nonzero(counts < least) - 1
        more = f"; {few} more classes have too few" if few else ""
        beside = "" if sealed is None else " beside the test split"
        if np.count_nonzero(labels[chosen_on] == scarce) > counts[scarce]:
            beside += " (of copies, near ones too, one counts)"
        raise UserError(
            f"class '{class_names[scarce]}' has {counts[scarce]} different images that can be used{beside}"
            f", {least} are needed of each class to seal some and to train and test on the others{more}; add images, "
            "or take the class out",
            file=path,
        )
    if sealed is not None and not (tested := np.bincount(labels[sealed], minlength=len(class_names))).all():
        problem = f"no image of class '{class_names[int(tested.argmin())]}' is left in the test split; add some"
        raise UserError(problem, file=path)


def _contradictions(
    names: np.ndarray, labels: np.ndarray, copies: np.ndarray, groups: np.ndarray, sealed: np.ndarray | None
) -> dict[str, str]:
    """Tell, by name, equal images of two classes, of which both can't be right, and copies of the own test split."""
    why: dict[str, str] = {}
    for some in _several(copies):
        for i in some if len(np.unique(labels[some])) > 1 else ():
            other = next(k for k in some if labels[k] != labels[i])
            why[names[i]] = f"equal to {names[other]}, of another class"
    if sealed is not None:
        for some in _several(groups):
            tested = [i for i in some if sealed[i] and names[i] not in why]
            for i in some if tested else ():
                if not sealed[i]:
                    why.setdefault(names[i], f"a copy of {names[tested[0]]}, of the test split")
    return dict(sorted(why.items()))


def _several(groups: np.ndarray) -> list[list[int]]:
    """Return the members of every group that has several; what could not be read is in none, -1."""
    order = np.argsort(groups, kind="stable")
    order = order[groups[order] >= 0]
    cuts = np.flatnonzero(np.diff(groups[order])) + 1
    return [part.tolist() for part in np.split(order, cuts) if len(part) > 1]


def _decoded(
    tree: FileTree, names: Sequence[str], on_progress: Callable[[int, int], None] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, str]]:
    """Decode N files: equal numbers for exact copies (N,), for near ones too (N,), sides (N, 2), faults by name.

    Of a file that can't be read the numbers are -1.
    """
    copies, groups = np.full((2, len(names)), -1, dtype=np.int64)
    sides = np.zeros((len(names), 2), dtype=np.int64)
    number: dict[bytes, int] = {}  # of each set of exact copies
    faults: dict[str, str] = {}
    different: list[np.ndarray] = []  # thumbnails of one image of each set, (256,) each
    for done, name in enumerate(names):
        try:
            content = tree.read(name)
            image = on_white(decode_image(partial(bytes, content), name, enough=_ENOUGH)).convert("RGB")
            sides[done] = sides_of(content)
        except Exception as error:  # a foreign file or archive can fail in any way
            why = error.message if isinstance(error, UserError) else f"can't be read ({error})"
            faults[name] = why.split("; ")[0]
        else:
            mark = repr((tuple(sides[done].tolist()), image.size)).encode()
            digest = hashlib.blake2b(mark + image.tobytes(), digest_size=16).digest()
            if digest not in number:
                number[digest] = len(number)
                different.append(thumbnails_of(to_pixels(image, _SIDE, 3)[None], np.arange(1))[0])
            copies[done] = number[digest]
        if on_progress is not None:
            on_progress(done + 1, len(names))
    if different:
        groups = np.where(copies < 0, -1, near_groups(np.stack(different))[copies])
    return copies, groups, sides, faults
