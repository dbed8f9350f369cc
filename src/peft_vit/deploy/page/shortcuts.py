"""Whether a model looks at the same corner, or at the edge, of the images of a class: there lies a mark or a frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FEWEST, _CORNER, _EDGE = 4, 0.6, 0.9  # maps, and the share of them that is too many
_CHANCE = 0.01  # of all maps on the edge, which of few patches is most, if any patch were as likely


def shortcut(maps: Sequence[NDArray[np.floating[Any]]]) -> str:
    """Return where the largest value of too many maps, (side, side) each, lies: in a corner, on the edge; "": nowhere.

    A corner is a quarter of the side wide and high, and the edge one cell wide.
    """
    if len(maps) < _FEWEST:
        return ""
    side = len(maps[0])
    width = max(1, round(side / 4))
    rows, columns = np.array([divmod(int(one.argmax()), side) for one in maps]).T  # (N,) each
    for vertical, in_rows in (("upper", rows < width), ("lower", rows >= side - width)):
        for horizontal, in_columns in (("left", columns < width), ("right", columns >= side - width)):
            if (in_rows & in_columns).mean() >= _CORNER:
                return f"it looks at the {vertical} {horizontal} corner"
    on_edge = np.isin(rows, (0, side - 1)) | np.isin(columns, (0, side - 1))
    is_chance = (4 * (side - 1) / side**2) ** len(maps) > _CHANCE
    return "it looks at the edge" if on_edge.mean() >= _EDGE and not is_chance else ""
