"""One way to draw a figure: its look, what the page knows of it, and its files for page and paper.

A painter draws into a `Canvas` and names its artists while it does. Places are read off the finished layout, so the
page can find the value nearest to a pointer without knowing anything of how the figure was drawn. The same data give
the same bytes, and matplotlib's global state stays as it is.

Colors are Okabe and Ito's and four more, distinguished with each of the three color-vision deficiencies. Ink, grid and
paper are exact hex values, so that the HTML page can exchange them for its own and follow a dark theme.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from peft_vit.core.config import METHOD_KINDS
from peft_vit.deploy.page.document import Drawing, Point, Raw, Series

T = TypeVar("T")
INK, MUTED, GRID, PAPER = "#1b1f24", "#5b6671", "#d8dee4", "#ffffff"
# The colors that a figure shares with the page follow the page's theme.
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}
METHOD_COLORS = {method.name: method.color for method in METHOD_KINDS.values()}
SEQUENTIAL = "viridis"  # perceptually uniform, readable in grey and under color-vision deficiencies
DASHED = (0, (4, 3))
# Within one diagram only few lines need telling apart: Okabe and Ito's colors without yellow, which is faint on paper.
LINE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
MARKERS = "os^DvPX<>ph*"  # of matplotlib
_GLYPHS = dict(zip(MARKERS, "●■▲◆▼✚✖◀▶⬟⬢★", strict=True)) | {"": "━"}

WIDTH_IN, PNG_DPI = 7.2, 160  # on the page
WIDTHS_IN: dict[str, float] = {"one": 3.5, "two": 7.2}  # of a paper, by its columns
PAGE_HEIGHT_IN, DPI = 9.7, 300
_POINTS_PER_INCH = 72.0
_FORMATS: dict[str, dict[str, Any]] = {  # nothing in a file tells when or by what it was written
    "pdf": {"metadata": {"CreationDate": None, "Creator": None, "Producer": None}},
    "svg": {"metadata": {"Date": None, "Creator": None}},
    "png": {"metadata": {"Software": None}},
}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same everywhere
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: searchable, selectable, small
    "svg.hashsalt": "peft-vit",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "path.simplify": True,
}
# In a paper fonts travel with the files: SVG holds outlines of the glyphs, PDF TrueType (journals refuse Type 3).
_PAPER: dict[Any, Any] = STYLE | {"svg.fonttype": "path", "pdf.fonttype": 42, "pdf.compression": 6}
_SMALL: dict[Any, Any] = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.handlelength": 1.4,
}


class Canvas:
    """A figure while it is painted, and what the page knows of it: which artists belong together, what is where.

    Attributes:
        figure: empty, laid out after painting.
        narrow: whether it is one column of a paper wide, so that legends go below the data.
        declared: the series by name, in order.
    """

    def __init__(self, width_in: float, height_in: float) -> None:
        self.figure = Figure(figsize=(width_in, height_in), layout="constrained")
        self.narrow = width_in < 5.0
        self.declared: dict[str, Series] = {}
        self._added: list[tuple[int, Artist, Sequence[str]]] = []  # series, artist, texts

    def series(self, name: str, color: str, marker: str = "s") -> None:
        """Declare what can be switched off; a name that stands already keeps its first look."""
        self.declared.setdefault(name, Series(name, color, _GLYPHS[marker]))

    def add(self, name: str, artist: Artist, texts: Sequence[str] = ()) -> None:
        """Put an artist into a declared series.

        Args:
            name: of the series.
            artist: what is drawn.
            texts: what each of its points says: vertices of a line, or cells of a mesh by row. Empty: none is
                pointed at.
        """
        index = list(self.declared).index(name)
        artist.set_gid(f"series{index}-{sum(series == index for series, _, _ in self._added)}")
        self._added.append((index, artist, texts))

    def plot(
        self, name: str, axes: Axes, x: ArrayLike, y: ArrayLike, texts: Sequence[str] = (), **style: Any
    ) -> Line2D:
        """Draw a line or markers into a declared series; arguments as those of `add` and of `Axes.plot`."""
        (line,) = axes.plot(x, y, **style)
        self.add(name, line, texts)
        return line

    def legend(self, handles: Sequence[Line2D | Patch], columns: tuple[int, int], **spacing: float) -> None:
        """Put a legend below the data, in so many columns: in a narrow figure, and in a wide one."""
        ncols = columns[0] if self.narrow else columns[1]
        self.figure.legend(handles=handles, loc="outside lower center", ncols=ncols, **spacing)

    def name_experiments(self, handles: Sequence[Line2D]) -> None:
        """Put a legend of experiments at the right, or below where there is no room at the right."""
        if self.narrow:
            columns = 1 if max(len(str(handle.get_label())) for handle in handles) > 26 else 2
            self.legend(handles, (columns, columns), handletextpad=0.3, labelspacing=0.3, columnspacing=1.0)
        else:
            self.figure.legend(handles=handles, loc="outside right upper", handletextpad=0.3, labelspacing=0.55)

    def finish(self) -> None:
        """Let the entries of legends go and come with their series, and lay the figure out once, for every file."""
        for legend in self.figure.findobj(Legend):
            for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
                if text.get_text() in self.declared and handle is not None:
                    self.add(text.get_text(), handle)
                    self.add(text.get_text(), text)
        engine = self.figure.get_layout_engine()
        assert engine is not None
        engine.execute(self.figure)
        self.figure.set_layout_engine("none")

    def points(self) -> tuple[Point, ...]:
        """Return what can be pointed at, once the figure is laid out."""
        scale, height = _POINTS_PER_INCH / self.figure.dpi, _POINTS_PER_INCH * self.figure.get_figheight()
        return tuple(
            Point(index, round(float(x), 1), round(float(height - y), 1), text)
            for index, artist, texts in self._added
            if texts
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


Painter = Callable[[Canvas], None]


def draw(
    slug: str,
    title: str,
    caption: str,
    height_in: float,
    paint: Painter,
    data: Sequence[dict[str, Raw]],
    narrow_height_in: float | None = None,
) -> Drawing:
    """Draw one figure and return it as SVG and PNG, with what the page needs to answer a pointer.

    Args:
        slug: name for files and anchors.
        title: shown above the figure in the report, not in it.
        caption: how to read it.
        height_in: height in inches; the width is the same for all.
        paint: draws into an empty figure, and says what can be pointed at and switched off.
        data: the rows behind it, in full precision.
        narrow_height_in: height in one column of a paper; none: as high as on the page.
    """
    with matplotlib.rc_context(STYLE):
        canvas = painted(WIDTH_IN, height_in, paint)
        return Drawing(
            slug=slug,
            title=title,
            caption=caption,
            svg=_saved(canvas, "svg").decode(),
            png=_saved(canvas, "png", dpi=PNG_DPI),
            series=tuple(canvas.declared.values()),
            points=canvas.points(),
            data=tuple(data),
            height_in=height_in,
            narrow_height_in=narrow_height_in or height_in,
            paint=paint,
        )


def painted(width_in: float, height_in: float, paint: Painter) -> Canvas:
    """Paint a figure and lay it out. The style must be set."""
    canvas = Canvas(width_in, height_in)
    paint(canvas)
    canvas.finish()
    return canvas


def _saved(canvas: Canvas, ending: str, **options: Any) -> bytes:
    content = io.BytesIO()
    canvas.figure.savefig(content, format=ending, **_FORMATS[ending], **options)
    return content.getvalue()


def publication_style(columns: str) -> dict[Any, Any]:
    """Return matplotlib's settings for a width of WIDTHS_IN."""
    return _PAPER | (_SMALL if columns == "one" else {})


def publication_files(drawing: Drawing) -> Iterator[tuple[str, bytes]]:
    """Draw a figure again at the widths of a paper, as PDF, SVG and PNG.

    Yields:
        The end of the file's name, such as ``_one_column.pdf``, and its content.
    """
    for columns, width_in in WIDTHS_IN.items():
        with matplotlib.rc_context(publication_style(columns)):
            height_in = drawing.narrow_height_in if columns == "one" else drawing.height_in
            canvas = painted(width_in, height_in, drawing.paint)
            for ending in _FORMATS:
                options = {"dpi": DPI} if ending == "png" else {}
                yield f"_{columns}_column.{ending}", _saved(canvas, ending, **options)


def line_style(index: int) -> dict[str, Any]:
    """Return color and dashes of a diagram's line; all lines differ up to 24."""
    turn, place = divmod(index, len(LINE_COLORS))
    return {"color": LINE_COLORS[place], "ls": _DASHES[turn % len(_DASHES)]}


def quiet_grid(axes: Axes, axis: str = "both") -> None:
    """Put a light grid behind the data."""
    axes.grid(True, axis=axis)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def leading(
    items: Sequence[T],
    validation: Mapping[str, float],
    limit: int,
    name: Callable[[T], str] = attrgetter("experiment.name"),
) -> tuple[list[T], str]:
    """Return the `limit` best on validation in their order, and a sentence for the caption; all, and "" if no more.

    Nothing is left out in silence: the data below the figure or the tables have all. Validation chooses, never test.

    Args:
        items: in the order of the figure.
        validation: experiment -> mean validation accuracy; an experiment without one comes last.
        limit: how many at most.
        name: of an item's experiment.
    """
    names = [name(item) for item in items]
    best = sorted(range(len(names)), key=lambda i: (-validation.get(names[i], float("-inf")), names[i], i))
    note = f" Drawn are the {limit} of {len(items)} experiments with the highest mean accuracy on validation."
    return [items[i] for i in sorted(best[:limit])], note if limit < len(items) else ""
