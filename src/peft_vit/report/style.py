"""One look for all figures, the same bytes from the same data, and no global state of matplotlib.

Colors are Okabe and Ito's and four more, told apart with each of the three color-vision deficiencies. Ink, grid and
paper are exact hex values, so that the HTML page can exchange them for its own and follow a dark theme.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D

from peft_vit.config import METHOD_KINDS
from peft_vit.report.document import Drawing, Raw
from peft_vit.report.hover import HoverPoints

INK, MUTED, GRID, PAPER = "#1b1f24", "#5b6671", "#d8dee4", "#ffffff"
# The colors that a figure shares with the page follow the page's theme.
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}
METHOD_COLORS = {method.name: method.color for method in METHOD_KINDS.values()}
METHOD_TITLES = {method.name: method.title for method in METHOD_KINDS.values()}
SEQUENTIAL = "viridis"  # perceptually uniform, readable in grey and under color-vision deficiencies
DASHED = (0, (4, 3))
# Within one diagram only few lines need telling apart: Okabe and Ito's colors without yellow, which is faint on paper.
LINE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
WIDTH_IN = 7.2
PNG_DPI = 160

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


Painter = Callable[[Figure], HoverPoints]


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
        paint: draws into an empty figure, and returns what can be pointed at and switched off.
        data: the rows behind it, in full precision.
        narrow_height_in: height in one column of a paper; none: as high as on the page.
    """
    with matplotlib.rc_context(STYLE):
        figure, hover = laid_out(WIDTH_IN, height_in, paint)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return Drawing(
        slug=slug,
        title=title,
        caption=caption,
        svg=svg.getvalue(),
        png=png.getvalue(),
        series=tuple(hover.declared.values()),
        points=hover.points(figure),
        data=tuple(data),
        player=hover.player,
        height_in=height_in,
        narrow_height_in=narrow_height_in or height_in,
        paint=paint,
    )


def laid_out(width_in: float, height_in: float, paint: Painter) -> tuple[Figure, HoverPoints]:
    """Paint a figure and lay it out once; every file then takes that layout. The style must be set."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    hover = paint(figure)
    hover.claim_legends(figure)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    return figure, hover


def is_narrow(figure: FigureBase) -> bool:
    """Return whether a figure is one column of a paper wide, so that legends go below the data."""
    return bool(figure.get_figure(root=True).get_figwidth() < 5.0)


def line_look(index: int) -> dict[str, Any]:
    """Return color and dashes of a diagram's line; all lines differ up to 24."""
    turn, place = divmod(index, len(LINE_COLORS))
    return {"color": LINE_COLORS[place], "ls": _DASHES[turn % len(_DASHES)]}


def place_legend(figure: Figure, handles: list[Line2D]) -> None:
    """Put a legend of experiments at the right, or below where there is no room at the right."""
    if not is_narrow(figure):
        figure.legend(handles=handles, loc="outside right upper", handletextpad=0.3, labelspacing=0.55)
        return
    columns = 1 if max(len(str(handle.get_label())) for handle in handles) > 26 else 2
    spacing = {"handletextpad": 0.3, "labelspacing": 0.3, "columnspacing": 1.0}
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, **spacing)


def quiet_grid(axes: Axes, axis: str = "both") -> None:
    """Put a light grid behind the data."""
    axes.grid(True, axis=axis)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
