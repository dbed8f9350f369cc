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
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL
import torch
from torch.nn.functional import adaptive_avg_pool2d

from peft_vit.data.files import write_to_cache
from peft_vit.data.index import ImageIndex
from peft_vit.data.pixels import FORMAT_VERSION, how, split_pixels
from peft_vit.data.splits import SIDES, Splits, class_gaps, crossing, refuse_across
from peft_vit.errors import DataWarning
from peft_vit.packages import cache_dir

_VERSION = 1  # raise when what counts as equal or nearly equal changes
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
    if index.looked_at:  # splits are along its groups
        notes = tuple(DataWarning.PREFIX + note for note in index.notes)
        return (*class_gaps(index, splits), *notes)
    rows = np.concatenate(splits.parts)
    sides = np.repeat(np.arange(3), [len(part) for part in splits.parts])
    equal, near = _compared(index, splits, rows, image_size)
    if index.own:
        refuse_across(index, equal, sides, rows)
    lines = [*_left_out(index, splits, rows), *_same(index, rows, sides, equal), *_labels(index, rows, equal)]
    if len(near):
        counts = [f"{n} {SIDES[side]}" for side in (1, 2) if (n := np.count_nonzero(sides[near[:, 0]] == side))]
        a, b = near[0]
        lines.append(
            f"{' and '.join(counts)} images nearly equal one of another split, such as "
            f"{_titled(index, rows[a], sides[a])} and {_titled(index, rows[b], sides[b])}; if they show the same "
            "thing, accuracy is too high for new ones"
        )
    return (*class_gaps(index, splits), *(DataWarning.PREFIX + line for line in (*index.notes, *lines)))


def _titled(index: ImageIndex, row: int, side: int) -> str:
    return f"{index.title(int(row))} ({SIDES[side]})"


def _left_out(index: ImageIndex, splits: Splits, rows: np.ndarray) -> list[str]:
    """Tell of copies that training could have had if they were not in validation or test, see `make_splits`."""
    tested = np.concatenate([splits.validation, splits.test])
    copies = np.isin(index.groups, index.groups[tested])
    copies[rows] = False
    if index.official_test is not None:
        copies &= ~index.official_test
    if not copies.any():
        return []
    such_as = index.title(int(np.argmax(copies)))
    return [f"{np.count_nonzero(copies)} files are left out as copies of validation or test images, such as {such_as}"]


def _same(index: ImageIndex, rows: np.ndarray, sides: np.ndarray, equal: np.ndarray) -> list[str]:
    lines = []
    count, (a, b) = crossing(equal, sides)
    if count:
        lines.append(
            f"{count} images are in two splits, such as {_titled(index, rows[a], sides[a])} and "
            f"{_titled(index, rows[b], sides[b])}; the splits stay as they are"
        )
    for side, name in enumerate(SIDES):
        here = np.flatnonzero(sides == side)
        count, (a, b) = crossing(equal[here], here)
        if count:
            a, b = rows[here[[a, b]]].tolist()
            extra = len(here) - len(np.unique(equal[here]))
            lines.append(
                f"{extra} of {len(here)} {name} images are copies of others there, such as {index.title(b)} of "
                f"{index.title(a)}; each counts"
            )
    return lines


def _labels(index: ImageIndex, rows: np.ndarray, equal: np.ndarray) -> list[str]:
    """Tell of an image under two classes, be one of its files in no split."""
    group_of = np.full(index.groups.max() + 1, -1)
    group_of[index.groups[rows]] = equal
    groups = group_of[index.groups]  # a file in no split is not decoded, but may be a copy of one that is
    known = np.flatnonzero(groups >= 0)
    count, pair = crossing(groups[known], index.labels[known])
    if not count:
        return []
    a, b = (f"{index.title(i)} ('{index.class_names[index.labels[i]]}')" for i in known[list(pair)].tolist())
    return [f"{count} images are of two classes, such as {a} and {b}; one of the labels is wrong"]


# --- comparing ------------------------------------------------------------------------------------------------------


def _compared(index: ImageIndex, splits: Splits, rows: np.ndarray, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return groups of equal images (N,) and pairs of nearly equal ones (M, 2), both as positions in `rows`."""
    pixels = f"{FORMAT_VERSION} {PIL.__version__} {image_size} {index.channels}{how(index)}"
    text = f"{_VERSION} {pixels} {index.name} {index.sha256} {splits.sha256}"
    file = cache_dir() / "duplicates" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"
    found = _kept(file, len(rows))
    if found is None:
        parts = [split_pixels(index, own, splits.divided, image_size) for own in splits.parts]
        number: dict[bytes, int] = {}
        images = (pixels[place] for pixels, places in parts for place in places)
        digests = (hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images)
        equal = np.array([number.setdefault(digest, len(number)) for digest in digests], dtype=np.int64)
        near = _near(parts, equal)
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate([equal, near.ravel()]))
        write_to_cache(file, buffer.getvalue())
        return equal, near
    return found[: len(rows)], found[len(rows) :].reshape(-1, 2)


def _kept(file: Path, count: int) -> np.ndarray | None:
    try:
        found = np.load(file, allow_pickle=False)  # noqa: TID251 - numbers alone
    except Exception:  # whatever was in its place, it is not this package's file
        return None
    plausible = found.dtype == np.int64 and found.ndim == 1 and len(found) >= count and (len(found) - count) % 2 == 0
    return found if plausible and np.all((found >= 0) & (found < count)) else None


def _near(parts: list[tuple[np.ndarray, np.ndarray]], equal: np.ndarray) -> np.ndarray:
    """Return for each validation and test image its nearest one of the splits before, if that is near and not equal.

    `parts` are the three of `split_pixels`.
    """
    thumbnails = np.concatenate([thumbnails_of(pixels, places) for pixels, places in parts])  # (N, 256)
    starts = np.cumsum([0, *(len(places) for _, places in parts)])
    pairs = []
    for start, end in pairwise(starts[1:]):
        for first in range(start, end, _BLOCK):
            own = np.arange(first, min(first + _BLOCK, end))
            best, nearest = np.full(len(own), -1.0, dtype=np.float32), np.zeros(len(own), dtype=np.int64)
            for other in range(0, start, _BLOCK):
                found = thumbnails[own] @ thumbnails[other : min(other + _BLOCK, start)].T  # (own, other)
                place = found.argmax(1)
                value = found[np.arange(len(own)), place]
                nearest = np.where(value > best, other + place, nearest)
                best = np.maximum(best, value)
            own, nearest = own[best >= _LEAST_CORRELATION], nearest[best >= _LEAST_CORRELATION]
            alike = _details_agree(thumbnails[own], thumbnails[nearest])
            pairs.append(np.stack([own, nearest], 1)[alike & (equal[own] != equal[nearest])])
    return np.concatenate(pairs).astype(np.int64)


def near_groups(thumbnails: np.ndarray) -> np.ndarray:
    """Group images that are nearly equal, or linked by a chain of such pairs; all pairs are compared, in blocks.

    Args:
        thumbnails: of `thumbnails_of`, (N, 256).

    Returns:
        Equal numbers for images of one group, (N,) int64.
    """
    count = len(thumbnails)
    groups = np.arange(count, dtype=np.int64)
    for first in range(0, count, _BLOCK):
        for other in range(first, count, _BLOCK):
            found = thumbnails[first : first + _BLOCK] @ thumbnails[other : other + _BLOCK].T
            a, b = np.nonzero(found >= _LEAST_CORRELATION)
            pairs = np.stack([a + first, b + other], 1)
            pairs = pairs[pairs[:, 0] < pairs[:, 1]]
            for start in range(0, len(pairs), _BLOCK):
                some = pairs[start : start + _BLOCK]
                some = some[groups[some[:, 0]] != groups[some[:, 1]]]
                groups = joined(groups, some[_details_agree(thumbnails[some[:, 0]], thumbnails[some[:, 1]])])
    return groups


def joined(groups: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return groups (N,) int64 with those of each pair (M, 2) made one, numbered from 0."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return groups
    size = int(groups.max()) + 1
    links = coo_array((np.ones(len(pairs), dtype=bool), (groups[pairs[:, 0]], groups[pairs[:, 1]])), shape=(size, size))
    return connected_components(links, directed=False)[1][groups].astype(np.int64)


def _details_agree(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return whether the second differences of thumbnails correlate, pair by pair, (N, 256) twice to (N,) bool."""
    a, b = _detail(a), _detail(b)  # (N, 196) each
    return (a * b).sum(1) >= _LEAST_DETAIL_CORRELATION * np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)


def thumbnails_of(pixels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return grey thumbnails (N, 256) float32 less their mean, of length 1; 0 where there is no detail.

    Args:
        pixels: (M, S, S, C) uint8, S at least 16.
        places: of the images in it, (N,).
    """
    small = []
    for start in range(0, len(places), _BATCH):
        images = torch.from_numpy(pixels[places[start : start + _BATCH]].astype(np.float32))  # (B, S, S, C)
        grey_images = images.mean(3)[:, None]  # (B, 1, S, S)
        small.append(adaptive_avg_pool2d(grey_images, _SIDE).flatten(1).numpy())  # (B, 1, 16, 16) -> (B, 256)
    grey = np.concatenate([np.empty((0, _SIDE**2), np.float32), *small])
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
