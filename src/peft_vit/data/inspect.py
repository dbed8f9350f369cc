"""What a folder of images holds, and copies among the images of a run: what is equal or nearly equal.

Equal are images with the same pixels at the study's size: no model can tell them apart, whatever their files say. They
are found by a hash of 128 bits.

Nearly equal are two images of different splits whose grey thumbnails of 16 x 16 pixels correlate at least 0.999, and
whose thumbnails' second differences correlate at least 0.98 (normalised cross-correlation, Lewis 1995, "Fast Normalized
Cross-Correlation"). A photograph saved again as JPEG, scaled or brightened stays above both. Objects of one kind do not
reach them: no two of ELPV's 2,624 cells are nearly equal, and no two of the 1,797 digits, but a 64-bit difference
hash within 2 bits would call 1,025 and 2,779 pairs so. An image whose second differences deviate by less than 4 grey
levels is nearly equal to nothing: it is flat or a gradient, and all gradients correlate. Of images as tiny as the
digits little is found: scaled or saved again, they are no longer themselves.

Of a run the answer is kept in the cache. It costs one pass over the decoded pixels, 4 kB of memory an image, and a
product of the thumbnails of both sides.

A folder is inspected before there are splits (`inspect_images`). Every image is decoded once, JPEGs at a fraction of
their size unless their pixels are kept for training (`PixelStore`), and the answer is kept in the cache too; near
copies are also what a chain of such pairs links. Crops, mirrored images and frames of one film, see `copy_pairs`, are
linked too where they have one label. What no comparison of pixels shows, nobody sees here: photographs of one object
from another side.

Of more than 20,000 images not all are decoded: about as many are, in runs of neighbours by name, and what has no end.
Of all others heads are read and contents hashed, so that equal files are found among all, and near copies among those
that are decoded. A run then compares what it trains on with what tests it (`copy_warnings`).

Frames that differ more are known by their names: images of a folder whose names differ in their last number alone. If
half of these neighbours have the next one among the two that their thumbnails correlate with most, of all images, a
line says so (`neighbours_alike`). Of digits, solar cells and emoji, all of them or 300, 4 to 21 % do; of stamps fewer
than a tenth have such names. Of made-up clips, windows that move over four photographs by 2, 5 and 10 % of their side
from frame to frame, it is 100, 95 and 71 %; by 20 %, 33 %: these are not found. The rule was chosen on these same sets.
There is no such line where groups of copies join nine of ten of these neighbours.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from peft_vit.base.console import quoted
from peft_vit.base.errors import DataWarning, UserError, named
from peft_vit.base.files import read_bytes
from peft_vit.base.packages import cache_dir
from peft_vit.base.seeding import numpy_generator
from peft_vit.base.statistics.drawing import assign_folds, stratified_sample
from peft_vit.core.config import Interpolation, Resize
from peft_vit.core.tasks import DecidingMetric, Task
from peft_vit.core.tasks.classification import LARGEST_IMBALANCE
from peft_vit.core.training import fewest_groups
from peft_vit.data.copies import compared_thumbnail, copy_pairs, groups_of, with_first
from peft_vit.data.files import FileTree, cache_fault, existing, in_threads, raise_if_transient, read_once, remembered
from peft_vit.data.index import DIGEST_LETTERS, ImageIndex, ImagesFile, check_class_names, numbered
from peft_vit.data.pixels import (
    FORMAT_VERSION,
    REMEDY,
    Facts,
    cached_pixels,
    decode_image,
    decoders,
    facts_of_complete,
    formats,
    on_white,
    read_facts,
    resizing_key,
    split_pixels,
    to_pixels,
)
from peft_vit.data.sources.folders import IS_UNSURE, Images, find_images, groups_by_name, is_image, split_of
from peft_vit.data.splits import SIDES, Splits, class_gap, class_gaps, count_crossing, refuse_copies_across

_VERSION = 6  # raise when what counts as equal or nearly equal changes
_SIDE = 16  # pixels of a thumbnail
_MOST_BY_CHANCE = 0.1  # share of pairs that look like copies and are none, above which no pair counts
_LEAST_CORRELATION, _LEAST_DETAIL_CORRELATION, _LEAST_DETAIL = 0.999, 0.98, 4.0
_BLOCK, _BATCH = 4096, 64  # images


def image_warnings(index: ImageIndex, splits: Splits, image_size: int) -> tuple[str, ...]:
    """Return what to know of a run's images before believing its numbers, each in a line.

    Args:
        index: the data set.
        splits: of it.
        image_size: side S in pixels.

    Raises:
        UserError: if somebody's own images (a folder, a CSV) hold one image on two sides of the split; in published
            sets, whose splits are what others used too, it is reported.
    """
    lines = list(index.notes)
    if not index.inspected:  # else splits are along its groups
        lines += _of_copies(index, splits, image_size)
    return (*class_gaps(index, splits), *(DataWarning.PREFIX + line for line in lines))


def copy_warnings(index: ImageIndex, splits: Splits, image_size: int) -> Iterator[str]:
    """Yield what `image_warnings` leaves out of images of which not all were compared; these have to be decoded."""
    if index.sampled:
        yield from (DataWarning.PREFIX + line for line in _of_copies(index, splits, image_size))


def _of_copies(index: ImageIndex, splits: Splits, image_size: int) -> Iterator[str]:
    """Tell of copies left out, across and within splits, of two classes, and near ones; one line a kind."""
    rows = np.concatenate(splits.parts)
    sides = np.repeat(np.arange(3), [len(part) for part in splits.parts])
    equal, near = _compared(index, splits, rows, image_size)
    if index.own and not index.sampled:
        refuse_copies_across(index, equal, sides, rows)

    def such_as(a: int, b: int) -> str:
        first, second = (f"{index.title(int(rows[i]))} ({SIDES[sides[i]]})" for i in (a, b))
        return f"such as {first} and {second}"

    # Training could have had those if they were not in validation or test, see `make_splits`.
    left_out = np.isin(index.groups, index.groups[np.concatenate([splits.validation, splits.test])])
    left_out[rows] = False
    if index.official_test is not None:
        left_out &= ~index.official_test
    if left_out.any():
        first = index.title(int(np.argmax(left_out)))
        yield f"{left_out.sum()} files are left out as copies of validation or test images, such as {first}"
    count, pair = count_crossing(equal, sides)
    if count:
        yield f"{count} images are in two splits, {such_as(*pair)}; the splits stay as they are"
    for side, name in enumerate(SIDES):
        here = np.flatnonzero(sides == side)
        count, pair = count_crossing(equal[here], here)
        if count:
            a, b = (index.title(int(i)) for i in rows[here[list(pair)]])
            copies = len(here) - len(np.unique(equal[here]))
            yield f"{copies} of {len(here)} {name} images are copies of others there, such as {b} of {a}; each counts"
    group_of = np.full(index.groups.max() + 1, -1)
    group_of[index.groups[rows]] = equal
    groups = group_of[index.groups]  # a file in no split is not decoded, but may be a copy of one that is
    known = np.flatnonzero(groups >= 0)
    count, pair = count_crossing(groups[known], index.marks[known])
    if count:
        a, b = (f"{index.title(i)} ('{index.label(i)}')" for i in known[list(pair)].tolist())
        yield f"{count} images are of two classes, such as {a} and {b}; one of the labels is wrong"
    different = np.unique(equal, return_index=True)[1]
    count, pair = count_crossing(near[different], sides[different])
    if count:
        yield (
            f"{count} images nearly equal one of another split, {such_as(*different[list(pair)])}; if they show the "
            "same thing, accuracy is too high for new ones"
        )


# --- comparing --------------------------------------------------------------------------------------------------------


def _compared(index: ImageIndex, splits: Splits, rows: np.ndarray, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return groups of equal and of nearly equal images among `rows`, (N,) int64 each."""

    def compute() -> dict[str, Any]:
        parts = [split_pixels(index, own, splits.divided, image_size) for own in splits.parts]
        images = (pixels[place] for pixels, places in parts for place in places)
        number: dict[bytes, int] = {}
        digests = (hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images)
        equal = np.array([number.setdefault(digest, len(number)) for digest in digests], dtype=np.int64)
        thumbnails = np.concatenate([grey_thumbnails(pixels, places) for pixels, places in parts])  # (N, 256)
        return {"copies": equal, "groups": near_groups(thumbnails, start=len(splits.train))}

    pixels = f"{decoders()} {image_size} {index.channels}{resizing_key(index)}"

    def read(saved: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        return _numbers(saved["copies"], len(rows)), _numbers(saved["groups"], len(rows))

    key = f"{_VERSION} {FORMAT_VERSION} {pixels} {index.name} {index.sha256} {splits.sha256}"
    return remembered("duplicates", key, compute, read)


def _numbers(saved: Any, *shape: int) -> np.ndarray:
    return np.array(saved, dtype=np.int64).reshape(shape)


def near_groups(thumbnails: np.ndarray, start: int = 0) -> np.ndarray:
    """Group images that are nearly equal, or linked by a chain of such pairs; pairs are compared in blocks.

    Args:
        thumbnails: of `grey_thumbnails`, (N, 256).
        start: of the images before this one, none is compared with another one of them.

    Returns:
        Equal numbers for images of one group, (N,) int64.
    """
    count = len(thumbnails)
    groups = np.arange(count, dtype=np.int64)
    for first in range(start, count, _BLOCK):
        for other in range(0, min(first + _BLOCK, count), _BLOCK):
            alike = thumbnails[first : first + _BLOCK] @ thumbnails[other : other + _BLOCK].T >= _LEAST_CORRELATION
            candidates = np.argwhere(alike) + np.array([first, other])  # (M, 2)
            for cut in range(0, len(candidates), _BLOCK):
                pairs = candidates[cut : cut + _BLOCK]
                pairs = pairs[groups[pairs[:, 0]] != groups[pairs[:, 1]]]
                a, b = (_detail(thumbnails[pairs[:, side]]) for side in (0, 1))  # (M, 196) each
                norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
                pairs = pairs[(a * b).sum(1) >= _LEAST_DETAIL_CORRELATION * norms]
                if len(pairs):  # which are few sets' images: the libraries take memory in every worker
                    groups = groups_of(groups, pairs)
    return groups


def grey_thumbnails(pixels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return grey thumbnails (N, 256) float32 less their mean, of length 1; 0 where there is no detail.

    Args:
        pixels: (M, S, S, C), S at least 16.
        places: of the images in it, (N,).
    """
    grey = np.empty((len(places), _SIDE**2), np.float32)
    for start in range(0, len(places), _BATCH):
        images = torch.from_numpy(pixels[places[start : start + _BATCH]].astype(np.float32))  # (B, S, S, C)
        small = adaptive_avg_pool2d(images.mean(3)[:, None], _SIDE)  # (B, 1, S, S) -> (B, 1, 16, 16)
        grey[start : start + _BATCH] = small.flatten(1).numpy()
    plain = _detail(grey).std(1) < _LEAST_DETAIL
    grey -= grey.mean(1, keepdims=True)
    grey /= np.maximum(np.linalg.norm(grey, axis=1, keepdims=True), 1e-6)
    grey[plain] = 0
    return grey


def _detail(thumbnails: np.ndarray) -> np.ndarray:
    """Return the second differences of thumbnails, (N, 14 * 14) less their mean: the negative discrete Laplacian."""
    t = thumbnails.reshape(-1, _SIDE, _SIDE)  # (N, 256) -> (N, 16, 16)
    inner = 4 * t[:, 1:-1, 1:-1] - t[:, :-2, 1:-1] - t[:, 2:, 1:-1] - t[:, 1:-1, :-2] - t[:, 1:-1, 2:]
    flat: np.ndarray = inner.reshape(-1, (_SIDE - 2) ** 2)  # (N, 14, 14) -> (N, 196)
    return flat - flat.mean(1, keepdims=True)


# --- a folder ---------------------------------------------------------------------------------------------------------

# Of the different images, if the folder has no test split of its own.
_HOLDOUT_SHARE, _FEWEST_TEST, _MOST_TEST = 0.2, 2, 2000
_LEAST, _LEAST_BESIDE_HOLDOUT = 10, 8  # different images of a class, for training, validation and test
_ENOUGH, _COMPARED_SIDE = 256, 64  # pixels a side of a JPEG that is decoded, and of what is compared
_NAMED, _CLASSES_NAMED = 3, 12  # in a line
_LISTED = 30  # files, a line each
_MOST_COMPARED, _NEIGHBOURING = 20_000, 16  # images whose pixels are compared, and in turn by name
_LEAST_GROUPS = 3  # of a class, where images are to stay together: one tests


@dataclass(frozen=True)
class Inspection:
    """What a folder of images holds: N that can be used, of K classes, and what is left out.

    Attributes:
        images: where they are.
        class_names: K of them.
        names: of the files, relative to the folder, N of them, sorted.
        labels: class of each, (N,) int64, or as the images' task says.
        copies: equal numbers for exact copies, (N,) int64.
        groups: equal numbers for exact and near copies, (N,) int64.
        together: likewise for what stays on one side of every split: these, and what was said to.
        holdout: the folder's own test split, (N,) bool; None if it has none.
        sides: shorter and longer side of each, pixels, (N, 2) int64.
        left_out: why, by name, of what can't be read, is of two classes, or copies an image of the own test split.
        unreadable: those of them that are called as images are and can't be read.
        animated: names of those of several frames, of which the first one is taken.
        alike: names of neighbours that look as if they were frames of one clip, in pairs; see `neighbours_alike`.
        unlinked: how many crops, mirrored images and frames are in no group, since too few would be left of a class.
        compared: how many images near copies were looked for among; None: all.
    """

    images: Images
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    labels: np.ndarray
    copies: np.ndarray
    groups: np.ndarray
    together: np.ndarray
    holdout: np.ndarray | None
    sides: np.ndarray
    left_out: Mapping[str, str]
    animated: tuple[str, ...]
    alike: tuple[tuple[str, str], ...] = ()
    unlinked: int = 0
    compared: int | None = None

    @property
    def path(self) -> Path:
        """Return the folder, zip or table, as `data.path` names it."""
        return self.images.path

    @property
    def task(self) -> Task:
        """Return what is learned of the images."""
        return self.images.files.task

    @property
    def shorter_side(self) -> float:
        """Return the median of the shorter sides, in pixels."""
        return float(np.median(self.sides[:, 0]))

    @property
    def chosen_counts(self) -> np.ndarray:
        """Return the number of images of each class, (K,) int64, outside of the own test split: these alone choose."""
        labels = self.labels if self.holdout is None else self.labels[~self.holdout]
        return self.task.counts(labels, len(self.class_names))

    @property
    def metric(self) -> DecidingMetric:
        """Return what decides."""
        return self.task.deciding(self.chosen_counts)

    def lines(self, metric: DecidingMetric | None = None) -> list[str]:
        """Return what there is to know, each in a line.

        Args:
            metric: that was asked for; None: the classes say which one decides.
        """
        known = [*self._of_images(), *self._of_repeated()]
        if metric is not None:
            return [*known, f"metric: {metric.words}, as you asked"]
        if not self.metric.counts_images:  # how many are of a class does not matter to it
            return [*known, f"metric: {self.metric.words}"]
        counts = self.chosen_counts
        largest, smallest = (self.class_names[int(at)] for at in (counts.argmax(), counts.argmin()))
        why = f"class '{largest}' has {counts.max() / counts.min():.1f} times as many images as class '{smallest}'"
        if not self.metric.equal_classes:
            why = f"no class has more than {LARGEST_IMBALANCE:g} times as many images as another"
        return [*known, f"metric: {self.metric.words}, since {why}"]

    def _of_images(self) -> Iterator[str]:
        counts = self.task.counts(self.labels, len(self.class_names))  # (K,)
        fewest, most = counts.min(), counts.max()
        each = f"{most:,} of each" if fewest == most else f"{fewest:,} to {most:,} of each"
        if len(counts) <= _CLASSES_NAMED:
            each = ", ".join(f"{name} {count:,}" for name, count in zip(self.class_names, counts, strict=True))
        what = self.task.images_of(len(self.names), self.class_names)
        yield f"{what}: {each}" if self.task.weighs else what
        short, long = np.median(self.sides, axis=0).astype(int)
        smallest, largest = self.sides.min(), self.sides.max()
        between = "" if smallest == largest else f"; the shortest side has {smallest:,}, the longest {largest:,}"
        yield f"{short:,} x {long:,} pixels (median of the shorter and of the longer side){between}"
        if self.holdout is not None:
            yield f"{np.count_nonzero(self.holdout):,} of them are the folder's own test split, which is read once"
            if gap := class_gap("test", self.task, self.class_names, self.labels[self.holdout]):
                yield gap
            validate = np.array([split_of(name) == "val" for name in self.names])
            if count := np.count_nonzero(validate & ~self.holdout):
                yield f"{count:,} of its validation split join those to train, of which some validate"
        if self.left_out:
            alike: dict[str, list[str]] = {}
            for name, why in self.left_out.items():
                alike.setdefault(why if "pip install" in why else why.split("; ")[0], []).append(name)
            named = sorted(alike.items(), key=lambda reason: -len(reason[1]))[:_NAMED]
            unnamed = len(self.left_out) - sum(len(names) for _, names in named)
            parts = [f"{n[0]}{f' and {len(n) - 1:,} more' if n[1:] else ''} ({why})" for why, n in named]
            more = f" and {unnamed:,} more" if unnamed else ""
            yield f"{_files_are(self.left_out)} left out: {', '.join(parts)}{more}"

    def _of_repeated(self) -> Iterator[str]:
        written = {name.casefold(): name for name in self.class_names}
        for name in self.class_names:
            if (other := written[name.casefold()]) != name:
                yield f"classes '{name}' and '{other}' differ in capitals alone; if they are one, give it one name"
        if self.compared is not None:
            yield (
                f"near copies were looked for among {self.compared:,} images, equal files among all; a run compares "
                "what it trains on with what tests it"
            )
        if self.images.together is not None:
            yield f"{len(np.unique(self.together)):,} groups; each is on one side of every split"
        if self.animated:
            yield f"{_are(len(self.animated), 'image')} animated, such as {self.animated[0]}; the first frame is used"
        every = np.arange(len(self.names))
        for what, groups, within in (("equal", self.copies, every), ("nearly equal", self.groups, self.copies)):
            count = len(np.unique(within)) - len(np.unique(groups))
            if count:
                a, b = count_crossing(groups, within)[1]
                such_as = f"such as {self.names[a]} and {self.names[b]}"
                yield f"{_are(count, 'image')} {what} to others, {such_as}; they stay on one side of every split"
        across = self._across()
        if self.unlinked and across is None:  # else the last line says the same
            reason = "of a class, and nothing keeps them together; say what belongs together by --group"
            yield f"{_are(self.unlinked, 'image')} so much like others that hardly any different ones are left {reason}"
        count, pair = count_crossing(self.groups, self.task.label_ids(self.labels))
        if count:
            a_title, b_title = (f"{self.names[i]} ('{self.task.text(self.labels[i], self.class_names)}')" for i in pair)
            such_as = f"such as {a_title} and {b_title}"
            yield f"{_are(count, 'image')} nearly equal to one of another class, {such_as}; is one of the labels wrong?"
        if across is not None:
            yield (
                f"neighbours by name look alike, such as {' and '.join(across)}; if they show one thing, as frames of "
                "a clip do, accuracy is too high for new images unless they stay on one side of every split: "
                f"--group {self._group_of(*across)}"
            )

    def _across(self) -> tuple[str, str] | None:
        """Return names of neighbours that look alike and may be on two sides of a split; None: there are few."""
        place, across = {name: at for at, name in enumerate(self.names)}, []
        for pair in self.alike if self.images.together is None else ():
            at = [place[name] for name in pair if name in place]
            if len(set(self.groups[at])) == 2 and (self.holdout is None or self.holdout[at].sum() == 1):
                across.append(pair)
        return across[0] if len(across) > _NEIGHBOURS_SHARE * len(self.alike) else None

    def _group_of(self, name: str, other: str) -> str:
        """Return what --group takes to keep two images together, and leaves each class several groups."""
        match = _NUMBERED.fullmatch(name)
        assert match is not None
        start, sign = match[2], re.escape(match[3])
        of_names = f"(.+){sign}[0-9]+" if sign else "(.+?)[0-9]+[.]"
        for group in (*([of_names] if start else []), "folder"):
            with suppress(UserError):
                together = groups_by_name(self.names, group)
                numbers = numbered([together[name] for name in self.names])[1]
                members = (self.task.members(self.labels, k) for k in range(len(self.class_names)))
                several = all(len(np.unique(numbers[some])) >= _LEAST_GROUPS for some in members)
                if several and together[name] == together[other]:
                    return quoted(group)
        return "COLUMN, of a table that says what each image shows"


_NUMBERED = re.compile(r"((?:.*/)?)([^/]*?)([^0-9A-Za-z/]*)([0-9]+)[.][^./]*")  # folder, start, sign, number
# Pairs; of the images, and of pairs those on two sides; pairs that are looked at.
_LEAST_NEIGHBOURS, _NEIGHBOURS_SHARE, _MOST_NEIGHBOURS = 20, 0.1, 512


def neighbours_alike(names: Sequence[str], thumbnails: np.ndarray) -> list[tuple[str, str]]:
    """Return neighbours by name that are nearest each other, if at least half of all neighbours are; else none.

    Args:
        names: of N images, relative to the folder.
        thumbnails: of `grey_thumbnails`, (N, 256).
    """
    matches = ((_NUMBERED.fullmatch(name), at) for at, name in enumerate(names) if thumbnails[at].any())
    ordered = sorted((m[1], m[2] + m[3], int(m[4]), at) for m, at in matches if m is not None)
    pairs = [(a[3], b[3]) for a, b in pairwise(ordered) if a[:2] == b[:2]]
    if len(pairs) < max(_LEAST_NEIGHBOURS, _NEIGHBOURS_SHARE * len(names)):
        return []
    first, second = np.array(pairs[:: -(-len(pairs) // _MOST_NEIGHBOURS)]).T  # (M,) each
    with_all = thumbnails[first] @ thumbnails.T  # (M, N)
    with_all[np.arange(len(first)), first] = -1
    near = (with_all > with_all[np.arange(len(first)), second, None]).sum(1) < 2  # (M,)
    if 2 * near.sum() < len(near):
        return []
    return [(names[a], names[b]) for a, b in zip(first[near], second[near], strict=True)]


def listed(left_out: Mapping[str, str]) -> list[str]:
    """Return files with their reasons, a line each, or a line for several of a folder with the same reason."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, why in sorted(left_out.items()):
        alike.setdefault((name.rpartition("/")[0], why), []).append(name)
    lines = []
    for (folder, why), names in alike.items():
        several = [f"{folder or '.'}/ ({len(names):,} files)"]
        lines += [f"  {name}: {why}" for name in (names if len(names) <= _NAMED else several)]
    return lines if len(lines) <= _LISTED else [*lines[:_LISTED], f"  and {len(lines) - _LISTED:,} more"]


def _files_are(left_out: Mapping[str, str]) -> str:
    """Return how many they are in words; a folder's name ends with a slash."""
    return _are(len(left_out), "item" if any(name.endswith("/") for name in left_out) else "file")


def _are(count: int, what: str) -> str:
    return f"1 {what} is" if count == 1 else f"{count:,} {what}s are"


def links_of_one_label(links: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return those of the pairs (M, 2) whose images have one label; none where many pairs are alike by chance.

    Copies have one label; images that only look alike have two as often as chance gives two, 1 - sum of p squared. So
    the share of pairs with two labels over that is the share that only look alike. It is the mean over the images that
    have pairs, since two films that are alike have more pairs than each has. Of 446 pairs among 1,000 solar cells it is
    43 %, of 995 among the frames of 120 films (`benchmarks/copies.py`) 5 %, of those among stamps, emoji and
    Fashion-MNIST 0. The bound was chosen on these same sets.
    """
    is_one = labels[links[:, 0]] == labels[links[:, 1]]
    by_chance = 1 - float((np.bincount(np.unique(labels, return_inverse=True)[1]) ** 2).sum()) / len(labels) ** 2
    two, every = (np.bincount(some.ravel(), minlength=len(labels)) for some in (links[~is_one], links))  # (N,) each
    apart = (two / np.maximum(every, 1)).sum() > _MOST_BY_CHANCE * by_chance * np.count_nonzero(every)
    return links[:0] if apart and two.sum() > 2 else links[is_one]  # one pair of two labels: one of them is wrong


def inspect_images(
    path: str | Path | Images,
    *,
    least: int | None = None,
    strict: bool = False,
    store: PixelStore | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Decode every image of a folder once, or 20,000 of more, and say what is there.

    Args:
        path: a folder or a zip, a table, or what `find_images` returned of it.
        least: different images that each class has to have; None: as many as it takes to seal some.
        strict: refuse what would be left out.
        store: is given the pixels of every image that is decoded.
        on_progress: gets how many images are decoded, and of how many.

    Raises:
        UserError: if a file can't be read for a reason of this machine; if there is no image, fewer than two classes,
            too few different images of a class (with the number that would do), or a test split of other classes; if
            more than half of the images can't be used, or with `strict` one is to be left out, with the list.
    """
    images = path if isinstance(path, Images) else find_images(existing(str(path)))
    files, task = images.files, images.files.task
    class_names, labels = files.read()
    holdout = None if files.is_test is None else np.array(files.is_test, dtype=bool)
    with named(images.path):
        if len(class_names) < task.least_outputs:
            raise UserError(f"holds one class alone, '{class_names[0]}'; add images of another one")
        check_class_names(class_names, images.path)
        if least is None:
            least = _LEAST if holdout is None else _LEAST_BESIDE_HOLDOUT
        refuse_few = partial(_refuse_few, task, class_names, least)
        refuse_few(labels, np.arange(len(labels)), holdout)  # before anything is decoded
        names = np.array(list(files.classes), dtype=object)
        decoded = _decoded_once(images.tree, names.tolist(), store or PixelStore(()), on_progress)
        copies, groups, strata = decoded.copies, decoded.groups, task.strata(labels)
        marks, links = task.label_ids(labels), decoded.links
        links = links_of_one_label(links, marks) if task.one_class else links
        joined = groups_of(groups, links)
        tests = np.zeros(len(labels), dtype=bool) if holdout is None else holdout
        dev = (groups >= 0) & ~np.isin(joined, joined[tests])
        is_enough = fewest_groups(strata[dev], joined[dev]) >= max(least, _LEAST_GROUPS)
        unlinked = 0 if is_enough else len(np.unique(groups)) - len(np.unique(joined))
        groups = joined if is_enough else groups
        left_out = dict(images.left_out) | decoded.faults
        together = groups
        if images.together is not None:
            readable = np.flatnonzero(groups >= 0)
            keys = [images.together[name] for name in names[readable]]
            together = groups_of(groups, readable[with_first(keys)])
        what = "a copy of" if images.together is None else "in a group with"
        left_out |= _contradictions(names, marks, copies, together, holdout, what)
        for some in [] if holdout is None else _several(np.where(holdout, groups, -1)):
            left_out |= {
                names[i]: f"a copy of {names[some[0]]}, of the test split" for i in some[1:] if names[i] not in left_out
            }
        unsure = {name for name, why in images.left_out.items() if why == IS_UNSURE}
        if strict and left_out.keys() - unsure:
            them = "it" if len(left_out) == 1 else "them"
            message = f"{_files_are(left_out)} unusable; repair or remove {them}, or leave --strict out"
            raise UserError(message, field="--strict", details="\n".join(listed(left_out)))
        others = {name: why for name, why in images.left_out.items() if is_image(name) and name not in unsure}
        faults = decoded.faults | others
        count = len(names) + len(faults.keys() - decoded.faults.keys())
        if len(faults) > count / 2:
            remedy = "repair or replace them, or choose another folder"
            message = f"{len(faults):,} of {count:,} images can't be used; {remedy}"
            raise UserError(message, details="\n".join(listed(faults)))
        used = np.array([name not in left_out for name in names], dtype=bool)
        labels, groups, holdout = labels[used], groups[used], None if holdout is None else holdout[used]
        together = together[used]
        refuse_few(labels, groups, holdout)
        if images.together is not None:
            _refuse_few(task, class_names, _LEAST_GROUPS, labels, together, holdout, "group")
    return Inspection(
        images=images,
        class_names=class_names,
        names=tuple(names[used]),
        labels=labels,
        copies=copies[used],
        groups=groups,
        together=together,
        holdout=holdout,
        sides=decoded.sides[used],
        left_out=left_out,
        animated=decoded.animated,
        alike=decoded.alike,
        unlinked=unlinked,
        compared=decoded.compared,
    )


def images_file(
    inspection: Inspection,
    seed: int | None = 0,
    test_images: int | None = None,
    earlier: ImagesFile | None = None,
    *,
    starts: bool = False,
) -> dict[str, Any]:
    """Return what `data.images_file` holds, plain values: what is left out, copies, and what is set aside for the test.

    The test set is the folder's own test split, or else a fifth of the different images, at most 2,000, each class with
    its own, by `seed`: of a group of copies one, whose others are left out. Of what stays together all are tested.

    Args:
        inspection: the folder.
        seed: of this choice; None: only the folder's own test split is the test set.
        test_images: instead of a fifth.
        earlier: of the same images before some were added or removed; what tested there and is here tests again.
        starts: from the model that `earlier` trained: what tested there tests, and nothing else of it, nor a copy.

    Raises:
        UserError: if a file can't be read any more, or the images are too few for a test.
    """
    names = np.array(inspection.names, dtype=object)
    left_out = dict(inspection.left_out)
    holdout = inspection.holdout
    if holdout is None and seed is None:
        holdout = np.zeros(len(names), dtype=bool)
    elif holdout is not None and starts:
        assert earlier is not None
        trained = holdout & _split_before(inspection, earlier)[1]
        left_out |= dict.fromkeys(names[trained], "in the test split, and it or a copy has trained the earlier model")
        holdout = holdout & ~trained
    elif holdout is None:
        assert seed is not None
        first = _of_rarest(inspection.groups, inspection.task.strata(inspection.labels))
        fifth = max(len(inspection.class_names), min(round(_HOLDOUT_SHARE * len(first)), _MOST_TEST))
        count = test_images or fifth
        if count < _FEWEST_TEST:
            message = f"{len(first)} images are too few: a fifth of them tests, at least {_FEWEST_TEST}; give more"
            raise UserError(message, file=inspection.path)
        if count + len(inspection.class_names) > len(first):
            reason = f"{count} test images are too many: there are {len(first)} different images"
            raise UserError(f"{reason}; ask for fewer, or add images", file=inspection.path)
        if inspection.images.together is not None:
            strata = inspection.task.strata(inspection.labels)
            parts = min(max(2, round(len(first) / count)), fewest_groups(strata, inspection.together))
            part_of = assign_folds(strata, inspection.together, parts, numpy_generator(seed, "sealed"))

            def classes_of(part: int) -> int:
                """Return how many classes are tested, and how many others can be learned, in sum."""
                sides = (inspection.labels[part_of == part], inspection.labels[part_of != part])
                return sum(
                    int(np.count_nonzero(inspection.task.counts(of, len(inspection.class_names)))) for of in sides
                )

            holdout = part_of == max(range(parts), key=classes_of)  # groups of several classes may leave one out
        else:
            drawn = _drawn(inspection, first, count, numpy_generator(seed, "sealed"), earlier, starts)
            holdout = np.isin(np.arange(len(names)), drawn)
            of_group = dict(zip(inspection.groups[drawn].tolist(), names[drawn], strict=True))
            for i in np.flatnonzero(np.isin(inspection.groups, inspection.groups[drawn]) & ~holdout):
                left_out[names[i]] = f"a copy of {of_group[int(inspection.groups[i])]}, a test image"
    used = np.array([name not in left_out for name in inspection.names], dtype=bool)
    hashed = inspection.images.tree.hashed(names[used].tolist())
    content = ImagesFile(
        sha256=hashed.sha256,
        digests={name: hashed.each[name][:DIGEST_LETTERS] for name in names[used]},
        labels=tuple(inspection.images.files.classes[name] for name in names[used]),
        left_out=left_out,
        copies=tuple(tuple(names[used][some]) for some in _several(inspection.together[used])),
        sealed=tuple(names[holdout].tolist()),
        trained=tuple(sorted(earlier.learned_from)) if starts and earlier is not None else (),
        compared=inspection.compared,
    )
    return content.model_dump(mode="json")


def _of_rarest(groups: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Return the first image of each group (N,) that is of the rarest of its strata, sorted: that one may test."""
    _, which, counts = np.unique(strata, axis=0, return_inverse=True, return_counts=True)
    rarest_first = np.argsort(counts[which.reshape(-1)], kind="stable")
    return np.sort(rarest_first[np.unique(groups[rarest_first], return_index=True)[1]])


def _drawn(
    inspection: Inspection,
    first: np.ndarray,
    count: int,
    generator: np.random.Generator,
    earlier: ImagesFile | None,
    starts: bool,
) -> np.ndarray:
    """Return positions of test images: those that tested earlier, then a share of new ones, by content.

    Where these leave a class without, all are drawn anew; or none can be, see `images_file`.
    """
    groups, strata = inspection.groups, inspection.task.strata(inspection.labels)
    if earlier is not None:
        tested, trained = _split_before(inspection, earlier)
        tested = tested & ~trained if starts else tested
        kept = np.flatnonzero(tested)[np.unique(groups[tested], return_index=True)[1]]
        rest = first[~np.isin(groups[first], groups[kept])]
        new, more = rest[~trained[rest]], max(0, count - len(kept))
        more = min(more, len(new)) if starts else more
        added = stratified_sample(new if len(new) >= more else rest, strata, more, generator)
        drawn = np.sort(np.concatenate([kept, added]))
        counts = inspection.task.counts(inspection.labels[drawn], len(inspection.class_names))
        if counts.all():
            return drawn
        if starts:
            lacking = f"no image of class '{inspection.class_names[int(counts.argmin())]}' is left to test"
            reason = f"{lacking}: the others have trained the earlier model; add some, or leave out --from"
            raise UserError(reason, file=inspection.path)
    return stratified_sample(first, strata, count, generator)


def _split_before(inspection: Inspection, earlier: ImagesFile) -> tuple[np.ndarray, np.ndarray]:
    """Return which images tested earlier, by content, and which trained or validated, with their copies, (N,) bool."""
    hashed = inspection.images.tree.hashed(list(inspection.names)).each
    digests = [hashed[name][:DIGEST_LETTERS] for name in inspection.names]
    tested, trained = (np.isin(digests, list(some)) for some in (earlier.tested, earlier.learned_from))
    return tested, np.isin(inspection.groups, inspection.groups[trained])


# --- counting ---------------------------------------------------------------------------------------------------------


def _refuse_few(
    task: Task,
    class_names: Sequence[str],
    least: int,
    labels: np.ndarray,
    groups: np.ndarray,
    holdout: np.ndarray | None,
    what: str = "different image",
) -> None:
    """Raise UserError if a class has too few different images or groups, beside an own test split, or that has none."""
    chosen_on = np.ones(len(labels), dtype=bool) if holdout is None else ~holdout
    members = partial(task.members, labels)
    counts = np.array([len(np.unique(groups[chosen_on & members(k)])) for k in range(len(class_names))])
    scarce = int(counts.argmin())
    if counts[scarce] < least:
        few = np.count_nonzero(counts < least) - 1
        more = f"; {few} more class{'es have' if few > 1 else ' has'} too few" if few else ""
        beside = "" if holdout is None else " beside the test split"
        if what != "group" and np.count_nonzero(members(scarce)[chosen_on]) > counts[scarce]:
            beside += " (of copies, near ones too, one counts)"
        images = f"{counts[scarce]} {what}{'' if counts[scarce] == 1 else 's'}"
        trains = ", or take peft-vit train, which needs 2" if least > 2 <= counts[scarce] and what != "group" else ""
        raise UserError(
            f"class '{class_names[scarce]}' has {images} that can be used{beside}, and each class "
            f"needs {least}{more}; add images, or remove the class{trains}"
        )
    if holdout is not None and not holdout.any():
        raise UserError("no image is left in the test split; add some")


def _contradictions(
    names: np.ndarray,
    labels: np.ndarray,
    copies: np.ndarray,
    together: np.ndarray,
    holdout: np.ndarray | None,
    what: str,
) -> dict[str, str]:
    """Tell, by name, equal images of two classes, of which both can't be right, and what belongs to the test split."""
    why: dict[str, str] = {}
    for some in _several(copies):
        for i in some if len(np.unique(labels[some])) > 1 else ():
            other = next(k for k in some if labels[k] != labels[i])
            why[names[i]] = f"equal to {names[other]}, of another class"
    if holdout is not None:
        for some in _several(together):
            tested = [i for i in some if holdout[i] and names[i] not in why]
            for i in some if tested else ():
                if not holdout[i]:
                    why.setdefault(names[i], f"{what} {names[tested[0]]}, of the test split")
    return dict(sorted(why.items()))


def _several(groups: np.ndarray) -> list[list[int]]:
    """Return the members of every group that has several; what could not be read is in none, -1."""
    order = np.argsort(groups, kind="stable")
    order = order[groups[order] >= 0]
    cuts = np.flatnonzero(np.diff(groups[order])) + 1
    return [part.tolist() for part in np.split(order, cuts) if len(part) > 1]


# --- decoding ---------------------------------------------------------------------------------------------------------


class PixelStore:
    """Images as training takes them, (S, S, 3) at some sizes S, kept until it is known which of them train.

    Use as a context manager: what is not handed over to the cache of decoded images in it is gone.

    Args:
        sizes: sides in pixels; none: nothing is kept.
        interpolation: of resizing.
        resize: how images become square, see `to_pixels`.
    """

    def __init__(
        self, sizes: Sequence[int], interpolation: Interpolation = "bicubic", resize: Resize = "squash"
    ) -> None:
        self.sizes, self.interpolation, self.resize = tuple(sizes), interpolation, resize
        self._places: dict[str, int] = {}  # by name
        self._stack = ExitStack()
        self._files: dict[int, BinaryIO] = {}

    def __enter__(self) -> Self:
        for size in self.sizes:
            with cache_fault(cache_dir()):
                cache_dir().mkdir(parents=True, exist_ok=True)
                self._files[size] = self._stack.enter_context(TemporaryFile(dir=cache_dir()))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, name: str, pixels: Sequence[np.ndarray]) -> None:
        """Keep an image, at each of the sizes."""
        self._places[name] = len(self._places)
        for size, image in zip(self.sizes, pixels, strict=True):
            with cache_fault(cache_dir()):
                self._files[size].write(image.tobytes())

    def hand_over(self, index: ImageIndex, splits: Splits) -> None:
        """Put what a run trains, validates and tests on where `cached_pixels` finds it, at all sizes.

        Args:
            index: of images that were inspected.
            splits: of it.
        """
        assert index.names is not None
        if not set(index.names) <= self._places.keys():  # the inspection was in the cache: nothing was decoded
            return
        rows = [self._places[name] for name in index.names]
        for size, file in self._files.items():
            file.flush()
            shape = (len(self._places), size, size, 3)
            pixels = np.memmap(file, np.uint8, "r", shape=shape)
            for part in splits.parts if splits.divided is None else (splits.divided,):
                cached_pixels(index, part, size, [pixels[row] for row in rows])


class _Decoded(NamedTuple):
    """Of N files: equal numbers for exact copies (N,), for near ones too (N,), sides (N, 2), faults by name.

    And pairs (M, 2) of crops, mirrored images and frames, see `copy_pairs`; and among how many these were looked for,
    None: among all.

    Of a file that can't be read the numbers are -1.
    """

    copies: np.ndarray
    groups: np.ndarray
    sides: np.ndarray
    faults: dict[str, str]
    animated: tuple[str, ...]
    links: np.ndarray
    alike: tuple[tuple[str, str], ...]
    compared: int | None


class _One(NamedTuple):
    facts: Facts
    digest: bytes
    thumbnail: np.ndarray  # (32, 32, 3)
    pixels: list[np.ndarray]  # for the store


def _decoded_once(
    tree: FileTree, names: list[str], store: PixelStore, on_progress: Callable[[int, int], None] | None
) -> _Decoded:
    """Decode files, or find in the cache what it came to."""
    readers = (
        f"{_VERSION} {FORMAT_VERSION} {decoders()} {formats()} {bool(store.sizes)}"  # by which files can't be read, too
    )
    text = "\n".join([readers, tree.hashed(names).sha256, *names])
    count = len(names)

    def read(saved: dict[str, Any]) -> _Decoded:
        copies, groups = (_numbers(saved[name], count) for name in ("copies", "groups"))
        sides = _numbers(saved["sides"], count, 2)
        links = _numbers(saved["links"], -1, 2)
        alike = tuple((a, b) for a, b in saved["alike"])
        faults, animated, compared = dict(saved["faults"]), tuple(saved["animated"]), saved.get("compared")
        return _Decoded(copies, groups, sides, faults, animated, links, alike, compared)

    return remembered("inspected", text, lambda: _decoded(tree, names, store, on_progress)._asdict(), read)


def compared_rows(count: int) -> np.ndarray:
    """Return which of N images are compared by their pixels, (N,) bool: all, or runs of neighbours in their order."""
    runs, share = np.arange(count) // _NEIGHBOURING, min(1.0, _MOST_COMPARED / max(1, count))
    return np.floor((runs + 1) * share) > np.floor(runs * share)


def read_heads(tree: FileTree, names: Sequence[str]) -> dict[str, list[int]]:
    """Return the facts of a folder's files by their heads, without those that have to be decoded to be sure.

    Of a zip these are all.
    """
    if not tree.location.is_dir():
        return {}

    def head(place: Path) -> str:
        with suppress(Exception):  # who decodes it says why
            return " ".join(map(str, map(int, facts_of_complete(read_bytes(place)) or ())))
        return ""

    kind = f"heads-{hashlib.sha256(f'{decoders()} {formats()}'.encode()).hexdigest()[:16]}"
    known = read_once(kind, {name: tree.location / name for name in names}, head, r"[0-9]+ [0-9]+ [01]")
    return {name: [*map(int, text.split())] for name, text in known.items() if text}


def _decoded(
    tree: FileTree, names: list[str], store: PixelStore, on_progress: Callable[[int, int], None] | None
) -> _Decoded:
    is_compared, heads = compared_rows(len(names)), dict[str, list[int]]()
    if not (all_compared := bool(is_compared.all())):
        store, heads = PixelStore(()), read_heads(tree, names)
    to_decode = [at for at, name in enumerate(names) if is_compared[at] or name not in heads]
    faults: dict[str, str] = {}
    first: dict[bytes, int] = {}  # where the first one of images with the same pixels stands
    equal: list[tuple[int, int]] = []  # where two stand that have
    thumbnails: dict[int, np.ndarray] = {}  # of one of each, (32, 32, 3)
    with warnings.catch_warnings(action="ignore"):  # of Pillow's, see `decode_image`
        decoded = in_threads(lambda at: _decode(tree, names[at], store), to_decode)
        for done, (at, one) in enumerate(zip(to_decode, decoded, strict=True), start=1):
            if isinstance(one, str):
                faults[names[at]] = one.removesuffix(f"; {REMEDY}")
                heads.pop(names[at], None)
            else:
                heads[names[at]] = [*map(int, one.facts)]
                equal.append((first.setdefault(one.digest, at), at))
                if first[one.digest] == at and is_compared[at]:
                    thumbnails[at] = one.thumbnail
                store.add(names[at], one.pixels)
            if on_progress is not None:
                on_progress(done, len(to_decode))
    if not all_compared:
        contents, holder = tree.hashed(names).each, dict[str, int]()
        equal += [(holder.setdefault(contents[name], at), at) for at, name in enumerate(names) if name in heads]
    sides, links = np.zeros((len(names), 2), dtype=np.int64), np.empty((0, 2), np.int64)
    copies, groups = np.full((2, len(names)), -1, dtype=np.int64)
    read = np.array([at for at, name in enumerate(names) if name in heads], dtype=np.int64)
    alike: list[tuple[str, str]] = []
    if len(read):
        sides[read] = [heads[names[at]][:2] for at in read]
        sets = groups_of(np.arange(len(names)), _numbers(equal, -1, 2))[read]
        copies[read] = np.unique(sets, return_inverse=True)[1]
        where, colored = np.array([*thumbnails]), np.stack([*thumbnails.values()])  # (M,), (M, 32, 32, 3)
        grey = grey_thumbnails(colored, np.arange(len(where)))
        groups = groups_of(copies, where[with_first(near_groups(grey))])
        links = where[copy_pairs(colored)]
        row = np.full(copies.max() + 1, -1)  # of a set among the thumbnails
        row[copies[where]] = np.arange(len(where))
        shown = read[is_compared[read] & (row[copies[read]] >= 0)]
        alike = neighbours_alike([names[at] for at in shown], grey[row[copies[shown]]])
    animated = tuple(names[at] for at in read if heads[names[at]][2])
    compared = None if all_compared else int(is_compared.sum())
    return _Decoded(copies, groups, sides, faults, animated, links, tuple(alike), compared)


def _decode(tree: FileTree, name: str, store: PixelStore) -> _One | str:
    """Return what is needed of a file's pixels, or why it can't be read."""
    try:
        content = tree.read(name)
        enough = None if store.sizes else _ENOUGH
        image = on_white(decode_image(partial(bytes, content), name, enough=enough)).convert("RGB")
        facts = read_facts(content)
    except Exception as error:  # a foreign file or archive can fail in any way
        raise_if_transient(error, tree.file(name))
        return error.message if isinstance(error, UserError) else f"can't be read ({error})"
    mark = repr(((facts.short, facts.long), image.size)).encode()
    digest = hashlib.blake2b(mark + image.tobytes(), digest_size=16).digest()
    pixels = [to_pixels(image, size, 3, store.interpolation, store.resize) for size in store.sizes]
    thumbnail = compared_thumbnail(to_pixels(image, _COMPARED_SIDE, 3)).astype(np.float16)  # to the bit
    return _One(facts, digest, thumbnail, pixels)
