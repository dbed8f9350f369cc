"""Forest plots, one row an experiment: accuracy by method, and paired differences to a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.patches import Patch

from peft_vit.analysis import Analysis, Estimate, MethodResult, Study
from peft_vit.report.document import Drawing
from peft_vit.report.formatting import counted, fixed, margin_in_points, percent_interval, points_interval, signed
from peft_vit.report.hover import HoverPoints
from peft_vit.report.plot_selection import SEED_DOTS, leading, selection_note, validation_means
from peft_vit.report.style import DASHED, GRID, INK, METHOD_COLORS, MUTED, PAPER, draw, is_narrow, quiet_grid
from peft_vit.statistics import Interval

_ROW_IN = 0.31
ROWS = 40
_Look = dict[str, Any]  # of artists, as matplotlib names it
_INTERVAL: _Look = {"lw": 2.2, "alpha": 0.45}


@dataclass(frozen=True)
class _Kind:
    """What rows show: looks, and how a value in percent or points is written."""

    mean: _Look
    seed: _Look
    write: Callable[[float], str]
    unit: str


_ACCURACY = _Kind(
    mean={"marker": "D", "ms": 5, "mec": PAPER, "mew": 0.6},
    seed={"marker": "o", "ms": 4.5, "mew": 1.1},
    write=lambda value: fixed(value, 1),
    unit=" %",
)
_DIFFERENCE = _Kind(
    mean={"marker": "s", "ms": 5.5, "mew": 1.2},
    seed={"marker": "o", "ms": 3.5, "mew": 0.9},
    write=signed,
    unit=" points",
)


@dataclass(frozen=True)
class _Row:
    """One experiment; values as shares."""

    name: str
    color: str
    interval: Interval
    seeds: Sequence[int]
    by_seed: Sequence[float]
    mean_says: str
    filled: bool = True


def accuracy_by_method(study: Study, methods: Sequence[MethodResult]) -> Drawing:
    """Draw one row an experiment: each seed, mean, interval, and the share of the majority class as a line."""
    drawn = leading(methods, validation_means(methods), ROWS)
    found = {run.seed: run.record.majority_accuracy.get("test") for run in study.runs}
    majority = {seed: share for seed, share in found.items() if share is not None}
    shares = sorted(majority.values())
    differs = bool(shares) and shares[0] != shares[-1]
    line = fmean(shares) if differs else next(iter(shares), None)  # a mean of equal ones may round
    legend = [
        Line2D([], [], ls="", mfc=PAPER, mec=MUTED, marker="o", ms=4.5, label="one seed"),
        Line2D([], [], ls="", color=MUTED, marker="D", ms=5, label="mean"),
        Line2D([], [], color=MUTED, **_INTERVAL, label="95 % interval"),
    ]
    if line:
        label = f"majority class, {'on average ' if differs else ''}{fixed(100 * line, 1)} %"
        legend.append(Line2D([], [], color=INK, lw=1, ls=DASHED, label=label))
    rows = [
        _Row(
            name=m.experiment.name,
            color=METHOD_COLORS[m.experiment.method],
            interval=m.test_accuracy,
            seeds=m.seeds,
            by_seed=m.by_seed,
            mean_says=f"mean, {counted(len(m.seeds), 'seed')}: {percent_interval(m.test_accuracy)}",
        )
        for m in drawn
    ]

    def paint(figure: Figure) -> HoverPoints:
        axes, hover = figure.add_subplot(), HoverPoints()
        if line:
            axes.axvline(100 * line, color=INK, lw=1, ls=DASHED, zorder=1)
        limits = _around([100 * v for row in rows for v in row.by_seed] + ([100 * line] if line else []))
        _draw_rows(figure, axes, hover, rows, _ACCURACY, limits, legend)
        axes.set_xlabel("test accuracy (%)")
        return hover

    caption = _accuracy_caption(study, rows) + selection_note(len(drawn), len(methods))
    data = [
        {
            "experiment": m.experiment.name,
            "method": m.experiment.method,
            "seed": seed,
            "test_accuracy": value,
            "mean": m.test_accuracy.estimate,
            "low": m.test_accuracy.low,
            "high": m.test_accuracy.high,
            "seeds": len(m.seeds),
            "majority_accuracy": majority.get(seed),
        }
        for m in methods
        for seed, value in zip(m.seeds, m.by_seed, strict=True)
    ]
    return draw("accuracy_by_method", "Accuracy by method", caption, 1.15 + _ROW_IN * len(drawn), paint, data)


def _accuracy_caption(study: Study, rows: Sequence[_Row]) -> str:
    crowded = any(len(row.by_seed) > SEED_DOTS for row in rows)
    seeds = "Pale line: from the lowest to the highest seed." if crowded else "Open circles: single seeds."
    on = "on the same test images, not other images"
    if study.images_tested_by_seed:
        on = "with other test images out of the same data set, not other data sets"
    return (
        f"{seeds} Diamond and number at the right: their mean. Line: 95 % t "
        "interval over seeds, with an arrow where it leaves the picture (the table has its ends). "
        f"The interval describes other seeds {on}."
    )


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Return limits around the data; intervals of two seeds would dwarf it."""
    low, high = min(values), max(values)
    pad = max(1.0, 0.18 * (high - low))
    return max(0.0, low - pad), min(100.5, high + pad)


def forests(analysis: Analysis, margin: float | None = None) -> dict[str, Drawing]:
    """Return one figure for each reference that something could be paired with.

    Args:
        analysis: of the study.
        margin: a difference, as a share, below which one does not matter; drawn as a band around 0.
    """
    methods: dict[str, str] = {m.experiment.name: m.experiment.method for m in analysis.methods}
    found: dict[str, Drawing] = {}
    if analysis.study.stopping is not None:
        return found  # their courses are drawn
    for reference in dict.fromkeys(c.reference for c in analysis.comparisons):
        paired = [(c, c.interval) for c in analysis.comparisons if c.reference == reference and c.interval is not None]
        if paired:
            drawn = leading(paired, validation_means(analysis.methods), ROWS, lambda pair: pair[0].name)
            rows = [_difference(c, d, METHOD_COLORS[methods[c.name]]) for c, d in drawn]
            found[reference] = _forest(rows, paired, reference, margin)
    return found


def _forest(
    rows: Sequence[_Row], paired: Sequence[tuple[Estimate, Interval]], reference: str, margin: float | None
) -> Drawing:
    legend: list[Line2D | Patch] = [
        Line2D([], [], ls="", mfc=PAPER, mec=MUTED, marker="o", ms=3.5, label="one pair"),
        Line2D([], [], ls="", color=MUTED, marker="s", ms=5.5, label="mean, decided"),
        Line2D([], [], ls="", mfc=PAPER, mec=MUTED, **_DIFFERENCE.mean, label="mean, not decided"),
        Line2D([], [], color=MUTED, **_INTERVAL, label="95 % interval"),
    ]
    if margin is not None:
        legend.append(Patch(color=GRID, alpha=0.6, lw=0, label=f"margin, {margin_in_points(margin)}"))
    limits = _around_zero(rows, margin)

    def paint(figure: Figure) -> HoverPoints:
        axes, hover = figure.add_subplot(), HoverPoints()
        if margin is not None:
            axes.axvspan(-100 * margin, 100 * margin, color=GRID, alpha=0.6, lw=0, zorder=0)
        axes.axvline(0, color=INK, lw=1, zorder=1)
        _draw_rows(figure, axes, hover, rows, _DIFFERENCE, limits, legend)
        end = "\n" if is_narrow(figure) else " "
        axes.set_xlabel(f"test accuracy minus that of {reference}{end}(percentage points)")
        return hover

    band = "" if margin is None else " The band is the margin within which a difference does not matter."
    caption = (
        f"Each run minus the run of {reference} with the same seed. Small circles: single pairs. Square and number: "
        "their mean. Line: 95 % t interval over seeds, with an arrow where it leaves the picture. The intervals "
        "describe and are not corrected for their number; the table's test decides. Filled squares: decided; open "
        f"squares: not decided.{band}{selection_note(len(rows), len(paired))}"
    )
    data = [
        {
            "experiment": c.name,
            "reference": reference,
            "seed": seed,
            "difference": value,
            "mean": difference.estimate,
            "low": difference.low,
            "high": difference.high,
            "verdict": c.verdict,
            "margin": margin,
        }
        for c, difference in paired
        for seed, value in c.by_seed.items()
    ]
    title = f"How far from {reference}: paired differences"
    return draw(f"differences_to_{reference}", title, caption, 1.25 + _ROW_IN * len(rows), paint, data)


def _difference(comparison: Estimate, difference: Interval, color: str) -> _Row:
    n, decided = len(comparison.by_seed), comparison.verdict != "not decided"
    mean = f"mean of {n} pair{'' if n == 1 else 's'}: {points_interval(difference)} points"
    says = f"{mean}\nmore accurate? {comparison.verdict}"
    return _Row(
        comparison.name, color, difference, tuple(comparison.by_seed), tuple(comparison.by_seed.values()), says, decided
    )


def _around_zero(rows: Sequence[_Row], margin: float | None) -> tuple[float, float]:
    """Return limits around zero, the margin and the pairs, and intervals up to that width beside them."""
    band = 100 * (margin or 0.0)
    inner = [-band, band, *(100 * pair for row in rows for pair in row.by_seed)]
    low, high = min(inner), max(inner)
    room = max(0.5, high - low)
    ends = [100 * end for row in rows for end in (row.interval.low, row.interval.high) if end is not None]
    low, high = max(low - room, min([low, *ends])), min(high + room, max([high, *ends]))
    return low - 0.05 * room, high + 0.05 * room


def _draw_rows(
    figure: Figure,
    axes: Axes,
    hover: HoverPoints,
    rows: Sequence[_Row],
    kind: _Kind,
    limits: tuple[float, float],
    legend: Sequence[Line2D | Patch],
) -> None:
    for at, row in enumerate(rows):
        _draw_row(axes, hover, row, kind, at, limits)
    axes.set_xlim(*limits)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    quiet_grid(axes, "x")
    axes.spines["left"].set_visible(False)
    columns = 2 if is_narrow(figure) else 4
    figure.legend(handles=legend, loc="outside lower center", ncols=columns, handletextpad=0.4)


def _draw_row(axes: Axes, hover: HoverPoints, row: _Row, kind: _Kind, at: int, limits: tuple[float, float]) -> None:
    name, color, mean = row.name, row.color, 100 * row.interval.estimate
    low, high, seeds = row.interval.low, row.interval.high, [100 * value for value in row.by_seed]
    hover.series(name, color, kind.mean["marker"])
    if low is not None and high is not None:
        ends = np.clip([100 * low, 100 * high], *limits)
        hover.plot(name, axes, ends, [at, at], color=color, **_INTERVAL, solid_capstyle="butt", zorder=2)
        for end, limit, arrow in zip(ends, limits, (CARETLEFT, CARETRIGHT), strict=True):
            if end == limit:
                hover.plot(name, axes, [end], [at], marker=arrow, ms=6, color=color, clip_on=False, zorder=3)
    if len(seeds) > SEED_DOTS:
        hover.plot(name, axes, [min(seeds), max(seeds)], [at, at], color=color, lw=5, alpha=0.2, zorder=1.5)
    else:
        says = [f"seed {seed}: {kind.write(value)}{kind.unit}" for seed, value in zip(row.seeds, seeds, strict=True)]
        hover.plot(name, axes, seeds, [at] * len(seeds), says, ls="", mfc=PAPER, mec=color, **kind.seed, zorder=3)
    look = {"color": color, "mec": color, "mfc": color if row.filled else PAPER, "ls": "", "zorder": 4} | kind.mean
    hover.plot(name, axes, [mean], [at], [row.mean_says], **look)
    right: _Look = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    number = axes.annotate(kind.write(mean), (1.0, at), xycoords=("axes fraction", "data"), **right)
    hover.add(name, number)
