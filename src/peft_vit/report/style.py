"""One look for all figures, the same bytes from the same data, and no global state of matplotlib.

Colors are Okabe and Ito's and Tol's wine, distinguishable under the common color-vision deficiencies. Ink, grid
and paper are exact hex values, so that the HTML page can exchange them for its own and follow a dark theme.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peft_vit.config import Method
from peft_vit.report.document import Drawing

INK, MUTED, GRID, PAPER = "#1b1f24", "#5b6671", "#d8dee4", "#ffffff"
METHOD_COLORS: dict[Method, str] = {
    "linear": "#7a828a",
    "full": "#cc79a7",
    "lora": "#0072b2",
    "peft_lora": "#56b4e9",
    "adalora": "#d55e00",
    "peft_adalora": "#e69f00",
    "qa_lora": "#009e73",
    "qa_adalora": "#882255",
}
METHOD_TITLES: dict[Method, str] = {
    "linear": "Linear probe",
    "full": "Full fine-tuning",
    "lora": "LoRA, fixed rank",
    "peft_lora": "LoRA by PEFT",
    "adalora": "AdaLoRA",
    "peft_adalora": "AdaLoRA by PEFT",
    "qa_lora": "QA-LoRA",
    "qa_adalora": "AdaLoRA + QA-LoRA",
}
SEQUENTIAL = "viridis"  # perceptually uniform, readable in grey and under color-vision deficiencies
WIDTH_IN = 7.2
PNG_DPI = 160

_STYLE: dict[Any, Any] = {
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


def draw(slug: str, title: str, caption: str, height_in: float, paint: Callable[[Figure], None]) -> Drawing:
    """Draw one figure and return it as SVG and PNG.

    Args:
        slug: name for files and anchors.
        title: shown above the figure in the report, not in it.
        caption: how to read it.
        height_in: height in inches; the width is the same for all.
        paint: draws into an empty figure.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        paint(figure)
        figure.draw_without_rendering()  # lays out once; both files then take that layout
        figure.set_layout_engine("none")
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return Drawing(slug, title, caption, svg.getvalue(), png.getvalue())


def quiet_grid(axes: Axes, axis: str = "both") -> None:
    """Put a light grid behind the data."""
    axes.grid(True, axis=axis)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
