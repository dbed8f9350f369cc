"""What a folder of images holds, before there are splits: its classes, what is left out, and copies.

Near copies are also what a chain of such pairs links. Crops, mirrored images and frames of one film, see `copy_pairs`,
are linked too where they have one label. What no comparison of pixels shows, nobody sees here: photographs of one
object from another side. Of more than 20,000 images not all are compared; a run then compares what it trains on with
what tests it (`image_warnings`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from peft_vit.base.console import no_progress, quoted
from peft_vit.base.errors import UserError, named
from peft_vit.core.tasks import DecidingMetric, Task
from peft_vit.core.tasks.classification import LARGEST_IMBALANCE
from peft_vit.core.training import fewest_groups
from peft_vit.data.files import existing
from peft_vit.data.index import check_class_names
from peft_vit.data.inspection.copies import groups_of, several, with_first
from peft_vit.data.inspection.decoding import LEAST_SHARE, NUMBERED, PixelStore, decoded_once
from peft_vit.data.sources.folders import IS_UNSURE, Images, find_images, groups_by_name, is_image, split_of
from peft_vit.data.splits import class_gap, count_crossing

_MOST_BY_CHANCE = 0.1  # share of pairs that look like copies and are none, above which no pair counts
_LEAST, _LEAST_BESIDE_HOLDOUT = 10, 8  # different images of a class, for training, validation and test
_NAMED, _CLASSES_NAMED = 3, 12  # in a line
_LISTED = 30  # files, a line each
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
        tests: which are of the folder's own test split, (N,) bool.
        sides: shorter and longer side of each, pixels, (N, 2) int64.
        left_out: why, by name, of what can't be read, is of two classes, or copies an image of the own test split.
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
    tests: np.ndarray
    sides: np.ndarray
    left_out: Mapping[str, str]
    animated: Sequence[str]
    alike: Sequence[Sequence[str]] = ()
    unlinked: int = 0
    compared: int | None = None

    @property
    def path(self) -> Path:
        """Return the folder, zip or table, as `data.path` names it."""
        return self.images.path

    @property
    def task(self) -> Task:
        """Return what is learned of the images."""
        return self.images.task

    @property
    def holdout(self) -> np.ndarray | None:
        """Return which images are of the folder's own test split, (N,) bool; None if it has none."""
        return self.tests if self.images.tested else None

    @property
    def shorter_side(self) -> float:
        """Return the median of the shorter sides, in pixels."""
        return float(np.median(self.sides[:, 0]))

    @property
    def chosen_counts(self) -> np.ndarray:
        """Return the number of images of each class, (K,) int64, outside of the own test split: these alone choose."""
        return self.task.counts(self.labels[~self.tests], len(self.class_names))

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
            yield f"{np.count_nonzero(self.tests):,} of them are the folder's own test split, which is read once"
            if gap := class_gap("test", self.task, self.class_names, self.labels[self.tests]):
                yield gap
            validate = np.array([split_of(name) == "val" for name in self.names])
            if count := np.count_nonzero(validate & ~self.tests):
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

    def _across(self) -> Sequence[str] | None:
        """Return names of neighbours that look alike and may be on two sides of a split; None: there are few."""
        place, across = {name: at for at, name in enumerate(self.names)}, []
        for pair in self.alike if self.images.together is None else ():
            at = [place[name] for name in pair if name in place]
            if len(set(self.groups[at])) == 2 and (self.holdout is None or self.tests[at].sum() == 1):
                across.append(pair)
        return across[0] if len(across) > LEAST_SHARE * len(self.alike) else None

    def _group_of(self, name: str, other: str) -> str:
        """Return what --group takes to keep two images together, and leaves each class groups enough."""
        match = NUMBERED.fullmatch(name)
        assert match is not None
        start, sign = match[2], re.escape(match[3])
        of_names = f"(.+){sign}[0-9]+" if sign else "(.+?)[0-9]+[.]"
        for group in (*([of_names] if start else []), "folder"):
            with suppress(UserError):
                together = groups_by_name(self.names, group)
                of_each = np.array([together[name] for name in self.names])
                _refuse_few(self.images, self.class_names, _LEAST_GROUPS, self.labels, of_each, self.tests)
                if together[name] == together[other]:
                    return quoted(group)
        return "COLUMN, of a table that says what each image shows"


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
    on_progress: Callable[[int, int], None] = no_progress,
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
    task, tests = images.task, images.tests
    class_names, labels = images.read()
    with named(images.path):
        if len(class_names) < task.least_outputs:
            raise UserError(f"holds one class alone, '{class_names[0]}'; add images of another one")
        check_class_names(class_names, images.path)
        if least is None:
            least = _LEAST_BESIDE_HOLDOUT if images.tested else _LEAST
        refuse_few = partial(_refuse_few, images, class_names)
        refuse_few(least, labels, np.arange(len(labels)), tests)  # before anything is decoded
        names = np.array(list(images.classes), dtype=object)
        decoded = decoded_once(images.tree, names.tolist(), store or PixelStore(()), on_progress)
        marks, links, groups = task.label_ids(labels), decoded.links, decoded.groups
        links = links_of_one_label(links, marks) if task.one_class else links
        joined = groups_of(groups, links)
        strata, dev = task.strata(labels), (groups >= 0) & ~np.isin(joined, joined[tests])
        is_enough = fewest_groups(strata[dev], joined[dev]) >= max(least, _LEAST_GROUPS)
        unlinked = 0 if is_enough else len(np.unique(groups)) - len(np.unique(joined))
        groups = together = joined if is_enough else groups
        what = "a copy of"
        if images.together is not None:
            readable = np.flatnonzero(groups >= 0)
            with_key = readable[with_first([images.together[name] for name in names[readable]])]
            together, what = groups_of(groups, with_key), "in a group with"
        refused = _refused(names, marks, decoded.copies, together, tests, what)
        for first, *more in several(np.where(tests, groups, -1)):
            for i in more:
                refused.setdefault(names[i], f"a copy of {names[first]}, of the test split")
        left_out = images.left_out | decoded.faults | refused
        unsure = {name for name, why in images.left_out.items() if why == IS_UNSURE}
        if strict and left_out.keys() - unsure:
            them = "it" if len(left_out) == 1 else "them"
            message = f"{_files_are(left_out)} unusable; repair or remove {them}, or leave --strict out"
            raise UserError(message, field="--strict", details="\n".join(listed(left_out)))
        others = {name: why for name, why in images.left_out.items() if is_image(name) and name not in unsure}
        faults = decoded.faults | others
        count = len({*names, *faults})
        if len(faults) > count / 2:
            remedy = "repair or replace them, or choose another folder"
            message = f"{len(faults):,} of {count:,} images can't be used; {remedy}"
            raise UserError(message, details="\n".join(listed(faults)))
        used = np.array([name not in left_out for name in names], dtype=bool)
        labels, groups, together, tests = labels[used], groups[used], together[used], tests[used]
        refuse_few(least, labels, groups, tests)
        if images.together is not None:
            refuse_few(_LEAST_GROUPS, labels, together, tests, "group")
    return Inspection(
        images=images,
        class_names=class_names,
        names=tuple(names[used]),
        labels=labels,
        copies=decoded.copies[used],
        groups=groups,
        together=together,
        tests=tests,
        sides=decoded.sides[used],
        left_out=left_out,
        animated=decoded.animated,
        alike=decoded.alike,
        unlinked=unlinked,
        compared=decoded.compared,
    )


def _refuse_few(
    images: Images,
    class_names: Sequence[str],
    least: int,
    labels: np.ndarray,
    groups: np.ndarray,
    tests: np.ndarray,
    what: str = "different image",
) -> None:
    """Raise UserError if a class has too few different images or groups, beside an own test split, or that has none."""
    members = partial(images.task.members, labels[~tests])
    counts = np.array([len(np.unique(groups[~tests][members(k)])) for k in range(len(class_names))])
    scarce = int(counts.argmin())
    if counts[scarce] < least:
        few = np.count_nonzero(counts < least) - 1
        more = f"; {few} more class{'es have' if few > 1 else ' has'} too few" if few else ""
        beside = " beside the test split" if images.tested else ""
        if what != "group" and np.count_nonzero(members(scarce)) > counts[scarce]:
            beside += " (of copies, near ones too, one counts)"
        some = f"{counts[scarce]} {what}{'' if counts[scarce] == 1 else 's'}"
        trains = ", or take peft-vit train, which needs 2" if least > 2 <= counts[scarce] and what != "group" else ""
        raise UserError(
            f"class '{class_names[scarce]}' has {some} that can be used{beside}, and each class "
            f"needs {least}{more}; add images, or remove the class{trains}"
        )
    if images.tested and not tests.any():
        raise UserError("no image is left in the test split; add some")


def _refused(
    names: np.ndarray, labels: np.ndarray, copies: np.ndarray, together: np.ndarray, tests: np.ndarray, what: str
) -> dict[str, str]:
    """Tell, by name, equal images of two classes, of which both can't be right, and what belongs to the test split."""
    why: dict[str, str] = {}
    for some in several(copies):
        for i in some if len(np.unique(labels[some])) > 1 else ():
            other = next(k for k in some if labels[k] != labels[i])
            why[names[i]] = f"equal to {names[other]}, of another class"
    for some in several(together):
        tested = [i for i in some if tests[i] and names[i] not in why]
        for i in some if tested else ():
            if not tests[i]:
                why.setdefault(names[i], f"{what} {names[tested[0]]}, of the test split")
    return dict(sorted(why.items()))
