"""Forest plots, one row an experiment: accuracy by method, and paired differences to a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.patches import Patch

from peft_vit.analysis import Analysis, Comparison, MethodResult, Study
from peft_vit.report.document import Drawing
from peft_vit.report.formatting import (
    counted,
    fixed,
    margin_in_points,
    percent,
    percent_interval,
    points_interval,
    signed,
)
from peft_vit.report.hover import HoverPoints
from peft_vit.report.plot_selection import SEED_DOTS, leading, selection_note, validation_means
from peft_vit.report.style import DASHED, GRID, INK, METHOD_COLORS, MUTED, PAPER, draw, is_narrow, quiet_grid
from peft_vit.statistics import Interval

_ROW_IN = 0.31
ROWS = 40
_Look = dict[str, Any]  # of artists, as matplotlib names it
_MEAN: _Look = {"marker": "D", "ms": 5, "mec": PAPER, "mew": 0.6}
_MEAN_DIFFERENCE: _Look = {"marker": "s", "ms": 5.5, "mew": 1.2}
_SEED: _Look = {"marker": "o", "ms": 4.5, "mew": 1.1}
_PAIR: _Look = {"marker": "o", "ms": 3.5, "mew": 0.9}
_INTERVAL: _Look = {"lw": 2.2, "alpha": 0.45}


@dataclass(frozen=True)
class _Row:
    """One experiment: values in percent or points, and what is said of them."""

    name: str
    color: str
    mean: float
    ends: tuple[float, float] | None  # of the interval
    seeds: Sequence[float]
    seeds_say: Sequence[str]
    mean_says: str
    number: str  # at the right
    mean_look: _Look
    seed_look: _Look


def _ends(interval: Interval) -> tuple[float, float] | None:
    return None if interval.low is None or interval.high is None else (100 * interval.low, 100 * interval.high)


def accuracy_by_method(study: Study, methods: Sequence[MethodResult]) -> Drawing:
    """Draw one row an experiment: each seed, mean, interval, and the share of the majority class as a line."""
    drawn = leading(methods, lambda m: m.experiment.name, validation_means(methods), ROWS)
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
    rows = [_accuracy(method) for method in drawn]

    def paint(figure: Figure) -> HoverPoints:
        axes, hover = figure.add_subplot(), HoverPoints()
        if line:
            axes.axvline(100 * line, color=INK, lw=1, ls=DASHED, zorder=1)
        limits = _around([v for row in rows for v in row.seeds] + ([100 * line] if line else []))
        _draw_rows(figure, axes, hover, rows, limits, legend)
        axes.set_xlabel("test accuracy (%)")
        return hover

    seeds = (
        "Pale line: from the lowest to the highest seed." if any(map(_crowded, rows)) else "Open circles: single seeds."
    )
    on = "on the same test images, not other images"
    if study.images_tested_by_seed:
        on = "with other test images out of the same data set, not other data sets"
    caption = (
        f"{seeds} Diamond and number at the right: their mean. Line: 95 % t "
        "interval over seeds, with an arrow where it leaves the picture (the table has its ends). "
        f"The interval describes other seeds {on}.{selection_note(len(drawn), len(methods))}"
    )
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


def _accuracy(method: MethodResult) -> _Row:
    mean, color = method.test_accuracy, METHOD_COLORS[method.experiment.method]
    return _Row(
        name=method.experiment.name,
        color=color,
        mean=100 * mean.estimate,
        ends=_ends(mean),
        seeds=[100 * value for value in method.by_seed],
        seeds_say=[f"seed {seed}: {percent(v)}" for seed, v in zip(method.seeds, method.by_seed, strict=True)],
        mean_says=f"mean, {counted(len(method.seeds), 'seed')}: {percent_interval(mean)}",
        number=fixed(100 * mean.estimate, 1),
        mean_look=_MEAN,
        seed_look=_SEED,
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
    found = {}
    for reference in dict.fromkeys(c.reference for c in analysis.comparisons):
        paired = [
            (c, c.difference) for c in analysis.comparisons if c.reference == reference and c.difference is not None
        ]
        if paired:
            drawn = leading(paired, lambda pair: pair[0].name, validation_means(analysis.methods), ROWS)
            rows = [_difference(c, d, METHOD_COLORS[methods[c.name]]) for c, d in drawn]
            found[reference] = _forest(rows, paired, reference, margin)
    return found


def _forest(
    rows: Sequence[_Row], paired: Sequence[tuple[Comparison, Interval]], reference: str, margin: float | None
) -> Drawing:
    legend: list[Line2D | Patch] = [
        Line2D([], [], ls="", mfc=PAPER, mec=MUTED, marker="o", ms=3.5, label="one pair"),
        Line2D([], [], ls="", color=MUTED, marker="s", ms=5.5, label="mean, decided"),
        Line2D([], [], ls="", mfc=PAPER, mec=MUTED, **_MEAN_DIFFERENCE, label="mean, not decided"),
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
        _draw_rows(figure, axes, hover, rows, limits, legend)
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
        for seed, value in zip(c.seeds, c.by_seed, strict=True)
    ]
    title = f"How far from {reference}: paired differences"
    return draw(f"differences_to_{reference}", title, caption, 1.25 + _ROW_IN * len(rows), paint, data)


def _difference(comparison: Comparison, difference: Interval, color: str) -> _Row:
    pairs, mean = [100 * value for value in comparison.by_seed], 100 * difference.estimate
    of = f"mean of {len(pairs)} pair{'' if len(pairs) == 1 else 's'}: {points_interval(difference)} points"
    face = PAPER if comparison.verdict == "not decided" else color
    return _Row(
        name=comparison.name,
        color=color,
        mean=mean,
        ends=_ends(difference),
        seeds=pairs,
        seeds_say=[f"seed {s}: {signed(p)} points" for s, p in zip(comparison.seeds, pairs, strict=True)],
        mean_says=f"{of}\nmore accurate? {comparison.verdict}",
        number=signed(mean),
        mean_look=_MEAN_DIFFERENCE | {"mfc": face, "mec": color},
        seed_look=_PAIR,
    )


def _around_zero(rows: Sequence[_Row], margin: float | None) -> tuple[float, float]:
    """Return limits around zero, the margin and the pairs, and intervals up to that width beside them."""
    band = 100 * (margin or 0.0)
    inner = [-band, band, *(pair for row in rows for pair in row.seeds)]
    low, high = min(inner), max(inner)
    room = max(0.5, high - low)
    ends = [end for row in rows for end in row.ends or ()]
    low, high = max(low - room, min([low, *ends])), min(high + room, max([high, *ends]))
    return low - 0.05 * room, high + 0.05 * room


def _draw_rows(
    figure: Figure,
    axes: Axes,
    hover: HoverPoints,
    rows: Sequence[_Row],
    limits: tuple[float, float],
    legend: Sequence[Line2D | Patch],
) -> None:
    for at, row in enumerate(rows):
        _draw_row(axes, hover, row, at, limits)
    axes.set_xlim(*limits)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    quiet_grid(axes, "x")
    axes.spines["left"].set_visible(False)
    columns = 2 if is_narrow(figure) else 4
    figure.legend(handles=legend, loc="outside lower center", ncols=columns, handletextpad=0.4)


def _crowded(row: _Row) -> bool:
    return len(row.seeds) > SEED_DOTS


def _draw_row(axes: Axes, hover: HoverPoints, row: _Row, at: int, limits: tuple[float, float]) -> None:
    name, color = row.name, row.color
    hover.series(name, color, row.mean_look["marker"])
    if row.ends is not None:
        ends = np.clip(row.ends, *limits)
        hover.plot(name, axes, ends, [at, at], color=color, **_INTERVAL, solid_capstyle="butt", zorder=2)
        for end, limit, arrow in zip(ends, limits, (CARETLEFT, CARETRIGHT), strict=True):
            if end == limit:
                hover.plot(name, axes, [end], [at], marker=arrow, ms=6, color=color, clip_on=False, zorder=3)
    if _crowded(row):
        span = [min(row.seeds), max(row.seeds)]
        hover.plot(name, axes, span, [at, at], color=color, lw=5, alpha=0.2, zorder=1.5)
    else:
        where = [at] * len(row.seeds)
        hover.plot(name, axes, row.seeds, where, row.seeds_say, ls="", mfc=PAPER, mec=color, **row.seed_look, zorder=3)
    hover.plot(name, axes, [row.mean], [at], [row.mean_says], ls="", color=color, **row.mean_look, zorder=4)
    right: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    hover.add(name, axes.annotate(row.number, (1.0, at), xycoords=("axes fraction", "data"), **right))
