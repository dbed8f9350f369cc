"""Stratified folds whose groups stay whole: copies of an image are never on two sides."""

from __future__ import annotations

import numpy as np


def deal_folds(strata: np.ndarray, groups: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Divide images into folds that are as equal as whole groups allow, in size and in each stratum.

    Stratum by stratum, groups are dealt in random order, larger ones first: each to the fold that has the fewest images
    of the stratum, of these to the one with the fewest images, ties by lot. So without copies a stratum's images in two
    folds differ by at most one, and so do the sizes of two folds. A group is of its first image's stratum.

    Args:
        strata: of each image, (N,) integers.
        groups: of each image, (N,) integers; images of equal numbers stay together.
        folds: how many, K.
        rng: generator.

    Returns:
        The fold of each image, (N,) int64 in [0, K).
    """
    names, first, group, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    stratum = strata[first]  # (G,) of the G groups, as names and sizes are; group is (N,) in [0, G)
    lot = rng.permutation(len(names))
    fold_of = np.empty(len(names), dtype=np.int64)
    total = [0] * folds
    for name in np.unique(stratum):
        here = np.flatnonzero(stratum == name)
        within, lots = [0] * folds, rng.permutation(folds).tolist()
        for one in here[np.lexsort((lot[here], -sizes[here]))].tolist():
            fold = min(range(folds), key=lambda k: (within[k], total[k], lots[k]))
            fold_of[one] = fold
            within[fold] += int(sizes[one])
            total[fold] += int(sizes[one])
    return fold_of[group]
