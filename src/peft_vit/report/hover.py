"""What a figure tells the page about itself: which artists belong together, and which value stands where.

A painter names its artists while it draws. Places are read off the finished layout, so the page can find the
value nearest to a pointer without knowing anything of how the figure was drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure, FigureBase
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from peft_vit.report.document import Point, Series

MARKERS = "os^DvPX<>ph*"  # of matplotlib
_GLYPHS = dict(zip(MARKERS, "●■▲◆▼✚✖◀▶⬟⬢★", strict=True)) | {"": "━"}
_POINTS_PER_INCH = 72.0


def coded(texts: Iterable[str]) -> dict[str, list[Any]]:
    """Return texts as indices into their distinct values, in order of appearance."""
    place: dict[str, int] = {}
    index = [place.setdefault(text, len(place)) for text in texts]
    return {"values": list(place), "index": index}


class HoverPoints:
    """Series and points of one figure, collected while it is painted.

    Attributes:
        declared: the series by name, in order.
        player: set by a painter whose heat maps can walk through steps.
    """

    def __init__(self) -> None:
        self.declared: dict[str, Series] = {}
        self._artists: list[int] = []  # how many each series has
        self._placed: list[tuple[int, Artist, Sequence[str]]] = []
        self.player: dict[str, Any] | None = None

    def series(self, name: str, color: str, marker: str = "s") -> None:
        """Declare what can be switched off; a name that stands already keeps its first look."""
        if name not in self.declared:
            self.declared[name] = Series(name, color, _GLYPHS[marker])
            self._artists.append(0)

    def add(self, name: str, artist: Artist, texts: Sequence[str] = ()) -> int:
        """Put an artist into a declared series, and return the index that its first point has.

        Args:
            name: of the series.
            artist: what is drawn.
            texts: what each of its points says: vertices of a line, or cells of a mesh by row. Empty: none is
                pointed at.
        """
        index = list(self.declared).index(name)
        artist.set_gid(f"series{index}-{self._artists[index]}")
        self._artists[index] += 1
        first = sum(len(said) for _, _, said in self._placed)
        if texts:
            self._placed.append((index, artist, texts))
        return first

    def plot(self, name: str, axes: Axes, x: ArrayLike, y: ArrayLike, texts: Sequence[str] = (), **look: Any) -> Line2D:
        """Draw a line or markers into a declared series; arguments as those of `add` and of `Axes.plot`."""
        (line,) = axes.plot(x, y, **look)
        self.add(name, line, texts)
        return line

    def claim_legends(self, figure: Figure) -> None:
        """Let the entries of legends go and come with their series."""
        for legend in _legends(figure):
            for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
                if text.get_text() in self.declared and handle is not None:
                    self.add(text.get_text(), handle)
                    self.add(text.get_text(), text)

    def points(self, figure: Figure) -> tuple[Point, ...]:
        """Return what can be pointed at, once the figure is laid out."""
        scale, height = _POINTS_PER_INCH / figure.dpi, _POINTS_PER_INCH * figure.get_figheight()
        return tuple(
            Point(index, round(float(x), 1), round(float(height - y), 1), text)
            for index, artist, texts in self._placed
            for (x, y), text in zip(scale * _places(artist), texts, strict=True)
        )


def _places(artist: Artist) -> np.ndarray:
    """Return where the points of an artist are: (points, 2) from the lower left corner."""
    if isinstance(artist, Line2D):
        return np.asarray(artist.get_transform().transform(artist.get_xydata()))
    assert isinstance(artist, QuadMesh)
    assert artist.axes is not None
    corners = np.asarray(artist.get_coordinates())  # (rows + 1, columns + 1, 2)
    centers = (corners[:-1, :-1] + corners[1:, 1:]) / 2
    return np.asarray(artist.axes.transData.transform(centers.reshape(-1, 2)))


def _legends(figure: Figure) -> Iterator[Legend]:
    """Yield the legends of a figure, of its subfigures and of all axes."""
    waiting: list[FigureBase] = [figure]
    while waiting:
        part = waiting.pop(0)
        yield from part.legends
        waiting += part.subfigs
    yield from (legend for legend in (axes.get_legend() for axes in figure.axes) if legend is not None)
