"""Which images of a folder are set aside for the test, as a file that studies name."""

from __future__ import annotations

from typing import Any

import numpy as np

from peft_vit.base.errors import UserError
from peft_vit.base.seeding import numpy_generator
from peft_vit.base.statistics.drawing import assign_folds, stratified_sample
from peft_vit.core.training import fewest_groups
from peft_vit.data.index import DIGEST_LETTERS, ImagesFile
from peft_vit.data.inspection.copies import several
from peft_vit.data.inspection.inspect import Inspection

# Of the different images, if the folder has no test split of its own.
_HOLDOUT_SHARE, _FEWEST_TEST, _MOST_TEST = 0.2, 2, 2000


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
    names, groups = np.array(inspection.names, dtype=object), inspection.groups
    left_out, holdout = dict(inspection.left_out), inspection.holdout
    if holdout is not None and starts:
        assert earlier is not None
        trained = holdout & _split_before(inspection, earlier)[1]
        left_out |= dict.fromkeys(names[trained], "in the test split, and it or a copy has trained the earlier model")
        holdout = holdout & ~trained
    elif holdout is None and seed is not None:
        first = _of_rarest(groups, inspection.task.strata(inspection.labels))
        count = _test_size(inspection, len(first), test_images)
        generator = numpy_generator(seed, "sealed")
        if inspection.images.together is not None:
            holdout = _whole_groups(inspection, round(len(first) / count), generator)
        else:
            drawn = _drawn(inspection, first, count, generator, earlier, starts)
            holdout = np.isin(np.arange(len(names)), drawn)
            of_group = dict(zip(groups[drawn].tolist(), names[drawn], strict=True))
            for i in np.flatnonzero(np.isin(groups, groups[drawn]) & ~holdout):
                left_out[names[i]] = f"a copy of {of_group[int(groups[i])]}, a test image"
    used = np.array([name not in left_out for name in inspection.names], dtype=bool)
    hashed = inspection.images.tree.hashed(names[used].tolist())
    content = ImagesFile(
        sha256=hashed.sha256,
        digests={name: hashed.each[name][:DIGEST_LETTERS] for name in names[used]},
        labels=tuple(inspection.images.classes[name] for name in names[used]),
        left_out=left_out,
        copies=tuple(tuple(names[used][some]) for some in several(inspection.together[used])),
        sealed=() if holdout is None else tuple(names[holdout].tolist()),
        trained=tuple(sorted(earlier.learned_from)) if starts and earlier is not None else (),
        compared=inspection.compared,
    )
    return content.model_dump(mode="json")


def _test_size(inspection: Inspection, different: int, asked: int | None) -> int:
    """Return how many of so many different images test: as many as were asked for, or a fifth."""
    classes = len(inspection.class_names)
    count = asked or max(classes, min(round(_HOLDOUT_SHARE * different), _MOST_TEST))
    if count < _FEWEST_TEST:
        message = f"{different} images are too few: a fifth of them tests, at least {_FEWEST_TEST}; give more"
        raise UserError(message, file=inspection.path)
    if count + classes > different:
        reason = f"{count} test images are too many: there are {different} different images"
        raise UserError(f"{reason}; ask for fewer, or add images", file=inspection.path)
    return count


def _whole_groups(inspection: Inspection, parts: int, generator: np.random.Generator) -> np.ndarray:
    """Return which images test, (N,) bool: the one of some parts, of whole groups, that leaves out fewest classes."""
    labels, strata = inspection.labels, inspection.task.strata(inspection.labels)
    parts = min(max(2, parts), fewest_groups(strata, inspection.together))
    part_of = assign_folds(strata, inspection.together, parts, generator)

    def classes_of(part: int) -> int:
        """Return how many classes are tested, and how many others can be learned, in sum."""
        sides = (labels[part_of == part], labels[part_of != part])
        return sum(int(np.count_nonzero(inspection.task.counts(of, len(inspection.class_names)))) for of in sides)

    chosen: np.ndarray = part_of == max(range(parts), key=classes_of)
    return chosen


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
