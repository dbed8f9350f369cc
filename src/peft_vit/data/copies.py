"""The same image on two sides of a split: found, refused in somebody's own images, and told in those of others."""

from __future__ import annotations

import numpy as np

from peft_vit.data.index import ImageIndex
from peft_vit.errors import UserError

SIDES = ("training", "validation", "test")


def crossing(groups: np.ndarray, marks: np.ndarray) -> tuple[int, tuple[int, int]]:
    """Count groups whose members bear different marks.

    Args:
        groups: of each image, (N,) integers; equal images are of one group.
        marks: of each image, (N,) integers: its side of a split, or its label.

    Returns:
        The number of groups, and the positions of two members with different marks, the lower first; (0, 0) if there
        is no such group.
    """
    order = np.lexsort((marks, groups))
    group, mark = groups[order], marks[order]
    differs = np.flatnonzero((group[1:] == group[:-1]) & (mark[1:] != mark[:-1]))
    if len(differs) == 0:
        return 0, (0, 0)
    low, high = sorted(order[differs[0] : differs[0] + 2].tolist())
    return len(np.unique(group[differs])), (low, high)


def refuse_across(index: ImageIndex, groups: np.ndarray, sides: np.ndarray, rows: np.ndarray | None = None) -> None:
    """Raise UserError if equal images stand on different sides.

    Args:
        index: the data set.
        groups: as in `crossing`.
        sides: positions in `SIDES`, (N,).
        rows: in the data set, (N,); None: these are all of it.
    """
    count, pair = crossing(groups, sides)
    if count:
        a, b = pair if rows is None else rows[list(pair)].tolist()
        among = f"; {count} images are on several sides like this one" if count > 1 else ""
        raise UserError(
            f"{index.title(a)} ({SIDES[sides[pair[0]]]}) and {index.title(b)} ({SIDES[sides[pair[1]]]}) are the same "
            f"image, which tells nothing about new ones{among}; remove one of them",
            field="data.path",
        )
