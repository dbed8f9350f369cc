"""Dividing images into folds and drawing some of them, each stratum with its share and groups undivided."""

from __future__ import annotations

import numpy as np


def assign_folds(strata: np.ndarray, groups: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Divide images into folds that are as equal as whole groups allow, in size and in each stratum.

    Stratum by stratum, groups are dealt in random order, larger ones first: each to the fold that has the fewest images
    of the stratum, of these to the one with the fewest images, ties by lot. So without copies a stratum's images in two
    folds differ by at most one, and so do the sizes of two folds. A group is of its first image's stratum.

    Where images are of several strata, groups are dealt by `_iterative_stratification`.

    Args:
        strata: of each image, (N,) integers, or which it is of, (N, S) bool.
        groups: of each image, (N,) integers; images of equal numbers stay together.
        folds: how many, K.
        rng: generator.

    Returns:
        The fold of each image, (N,) int64 in [0, K).
    """
    names, first, group, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    if strata.ndim > 1:
        return _iterative_stratification(strata[first], sizes, np.full(folds, len(group) / folds), rng)[group]
    stratum = strata[first]  # (G,) of the G groups, as names and sizes are; group is (N,) in [0, G)
    lot = rng.permutation(len(names))
    fold_of = np.empty(len(names), dtype=np.int64)
    total = [0] * folds
    for name in np.unique(stratum):
        here = np.flatnonzero(stratum == name)
        within, lots = [0] * folds, rng.permutation(folds).tolist()
        for place in here[np.lexsort((lot[here], -sizes[here]))].tolist():
            fold = min(range(folds), key=lambda k: (within[k], total[k], lots[k]))
            fold_of[place] = fold
            within[fold] += int(sizes[place])
            total[fold] += int(sizes[place])
    return fold_of[group]


def stratified_sample(available: np.ndarray, strata: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` indices so that each stratum has its share, by the method of largest remainders.

    A stratum with n_s of the N available indices gets floor(count n_s / N); what is missing to `count` goes,
    one each, to the strata with the largest remainders, ties by lot (Hamilton's method). Within a stratum
    every index is as likely as any other.

    Args:
        available: distinct indices, (N,).
        strata: stratum of every index of the data set, or which it is of, (M, S) bool: see `_iterative_stratification`.
        count: how many to draw, at most N.
        rng: generator.

    Returns:
        Sorted indices, (count,) int64.
    """
    if strata.ndim > 1:
        whole, each = np.array([count, len(available) - count]), np.ones(len(available), dtype=np.int64)
        return np.sort(available[_iterative_stratification(strata[available], each, whole, rng) == 0]).astype(np.int64)
    names, sizes = np.unique(strata[available], return_counts=True)
    shares, remainders = np.divmod(count * sizes, max(1, len(available)))  # integers: no rounding
    lot = rng.permutation(len(names))
    for position in np.lexsort((lot, -remainders))[: count - shares.sum()]:
        shares[position] += 1
    drawn = [
        rng.permutation(available[strata[available] == name])[:share] for name, share in zip(names, shares, strict=True)
    ]
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *drawn])).astype(np.int64)


def _iterative_stratification(
    members: np.ndarray, sizes: np.ndarray, wanted: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Divide groups of images into parts, each stratum in shares as of all images: iterative stratification.

    The stratum with the fewest groups left comes next: each of its groups goes to the part that wants most of the
    stratum, of these to the one that wants most images, ties by lot. A part that is full takes no more, so that sizes
    are exact where groups are single images. Source: Sechidis, Tsoumakas and Vlahavas, ECML PKDD 2011.

    Args:
        members: which strata a group is of, (G, S) bool.
        sizes: images in each, (G,).
        wanted: images in each of P parts; they add up to all.
        rng: generator.

    Returns:
        The part of each group, (G,) int64.
    """
    part_of = np.full(len(members), -1, dtype=np.int64)
    room = wanted.astype(float)  # (P,)
    of_strata = np.outer(room / max(1, sizes.sum()), sizes @ members)  # (P, S) images that are wanted
    order = rng.permutation(len(members))

    def deal(group: int, want: np.ndarray) -> None:
        open_ = np.where(room > 0, want, -np.inf) if (room > 0).any() else want
        part = int(np.lexsort((rng.random(len(room)), room, open_))[-1])
        part_of[group] = part
        room[part] -= sizes[group]
        of_strata[part, members[group]] -= sizes[group]

    while (left := members[part_of < 0].sum(0)).any():  # (S,)
        stratum = int(np.where(left > 0, left, len(members) + 1).argmin())
        for group in order[(part_of[order] < 0) & members[order, stratum]]:
            deal(int(group), of_strata[:, stratum])
    for group in order[part_of[order] < 0]:
        deal(int(group), room)
    return part_of
