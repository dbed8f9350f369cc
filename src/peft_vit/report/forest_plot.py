"""Forest plots, one row an experiment: accuracy by method, and paired differences to a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.patches import Patch

from peft_vit.analysis import Analysis, Estimate, MethodResult, Study
from peft_vit.analysis.comparison import Verdict
from peft_vit.report.document import Drawing, Raw
from peft_vit.report.figure import (
    DASHED,
    GRID,
    INK,
    METHOD_COLORS,
    MUTED,
    PAPER,
    SEED_DOTS,
    Canvas,
    draw,
    leading,
    quiet_grid,
    validation_means,
)
from peft_vit.report.formatting import counted, fixed, margin_in_points, percent_interval, points_interval, signed
from peft_vit.statistics import Interval

_ROW_IN = 0.31
ROWS = 40
_Look = dict[str, Any]  # of artists, as matplotlib names it
_INTERVAL: _Look = {"lw": 2.2, "alpha": 0.45}
_MARGIN: _Look = {"color": GRID, "alpha": 0.6, "lw": 0}


@dataclass(frozen=True)
class _Kind:
    """What rows of estimates, shares, show: looks, and how a value in percent or points is written."""

    mean: _Look
    seed: _Look
    write: Callable[[float], str]
    unit: str
    says: Callable[[Estimate], str]  # of a mean
    filled: Callable[[Estimate], bool]

    def rows(
        self,
        canvas: Canvas,
        axes: Axes,
        estimates: Sequence[Estimate],
        colors: Mapping[str, str],
        limits: tuple[float, float],
        legend: Sequence[Line2D | Patch],
    ) -> None:
        for at, estimate in enumerate(estimates):
            self._row(canvas, axes, estimate, colors[estimate.name], at, limits)
        axes.set_xlim(*limits)
        axes.set_ylim(len(estimates) - 0.4, -0.6)
        axes.set_yticks(range(len(estimates)), [estimate.name for estimate in estimates])
        quiet_grid(axes, "x")
        axes.spines["left"].set_visible(False)
        canvas.legend(legend, (2, 4), handletextpad=0.4)

    def _row(
        self, canvas: Canvas, axes: Axes, estimate: Estimate, color: str, at: int, limits: tuple[float, float]
    ) -> None:
        """Draw each seed, the interval, and the mean with its number beside it."""
        name, interval, seeds = estimate.name, estimate.interval, [100 * v for v in estimate.by_seed.values()]
        assert interval is not None
        mean = 100 * interval.estimate
        canvas.series(name, color, self.mean["marker"])
        if interval.low is not None and interval.high is not None:
            ends = np.clip([100 * interval.low, 100 * interval.high], *limits)
            canvas.plot(name, axes, ends, [at, at], color=color, **_INTERVAL, solid_capstyle="butt", zorder=2)
            for end, limit, arrow in zip(ends, limits, (CARETLEFT, CARETRIGHT), strict=True):
                if end == limit:
                    canvas.plot(name, axes, [end], [at], marker=arrow, ms=6, color=color, clip_on=False, zorder=3)
        if len(seeds) > SEED_DOTS:
            canvas.plot(name, axes, [min(seeds), max(seeds)], [at, at], color=color, lw=5, alpha=0.2, zorder=1.5)
        else:
            says = [f"seed {seed}: {self.write(100 * v)}{self.unit}" for seed, v in estimate.by_seed.items()]
            canvas.plot(name, axes, seeds, [at] * len(seeds), says, ls="", mfc=PAPER, mec=color, **self.seed, zorder=3)
        face = color if self.filled(estimate) else PAPER
        look = {"color": color, "mec": color, "mfc": face, "ls": "", "zorder": 4} | self.mean
        canvas.plot(name, axes, [mean], [at], [self.says(estimate)], **look)
        right: _Look = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        number = axes.annotate(self.write(mean), (1.0, at), xycoords=("axes fraction", "data"), **right)
        canvas.add(name, number)


_ACCURACY = _Kind(
    mean={"marker": "D", "ms": 5, "mec": PAPER, "mew": 0.6},
    seed={"marker": "o", "ms": 4.5, "mew": 1.1},
    write=lambda value: fixed(value, 1),
    unit=" %",
    says=lambda e: f"mean, {counted(len(e.by_seed), 'seed')}: {percent_interval(e.interval)}" if e.interval else "",
    filled=lambda _: True,
)


def _says_difference(estimate: Estimate) -> str:
    of = f"mean of {len(estimate.by_seed)} pair{'' if len(estimate.by_seed) == 1 else 's'}"
    return f"{of}: {points_interval(estimate.interval)} points\nmore accurate? {estimate.verdict}"


_DIFFERENCE = _Kind(
    mean={"marker": "s", "ms": 5.5, "mew": 1.2},
    seed={"marker": "o", "ms": 3.5, "mew": 0.9},
    write=signed,
    unit=" points",
    says=_says_difference,
    filled=lambda estimate: estimate.verdict != Verdict.NOT_DECIDED,
)


def _entry(label: str, **look: Any) -> Line2D:
    return Line2D([], [], **{"color": MUTED, "mec": MUTED, "ls": ""} | look, label=label)


def _ends(interval: Interval | None) -> dict[str, Raw]:
    assert interval is not None
    return {"mean": interval.estimate, "low": interval.low, "high": interval.high}


def accuracy_by_method(study: Study, methods: Sequence[MethodResult]) -> Drawing:
    """Draw one row an experiment: each seed, mean, interval, and the share of the majority class as a line."""
    drawn, note = leading(methods, validation_means(methods), ROWS)
    estimates = {
        m.experiment.name: Estimate(
            name=m.experiment.name, by_seed=dict(zip(m.seeds, m.by_seed, strict=True)), interval=m.test_accuracy
        )
        for m in methods
    }
    majority = {run.seed: run.record.majority_accuracy.get("test") for run in study.runs}
    shares = [share for share in majority.values() if share is not None]
    differs = len(set(shares)) > 1
    line = 100 * (fmean(shares) if differs else shares[0]) if shares else 0.0  # a mean of equal ones may round
    legend = [
        _entry("one seed", marker="o", ms=4.5, mfc=PAPER),
        _entry("mean", marker="D", ms=5),
        _entry("95 % interval", ls="-", **_INTERVAL),
    ]
    dashes: _Look = {"color": INK, "lw": 1, "ls": DASHED}
    if line:
        legend.append(_entry(f"majority class, {'on average ' if differs else ''}{fixed(line, 1)} %", **dashes))
    values = [100 * value for m in drawn for value in m.by_seed] + ([line] if line else [])
    low, high = min(values), max(values)  # of intervals nothing: those of two seeds would dwarf the data
    pad = max(1.0, 0.18 * (high - low))

    def paint(canvas: Canvas) -> None:
        axes = canvas.figure.add_subplot()
        if line:
            axes.axvline(line, **dashes, zorder=1)
        shown = [estimates[m.experiment.name] for m in drawn]
        colors = {m.experiment.name: METHOD_COLORS[m.experiment.method] for m in drawn}
        _ACCURACY.rows(canvas, axes, shown, colors, (max(0.0, low - pad), min(100.5, high + pad)), legend)
        axes.set_xlabel("test accuracy (%)")

    crowded = any(len(m.by_seed) > SEED_DOTS for m in drawn)
    seeds = "Pale line: from the lowest to the highest seed." if crowded else "Open circles: single seeds."
    on = "on the same test images, not other images"
    if study.images_tested_by_seed:
        on = "with other test images out of the same data set, not other data sets"
    caption = (
        f"{seeds} Diamond and number at the right: their mean. Line: 95 % t "
        "interval over seeds, with an arrow where it leaves the picture (the table has its ends). "
        f"The interval describes other seeds {on}.{note}"
    )
    data = [
        {
            "experiment": m.experiment.name,
            "method": m.experiment.method,
            "seed": seed,
            "test_accuracy": value,
            **_ends(m.test_accuracy),
            "seeds": len(m.seeds),
            "majority_accuracy": majority.get(seed),
        }
        for m in methods
        for seed, value in zip(m.seeds, m.by_seed, strict=True)
    ]
    return draw("accuracy_by_method", "Accuracy by method", caption, 1.15 + _ROW_IN * len(drawn), paint, data)


def forests(analysis: Analysis, margin: float | None = None) -> dict[str, Drawing]:
    """Return one figure for each reference that something could be paired with; none where courses are drawn.

    Args:
        analysis: of the study.
        margin: a difference, as a share, below which one does not matter; drawn as a band around 0.
    """
    paired: dict[str, list[Estimate]] = {}
    for estimate in analysis.comparisons if analysis.study.stopping is None else ():
        if estimate.interval is not None:
            paired.setdefault(estimate.reference, []).append(estimate)
    return {reference: _forest(analysis, reference, estimates, margin) for reference, estimates in paired.items()}


def _forest(analysis: Analysis, reference: str, estimates: Sequence[Estimate], margin: float | None) -> Drawing:
    rows, note = leading(estimates, validation_means(analysis.methods), ROWS, lambda estimate: estimate.name)
    colors = {m.experiment.name: METHOD_COLORS[m.experiment.method] for m in analysis.methods}
    legend: list[Line2D | Patch] = [
        _entry("one pair", marker="o", ms=3.5, mfc=PAPER),
        _entry("mean, decided", marker="s", ms=5.5),
        _entry("mean, not decided", mfc=PAPER, **_DIFFERENCE.mean),
        _entry("95 % interval", ls="-", **_INTERVAL),
    ]
    band = 100 * (margin or 0.0)
    if margin is not None:
        legend.append(Patch(**_MARGIN, label=f"margin, {margin_in_points(margin)}"))
    # Around zero, the margin and the pairs, and intervals up to that width beside them.
    inner = [-band, band, *(100 * pair for row in rows for pair in row.by_seed.values())]
    low, high = min(inner), max(inner)
    room = max(0.5, high - low)
    intervals = [row.interval for row in rows if row.interval is not None]
    ends = [100 * end for interval in intervals for end in (interval.low, interval.high) if end is not None]
    low, high = max(low - room, min([low, *ends])), min(high + room, max([high, *ends]))

    def paint(canvas: Canvas) -> None:
        axes = canvas.figure.add_subplot()
        if margin is not None:
            axes.axvspan(-band, band, **_MARGIN, zorder=0)
        axes.axvline(0, color=INK, lw=1, zorder=1)
        _DIFFERENCE.rows(canvas, axes, rows, colors, (low - 0.05 * room, high + 0.05 * room), legend)
        end = "\n" if canvas.narrow else " "
        axes.set_xlabel(f"test accuracy minus that of {reference}{end}(percentage points)")

    shown = "" if margin is None else " The band is the margin within which a difference does not matter."
    caption = (
        f"Each run minus the run of {reference} with the same seed. Small circles: single pairs. Square and number: "
        "their mean. Line: 95 % t interval over seeds, with an arrow where it leaves the picture. The intervals "
        "describe and are not corrected for their number; the table's test decides. Filled squares: decided; open "
        f"squares: not decided.{shown}{note}"
    )
    data = [
        {
            "experiment": estimate.name,
            "reference": reference,
            "seed": seed,
            "difference": value,
            **_ends(estimate.interval),
            "verdict": estimate.verdict,
            "margin": margin,
        }
        for estimate in estimates
        for seed, value in estimate.by_seed.items()
    ]
    title = f"How far from {reference}: paired differences"
    return draw(f"differences_to_{reference}", title, caption, 1.25 + _ROW_IN * len(rows), paint, data)
