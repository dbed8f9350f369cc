"""Paired differences with their intervals, one row an experiment: a forest plot for each reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.patches import Patch

from peft_vit.analysis import Analysis, Comparison
from peft_vit.report.document import Drawing, Raw
from peft_vit.report.formatting import margin_in_points, points_interval, signed
from peft_vit.report.hover import HoverPoints
from peft_vit.report.plot_selection import SEED_DOTS, leading, selection_note, validation_means
from peft_vit.report.style import GRID, INK, METHOD_COLORS, MUTED, PAPER, draw, is_narrow, quiet_grid

_ROW_IN = 0.31
ROWS = 40


def forests(analysis: Analysis, margin: float | None = None) -> tuple[Drawing, ...]:
    """Return one figure for each reference that something could be paired with.

    Args:
        analysis: of the study.
        margin: a difference, as a share, below which one does not matter; drawn as a band around 0.
    """
    methods: dict[str, str] = {m.experiment.name: m.experiment.method for m in analysis.methods}
    validation = validation_means(analysis.methods)
    found = []
    for reference in dict.fromkeys(c.reference for c in analysis.comparisons):
        paired = [c for c in analysis.comparisons if c.reference == reference and c.difference is not None]
        if paired:
            chosen = leading([c.name for c in paired], validation, ROWS)
            found.append(_forest([paired[i] for i in chosen], paired, methods, reference, margin))
    return tuple(found)


def _forest(
    drawn: Sequence[Comparison],
    paired: Sequence[Comparison],
    methods: dict[str, str],
    reference: str,
    margin: float | None,
) -> Drawing:
    limits = _limits(drawn, margin)

    def paint(figure: Figure) -> HoverPoints:
        axes, hover = figure.add_subplot(), HoverPoints()
        if margin is not None:
            axes.axvspan(-100 * margin, 100 * margin, color=GRID, alpha=0.6, lw=0, zorder=0)
        axes.axvline(0, color=INK, lw=1, zorder=1)
        for row, comparison in enumerate(drawn):
            _row(axes, hover, comparison, row, METHOD_COLORS[methods[comparison.name]], limits)
        axes.set_xlim(*limits)
        axes.set_ylim(len(drawn) - 0.4, -0.6)
        axes.set_yticks(range(len(drawn)), [c.name for c in drawn])
        axes.set_xlabel(f"test accuracy minus that of {reference}{_break(figure)}(percentage points)")
        quiet_grid(axes, "x")
        axes.spines["left"].set_visible(False)
        columns = 2 if is_narrow(figure) else 4
        figure.legend(handles=_legend(margin), loc="outside lower center", ncols=columns, handletextpad=0.4)
        return hover

    missing = "" if margin is None else " The band is the margin within which a difference does not matter."
    caption = (
        f"Each run minus the run of {reference} with the same seed. Small circles: single pairs. Square and number: "
        "their mean. Line: 95 % t interval over seeds, with an arrow where it leaves the picture. The intervals "
        "describe and are not corrected for their number; the table's test decides. Filled squares: decided; open "
        f"squares: not decided.{missing}{selection_note(len(drawn), len(paired))}"
    )
    title = f"How far from {reference}: paired differences"
    height = 1.25 + _ROW_IN * len(drawn)
    return draw(f"differences_to_{reference}", title, caption, height, paint, _rows(paired, margin))


def _break(figure: Figure) -> str:
    return "\n" if is_narrow(figure) else " "


def _limits(drawn: Sequence[Comparison], margin: float | None) -> tuple[float, float]:
    """Return limits in points around zero, the margin and the pairs, and intervals up to that width beside them."""
    inner = [
        0.0,
        *(100 * d for c in drawn for d in c.by_seed),
        *([] if margin is None else (-100 * margin, 100 * margin)),
    ]
    low, high = min(inner), max(inner)
    room = max(0.5, high - low)
    ends = [100 * e for c in drawn if c.difference for e in (c.difference.low, c.difference.high) if e is not None]
    low, high = max(low - room, min([low, *ends])), min(high + room, max([high, *ends]))
    return low - 0.05 * room, high + 0.05 * room


def _row(
    axes: Axes, hover: HoverPoints, comparison: Comparison, row: int, color: str, limits: tuple[float, float]
) -> None:
    difference, name = comparison.difference, comparison.name
    assert difference is not None
    hover.series(name, color, "s")
    if difference.low is not None and difference.high is not None:
        ends = np.clip([100 * difference.low, 100 * difference.high], *limits)
        (line,) = axes.plot(ends, [row, row], color=color, lw=2.2, alpha=0.45, solid_capstyle="butt", zorder=2)
        hover.add(name, line)
        for end, limit, marker in zip(ends, limits, (CARETLEFT, CARETRIGHT), strict=True):
            if end == limit:
                (arrow,) = axes.plot([end], [row], marker=marker, ms=6, color=color, clip_on=False, zorder=3)
                hover.add(name, arrow)
    pairs = [100 * value for value in comparison.by_seed]
    if len(pairs) <= SEED_DOTS:
        (dots,) = axes.plot(pairs, [row] * len(pairs), "o", ms=3.5, mfc=PAPER, mec=color, mew=0.9, zorder=3)
        texts = [f"seed {s}: {signed(p)} points" for s, p in zip(comparison.seeds, pairs, strict=True)]
        hover.add(name, dots, texts)
    mean = 100 * difference.estimate
    face = PAPER if comparison.verdict == "not decided" else color
    (square,) = axes.plot([mean], [row], "s", ms=5.5, mfc=face, mec=color, mew=1.2, zorder=4)
    text = f"mean of {len(pairs)} pairs: {points_interval(difference)} points\nmore accurate? {comparison.verdict}"
    hover.add(name, square, [text.replace(" 1 pairs", " 1 pair")])
    number = axes.annotate(
        signed(mean),
        (1.0, row),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
    )
    hover.add(name, number)


def _legend(margin: float | None) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = [
        Line2D([], [], marker="o", ls="", mfc=PAPER, mec=MUTED, ms=3.5, label="one pair"),
        Line2D([], [], marker="s", ls="", color=MUTED, ms=5.5, label="mean, decided"),
        Line2D([], [], marker="s", ls="", mfc=PAPER, mec=MUTED, mew=1.2, ms=5.5, label="mean, not decided"),
        Line2D([], [], color=MUTED, lw=2.2, alpha=0.45, label="95 % interval"),
    ]
    if margin is not None:
        handles.append(Patch(color=GRID, alpha=0.6, lw=0, label=f"margin, {margin_in_points(margin)}"))
    return handles


def _rows(paired: Sequence[Comparison], margin: float | None) -> list[dict[str, Raw]]:
    return [
        {
            "experiment": c.name,
            "reference": c.reference,
            "seed": seed,
            "difference": value,
            "mean": c.difference.estimate,
            "low": c.difference.low,
            "high": c.difference.high,
            "verdict": c.verdict,
            "margin": margin,
        }
        for c in paired
        if c.difference is not None
        for seed, value in zip(c.seeds, c.by_seed, strict=True)
    ]
