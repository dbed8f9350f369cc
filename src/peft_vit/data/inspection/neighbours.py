"""Neighbours by name that look alike, as frames of a clip do.

Frames that differ more than copies do are known by their names: images of a folder whose names differ in their last
number alone. If half of these neighbours have the next one among the two that their thumbnails correlate with most, of
all images, a line says so (`neighbours_alike`). Of digits, solar cells and emoji, all of them or 300, 4 to 21 % do; of
stamps fewer than a tenth have such names. Of made-up clips, windows that move over four photographs by 2, 5 and 10 % of
their side from frame to frame, it is 100, 95 and 71 %; by 20 %, 33 %: these are not found. The rule was chosen on these
same sets. There is no such line where groups of copies join nine of ten of these neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

NUMBERED = re.compile(r"((?:.*/)?)([^/]*?)([^0-9A-Za-z/]*)([0-9]+)[.][^./]*")  # folder, start, sign, number
# Pairs; of the images, and of pairs those on two sides; pairs that are looked at.
_LEAST_NEIGHBOURS, LEAST_SHARE, _MOST_NEIGHBOURS = 20, 0.1, 512


def neighbours_alike(names: Sequence[str], thumbnails: np.ndarray) -> list[tuple[str, str]]:
    """Return neighbours by name that are nearest each other, if at least half of all neighbours are; else none.

    Args:
        names: of N images, relative to the folder.
        thumbnails: of `grey_thumbnails`, (N, 256).
    """
    matches = ((NUMBERED.fullmatch(name), at) for at, name in enumerate(names) if thumbnails[at].any())
    ordered = sorted((m[1], m[2] + m[3], int(m[4]), at) for m, at in matches if m is not None)
    pairs = [(a[3], b[3]) for a, b in pairwise(ordered) if a[:2] == b[:2]]
    if len(pairs) < max(_LEAST_NEIGHBOURS, LEAST_SHARE * len(names)):
        return []
    first, second = np.array(pairs[:: -(-len(pairs) // _MOST_NEIGHBOURS)]).T  # (M,) each
    with_all = thumbnails[first] @ thumbnails.T  # (M, N)
    with_all[np.arange(len(first)), first] = -1
    near = (with_all > with_all[np.arange(len(first)), second, None]).sum(1) < 2  # (M,)
    if 2 * near.sum() < len(near):
        return []
    return [(names[a], names[b]) for a, b in zip(first[near], second[near], strict=True)]
