"""What is equal or nearly equal among the images of a run, once they are decoded.

Equal are images with the same pixels at the study's size: no model can tell them apart, whatever their files say. They
are found by a hash of 128 bits.

Nearly equal are two images of different splits whose grey thumbnails of 16 x 16 pixels correlate at least 0.999, and
whose thumbnails' second differences correlate at least 0.98 (normalised cross-correlation, Lewis 1995, "Fast Normalized
Cross-Correlation"). A photograph saved anew as JPEG, scaled or brightened stays above both. Objects of one kind do not
reach them: no two of ELPV's 2,624 cells are nearly equal, and no two of the 1,797 digits, whereas a 64-bit difference
hash within 2 bits would call 1,025 and 2,779 pairs so. An image whose second differences deviate by less than 4 grey
levels is nearly equal to nothing: it is flat or a gradient, and all gradients correlate. Of images as tiny as the
digits little is found: scaled or saved anew, they are no longer themselves.

The answer is kept in the cache. It costs one pass over the decoded pixels, 4 kB of memory an image, and a product of
the thumbnails of both sides.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL
import torch
from torch.nn.functional import adaptive_avg_pool2d

from peft_vit.data.files import cache_fault
from peft_vit.data.index import ImageIndex
from peft_vit.data.pixels import FORMAT_VERSION, how, split_pixels
from peft_vit.data.splits import SIDES, Splits, class_gaps, crossing, refuse_across
from peft_vit.errors import DataWarning
from peft_vit.packages import cache_dir
from peft_vit.records import write_atomically

_VERSION = 2  # raise when what counts as equal or nearly equal changes
_SIDE = 16  # pixels of a thumbnail
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
            sets, whose splits are what others used too, it is told.
    """
    lines = list(index.notes)
    if not index.looked_at:  # else splits are along its groups
        rows = np.concatenate(splits.parts)
        sides = np.repeat(np.arange(3), [len(part) for part in splits.parts])
        equal, near = _compared(index, splits, rows, image_size)
        if index.own:
            refuse_across(index, equal, sides, rows)
        lines += _of_copies(index, splits, rows, sides, equal, near)
    return (*class_gaps(index, splits), *(DataWarning.PREFIX + line for line in lines))


def _of_copies(
    index: ImageIndex, splits: Splits, rows: np.ndarray, sides: np.ndarray, equal: np.ndarray, near: np.ndarray
) -> Iterator[str]:
    """Tell of copies left out, across and within splits, of two classes, and near ones; one line a kind."""

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
    count, pair = crossing(equal, sides)
    if count:
        yield f"{count} images are in two splits, {such_as(*pair)}; the splits stay as they are"
    for side, name in enumerate(SIDES):
        here = np.flatnonzero(sides == side)
        count, pair = crossing(equal[here], here)
        if count:
            a, b = (index.title(int(i)) for i in rows[here[list(pair)]])
            copies = len(here) - len(np.unique(equal[here]))
            yield f"{copies} of {len(here)} {name} images are copies of others there, such as {b} of {a}; each counts"
    group_of = np.full(index.groups.max() + 1, -1)
    group_of[index.groups[rows]] = equal
    groups = group_of[index.groups]  # a file in no split is not decoded, but may be a copy of one that is
    known = np.flatnonzero(groups >= 0)
    count, pair = crossing(groups[known], index.labels[known])
    if count:
        a, b = (f"{index.title(i)} ('{index.class_names[index.labels[i]]}')" for i in known[list(pair)].tolist())
        yield f"{count} images are of two classes, such as {a} and {b}; one of the labels is wrong"
    if len(near):
        counts = [f"{n} {SIDES[side]}" for side in (1, 2) if (n := np.count_nonzero(sides[near[:, 0]] == side))]
        yield (
            f"{' and '.join(counts)} images nearly equal one of another split, {such_as(*near[0])}; if they show the "
            "same thing, accuracy is too high for new ones"
        )


# --- comparing --------------------------------------------------------------------------------------------------------


def _compared(index: ImageIndex, splits: Splits, rows: np.ndarray, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return groups of equal images (N,) and pairs of nearly equal ones (M, 2), both as positions in `rows`."""
    pixels = f"{FORMAT_VERSION} {PIL.__version__} {image_size} {index.channels}{how(index)}"
    text = f"{_VERSION} {pixels} {index.name} {index.sha256} {splits.sha256}"
    file = cache_dir() / "duplicates" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"
    kept = _kept(file, len(rows))
    if kept is None:
        parts = [split_pixels(index, own, splits.divided, image_size) for own in splits.parts]
        number: dict[bytes, int] = {}
        images = (pixels[place] for pixels, places in parts for place in places)
        digests = (hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images)
        equal = np.array([number.setdefault(digest, len(number)) for digest in digests], dtype=np.int64)
        kept = np.concatenate([equal, _near(parts, equal).ravel()])
        buffer = io.BytesIO()
        np.save(buffer, kept)
        with cache_fault(file):
            write_atomically(file, buffer.getvalue())
    return kept[: len(rows)], kept[len(rows) :].reshape(-1, 2)


def _kept(file: Path, count: int) -> np.ndarray | None:
    try:
        kept = np.load(file, allow_pickle=False)  # noqa: TID251 - numbers alone
    except Exception:  # whatever was in its place, it is not this package's file
        return None
    plausible = kept.dtype == np.int64 and kept.ndim == 1 and len(kept) >= count and (len(kept) - count) % 2 == 0
    return kept if plausible and np.all((kept >= 0) & (kept < count)) else None


def _near(parts: list[tuple[np.ndarray, np.ndarray]], equal: np.ndarray) -> np.ndarray:
    """Return for each validation and test image one of the splits before that is nearly equal and not equal, (M, 2).

    `parts` are the three of `split_pixels`.
    """
    thumbnails = np.concatenate([thumbnails_of(pixels, places) for pixels, places in parts])  # (N, 256)
    starts = np.cumsum([0, *(len(places) for _, places in parts)]).tolist()
    partner = np.full(len(thumbnails), -1)

    def is_new(pairs: np.ndarray) -> np.ndarray:
        return (partner[pairs[:, 0]] < 0) & (equal[pairs[:, 0]] != equal[pairs[:, 1]])

    for start, end in pairwise(starts[1:]):
        for pairs in _near_pairs(thumbnails, range(start, end), range(start), is_new):
            partner[pairs[:, 0]] = pairs[:, 1]
    found = np.flatnonzero(partner >= 0)
    return np.stack([found, partner[found]], axis=1)


def near_groups(thumbnails: np.ndarray) -> np.ndarray:
    """Group images that are nearly equal, or linked by a chain of such pairs; all pairs are compared, in blocks.

    Args:
        thumbnails: of `thumbnails_of`, (N, 256).

    Returns:
        Equal numbers for images of one group, (N,) int64.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(thumbnails)
    groups = np.arange(count, dtype=np.int64)

    def are_apart(pairs: np.ndarray) -> np.ndarray:
        return groups[pairs[:, 0]] != groups[pairs[:, 1]]

    for first in range(0, count, _BLOCK):
        rows = range(first, min(first + _BLOCK, count))
        for pairs in _near_pairs(thumbnails, rows, range(first, count), are_apart):
            links = coo_array((np.ones(len(pairs), dtype=bool), groups[pairs].T), shape=(count, count))
            groups = connected_components(links, directed=False)[1][groups].astype(np.int64)
    return groups


def _near_pairs(
    thumbnails: np.ndarray, rows: range, others: range, matters: Callable[[np.ndarray], np.ndarray]
) -> Iterator[np.ndarray]:
    """Yield pairs (M, 2) of nearly equal images, one of `rows` and one of `others`, of those that matter.

    `matters` is asked of pairs (M, 2) whose thumbnails correlate, before their details are compared; (M,) bool.
    """
    for first in range(rows.start, rows.stop, _BLOCK):
        for other in range(others.start, others.stop, _BLOCK):
            some = thumbnails[first : min(first + _BLOCK, rows.stop)]
            alike = some @ thumbnails[other : min(other + _BLOCK, others.stop)].T >= _LEAST_CORRELATION  # (some, other)
            found = np.argwhere(alike) + np.array([first, other])
            for start in range(0, len(found), _BLOCK):
                pairs = found[start : start + _BLOCK]
                pairs = pairs[matters(pairs)]
                a, b = (_detail(thumbnails[pairs[:, side]]) for side in (0, 1))  # (M, 196) each
                norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
                pairs = pairs[(a * b).sum(1) >= _LEAST_DETAIL_CORRELATION * norms]
                if len(pairs):
                    yield pairs


def thumbnails_of(pixels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return grey thumbnails (N, 256) float32 less their mean, of length 1; 0 where there is no detail.

    Args:
        pixels: (M, S, S, C) uint8, S at least 16.
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
