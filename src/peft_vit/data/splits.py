"""Disjoint, stratified splits that follow from the configuration, its split seed and, where it says so, the run's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peft_vit.base.console import some_of
from peft_vit.base.errors import DataWarning, UserError
from peft_vit.base.seeding import Purpose, numpy_generator
from peft_vit.base.statistics.drawing import assign_folds, stratified_sample
from peft_vit.core.config import DataConfig
from peft_vit.core.tasks import Task
from peft_vit.data.index import ImageIndex

SIDES = ("training", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """Sorted, disjoint indices into an `ImageIndex`, int64, and the hash of all three.

    `divided` are the indices that all seeds divide among the three, if seeds test different folds of the same images.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    sha256: str
    divided: np.ndarray | None = None

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the three, in the order of `SIDES`."""
        return self.train, self.validation, self.test


def make_splits(index: ImageIndex, config: DataConfig, seed: int) -> Splits:
    """Draw test, then validation, then training images, each stratified by `index.strata`.

    Test images come out of the data set's own test split, if it has one (all of it, unless `test_images` is
    set); what is left of that split is used for nothing. Files with equal content are one image: test and validation
    images are drawn from one of each, and its copies are left out of what training images are drawn from.

    Of the test images `tested_images` are drawn, if that is set; the others are used for nothing, and no split moves.

    Test and validation follow from `config.split_seed`, and with `test_split: per_seed` from `seed` too; they do not
    move when `train_images` does. Training images come out of what test and validation leave, so they move with these;
    with `train_subset: per_seed` their choice follows from `seed` in any case.

    With `folds`, what the own test split or `test_images` leave is divided into as many, see `assign_folds`: seed s
    tests on fold s % folds of repetition s // folds. A repetition's folds follow from `split_seed` and its number, and
    test each image once. Validation images are drawn from the rest by `seed`, and no copies are on two sides.

    Args:
        index: the data set.
        config: the sizes.
        seed: the run's seed.

    Raises:
        UserError: if there are too few images, a class gets no training image, per_seed would change nothing, or a file
            of somebody's own is on both sides of the own test split; names field and numbers, or both files.
    """
    everything = np.arange(len(index.labels), dtype=np.int64)
    if index.official_test is not None and index.own:
        refuse_copies_across(index, index.groups, np.where(index.official_test, 2, 0), everything)
    rng = _generator("split", config.split_seed, seed if config.tests_by_seed else None)
    if config.folds is None:
        test, rest = _draw_test(index, config, rng)
    else:
        divided = everything
        if index.official_test is not None or config.test_images is not None:
            divided = _draw_test(index, config, _generator("split", config.split_seed, None))[1]
        groups = index.groups[divided]
        _need("folds", config.folds, len(np.unique(groups)), "different images are there")
        repetition, fold = divmod(seed, config.folds)
        shuffle = numpy_generator(config.split_seed, "folds", repetition)
        fold_of = assign_folds(index.strata[divided], groups, config.folds, shuffle)
        test, rest = divided[fold_of == fold], divided[fold_of != fold]
    if config.tested_images is not None:
        _need("tested_images", config.tested_images, len(test), "test images are there")
        drawing = _generator("tested", config.split_seed, seed if config.tests_by_seed else None)
        test = stratified_sample(test, index.strata, config.tested_images, drawing)
    validated, trained = config.validation_images, 2 if config.train_images is None else config.train_images
    source = _one_of_each(index, rest)
    _need("validation_images", validated, len(source), "different images lie beside the test split")
    validation = stratified_sample(source, index.strata, validated, rng)
    pool = _without(index, rest, validation)
    _need("train_images", trained, len(pool), f"of {len(everything)} remain beside test, validation and copies of both")
    train = _draw_train(index, config, seed, pool)
    digest = hashlib.sha256()
    for part in (train, validation, test):
        digest.update(len(part).to_bytes(8, "little") + part.astype("<i8").tobytes())
    divided_by_seeds = None if config.folds is None else np.sort(np.concatenate([test, rest]))
    return Splits(train, validation, test, digest.hexdigest(), divided_by_seeds)


def _need(field: str, wanted: int, available: int, of_what: str) -> None:
    """Raise UserError if more images are wanted than there are."""
    if wanted > available:
        too_many = f"{wanted} {field.replace('_', ' ')} are too many: {max(available, 0)} {of_what}"
        raise UserError(f"{too_many}; ask for fewer, or add images", field=f"data.{field}")


def _generator(purpose: Purpose, split_seed: int, seed: int | None) -> np.random.Generator:
    """Return a generator that follows from the split seed alone, or from a run's seed too."""
    return numpy_generator(split_seed, purpose) if seed is None else numpy_generator(seed, purpose, split_seed)


def _draw_test(index: ImageIndex, config: DataConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return test images, and those that are neither tested nor copies of what is."""
    everything = np.arange(len(index.labels), dtype=np.int64)
    official = index.official_test
    if official is None and config.test_images is None:
        message = f"is missing; {index.name} has no test split of its own, say how many images"
        raise UserError(message, field="data.test_images")
    source = _one_of_each(index, everything) if official is None else everything[official]
    count = len(source) if config.test_images is None else config.test_images
    _need("test_images", count, len(source), "different images are available for test")
    if config.test_split == "per_seed" and official is not None and count == len(source):
        raise UserError(
            f"per_seed would test the same images with each seed, all {count} of the test split that comes with "
            f"{index.name}; set data.test_images below {count}, or say fixed",
            field="data.test_split",
        )
    test = stratified_sample(source, index.strata, count, rng)
    return test, _without(index, everything, test) if official is None else everything[~official]


def _one_of_each(index: ImageIndex, rows: np.ndarray) -> np.ndarray:
    """Return the rows whose file has no copy among those before them."""
    return rows[np.sort(np.unique(index.groups[rows], return_index=True)[1])]


def _without(index: ImageIndex, rows: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return the rows that are neither drawn nor copies of what is."""
    return rows[~np.isin(index.groups[rows], index.groups[drawn])]


def _draw_train(index: ImageIndex, config: DataConfig, seed: int, pool: np.ndarray) -> np.ndarray:
    """Return training images out of what remains beside test and validation, some of every class."""
    per_seed = config.train_subset == "per_seed"
    rng = _generator("train_subset", config.split_seed, seed if per_seed else None)
    remaining = index.class_counts(pool)  # (K,)
    if (shots := config.shots_per_class) is not None:
        index.task.need_one_class("data.shots_per_class", "give train_images, or none")
        scarce = int(np.argmin(remaining))
        of_class = f"images of class '{index.class_names[scarce]}' remain beside test and validation"
        _need("shots_per_class", shots, remaining[scarce], of_class)
        by_class = (pool[index.labels[pool] == label] for label in range(len(remaining)))
        return np.sort(np.concatenate([stratified_sample(rows, index.strata, shots, rng) for rows in by_class]))
    count = len(pool) if config.train_images is None else config.train_images
    if per_seed and count == len(pool):
        message = f"per_seed has no effect, all {len(pool)} images that remain are trained on"
        raise UserError(f"{message}; lower data.train_images or say fixed", field="data.train_subset")
    train = stratified_sample(pool, index.strata, count, rng)
    drawn = index.class_counts(train)  # (K,)
    if not drawn.all():
        missing = int(np.argmin(drawn))
        raise UserError(
            f"class '{index.class_names[missing]}' gets none of the {count} training images ({remaining[missing]} of "
            f"the {len(pool)} that remain beside test and validation are of this class); use more, or add images",
            field="data.train_images",
        )
    index.task.refuse_one_answer(index.class_names, index.labels[train], "training image")
    return train


def class_gaps(index: ImageIndex, splits: Splits) -> list[str]:
    """Return a warning for each split that lacks a class: balanced accuracy is then a mean over the others."""
    parts = {name: rows for name, rows in (("validation", splits.validation), ("test", splits.test)) if len(rows)}
    gaps = (class_gap(name, index.task, index.class_names, index.labels[rows]) for name, rows in parts.items())
    return [f"{DataWarning.PREFIX}{gap}" for gap in gaps if gap]


def class_gap(split: str, task: Task, class_names: Sequence[str], labels: np.ndarray) -> str:
    """Return which classes a split with these labels lacks, or ""."""
    counts = task.counts(labels, len(class_names))
    missing = [f"'{class_names[label]}'" for label in np.flatnonzero(counts == 0).tolist()]
    if not missing:
        return ""
    named = f"class{'es' if len(missing) > 1 else ''} {some_of(missing)}"
    return f"no {split} image is of {named}; {task.gap.format(split, np.count_nonzero(counts), len(counts))}"


def count_crossing(groups: np.ndarray, marks: np.ndarray) -> tuple[int, tuple[int, int]]:
    """Count groups whose members have different marks.

    Args:
        groups: of each image, (N,) integers; equal images are of one group.
        marks: of each image, (N,) integers: its side of a split, or its label.

    Returns:
        The number of groups, and the positions of two members with different marks, the lower first, or (0, 0).
    """
    order = np.lexsort((marks, groups))
    group, mark = groups[order], marks[order]
    differs = np.flatnonzero((group[1:] == group[:-1]) & (mark[1:] != mark[:-1]))
    if len(differs) == 0:
        return 0, (0, 0)
    low, high = sorted(order[differs[0] : differs[0] + 2].tolist())
    return len(np.unique(group[differs])), (low, high)


def refuse_copies_across(index: ImageIndex, groups: np.ndarray, sides: np.ndarray, rows: np.ndarray) -> None:
    """Raise UserError if equal images are on different sides.

    Args:
        index: the data set.
        groups: as in `count_crossing`.
        sides: positions in `SIDES`, (N,).
        rows: in the data set, (N,).
    """
    count, pair = count_crossing(groups, sides)
    if count:
        a, b = rows[list(pair)].tolist()
        among = f"; {count} images are on several sides like this one" if count > 1 else ""
        raise UserError(
            f"{index.title(a)} ({SIDES[sides[pair[0]]]}) and {index.title(b)} ({SIDES[sides[pair[1]]]}) are the "
            f"same image, which says nothing about new ones{among}; remove one of them",
            field="data.path",
        )
