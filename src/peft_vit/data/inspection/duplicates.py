"""Copies among the images of a run: what is equal or nearly equal.

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
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from peft_vit.base.errors import DataWarning
from peft_vit.data.files import remembered
from peft_vit.data.index import ImageIndex
from peft_vit.data.inspection.copies import groups_of
from peft_vit.data.pixels import pixels_key, split_pixels
from peft_vit.data.splits import SIDES, Splits, class_gaps, count_crossing, refuse_copies_across

VERSION = 6  # raise when what counts as equal or nearly equal changes
_SIDE = 16  # pixels of a thumbnail
_LEAST_CORRELATION, _LEAST_DETAIL_CORRELATION, _LEAST_DETAIL = 0.999, 0.98, 4.0
_BLOCK, _BATCH = 4096, 64  # images


def image_warnings(index: ImageIndex, splits: Splits, image_size: int, *, decodes: bool = False) -> tuple[str, ...]:
    """Return what to know of a run's images before believing its numbers, each in a line.

    Args:
        index: the data set.
        splits: of it.
        image_size: side S in pixels.
        decodes: also compare images of which not all were compared when they were inspected; these have to be decoded.

    Raises:
        UserError: if somebody's own images (a folder, a CSV) hold one image on two sides of the split; in published
            sets, whose splits are what others used too, it is reported.
    """
    lines = list(index.notes)
    if not index.inspected or (index.sampled and decodes):  # else splits are along its groups
        lines += _of_copies(index, splits, image_size)
    return (*class_gaps(index, splits), *(DataWarning.PREFIX + line for line in lines))


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
    count, pair = count_crossing(groups[known], index.task.label_ids(index.labels)[known])
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


def _compared(index: ImageIndex, splits: Splits, rows: np.ndarray, image_size: int) -> np.ndarray:
    """Return groups of equal and of nearly equal images among `rows`, (2, N) int64."""

    def compute() -> dict[str, Any]:
        parts = [split_pixels(index, own, splits.divided, image_size) for own in splits.parts]
        images = (pixels[place] for pixels, places in parts for place in places)
        number: dict[bytes, int] = {}
        digests = (hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images)
        equal = np.array([number.setdefault(digest, len(number)) for digest in digests], dtype=np.int64)
        thumbnails = np.concatenate([grey_thumbnails(pixels, places) for pixels, places in parts])  # (N, 256)
        return {"copies": equal, "groups": near_groups(thumbnails, start=len(splits.train))}

    def read(saved: dict[str, Any]) -> np.ndarray:
        return np.array([saved["copies"], saved["groups"]], dtype=np.int64).reshape(2, len(rows))

    key = f"{VERSION} {pixels_key(index, image_size)} {index.name} {index.sha256} {splits.sha256}"
    return remembered("duplicates", key, compute, read)


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
