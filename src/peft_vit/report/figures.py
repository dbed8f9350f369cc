"""Every figure of a study, by section; a figure without data becomes a sentence that says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT

from peft_vit.analysis import Analysis, MethodResult
from peft_vit.report.curves import loss_curves
from peft_vit.report.document import Block, Drawing, Paragraph, Raw
from peft_vit.report.formatting import counted, fixed, percent, percent_interval
from peft_vit.report.heatmaps import importance_maps, rank_maps
from peft_vit.report.hover import HoverPoints
from peft_vit.report.plot_selection import leading, many_seeds, selection_note, validation_means
from peft_vit.report.scatter import accuracy_by_bytes, accuracy_by_parameters
from peft_vit.report.style import INK, METHOD_COLORS, MUTED, PAPER, draw, is_narrow, quiet_grid

_ROW_IN = 0.31
ROWS = 40
MAPS = 6
_EVERY_RUN = " `peft-vit export --format history` writes those of every run."


def comparison_figures(analysis: Analysis) -> tuple[Block, ...]:
    """Return accuracy by method, accuracy against parameters and bytes, and the loss curves."""
    methods = analysis.methods
    if not methods:
        return (Paragraph("No figure of accuracy: no run of this study has finished."),)
    shares = {run.seed: run.record.majority_accuracy.get("test") for run in analysis.study.runs}
    majority = {seed: share for seed, share in shares.items() if share is not None}
    return (
        accuracy_by_method(methods, majority, images_by_seed=analysis.study.images_tested_by_seed),
        accuracy_by_parameters(methods),
        accuracy_by_bytes(methods),
        loss_curves(analysis.study, validation_means(methods)),
    )


def importance_figures(analysis: Analysis) -> tuple[Block, ...]:
    """Return importance by layer."""
    if not analysis.importance:
        return (Paragraph("No figure of importance: no finished run of this study recorded importance scores."),)
    patterns = analysis.importance
    shown = leading([p.experiment.name for p in patterns], validation_means(analysis.methods), MAPS)
    return (importance_maps([patterns[i] for i in shown], _maps_note(len(shown), len(patterns))),)


def allocation_figures(analysis: Analysis) -> tuple[Block, ...]:
    """Return ranks over training."""
    mapped = [a for a in analysis.allocation if a.maps]
    if not mapped:
        return (Paragraph("No rank maps: the study has no finished AdaLoRA run that recorded its ranks."),)
    shown = leading([a.experiment.name for a in mapped], validation_means(analysis.methods), MAPS)
    return (rank_maps([mapped[i] for i in shown], _maps_note(len(shown), len(mapped))),)


def _maps_note(drawn: int, there: int) -> str:
    note = selection_note(drawn, there)
    return note and note + _EVERY_RUN


def accuracy_by_method(
    methods: Sequence[MethodResult], majority: Mapping[int, float], *, images_by_seed: bool
) -> Drawing:
    """Draw one row an experiment: each seed, mean, interval, and the majority class as a line.

    Args:
        methods: the rows.
        majority: seed -> share of the most frequent class of its test images; the line is at the seeds' mean.
        images_by_seed: each seed draws its own test images.
    """
    chosen = leading([m.experiment.name for m in methods], validation_means(methods), ROWS)
    drawn = [methods[i] for i in chosen]
    shares = sorted(majority.values())
    differs = bool(shares) and shares[0] != shares[-1]
    line = fmean(shares) if differs else next(iter(shares), None)  # a mean of equal ones may round

    def paint(figure: Figure) -> HoverPoints:
        axes, hover = figure.add_subplot(), HoverPoints()
        low, high = _limits([v for m in drawn for v in m.by_seed] + ([line] if line else []))
        for row, method in enumerate(drawn):
            _method_row(axes, hover, method, row, (low, high))
        if line:
            axes.axvline(100 * line, color=INK, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.set_xlim(low, high)
        axes.set_ylim(len(drawn) - 0.4, -0.6)
        axes.set_yticks(range(len(drawn)), [m.experiment.name for m in drawn])
        axes.set_xlabel("test accuracy (%)")
        quiet_grid(axes, "x")
        axes.spines["left"].set_visible(False)
        columns = 2 if is_narrow(figure) else 4
        legend = _dot_legend(line, differs=differs)
        figure.legend(handles=legend, loc="outside lower center", ncols=columns, handletextpad=0.4)
        return hover

    left_out = selection_note(len(drawn), len(methods))
    on = "on the same test images, not other images"
    if images_by_seed:
        on = "with other test images out of the same data set, not other data sets"
    caption = (
        f"{seeds_caption(drawn)} Diamond and number at the right: their mean. Line: 95 % t "
        "interval over seeds, with an arrow where it leaves the picture (the table has its ends). "
        f"The interval describes other seeds {on}.{left_out}"
    )
    height = 1.15 + _ROW_IN * len(drawn)
    return draw("accuracy_by_method", "Accuracy by method", caption, height, paint, _accuracy_rows(methods, majority))


def seeds_caption(methods: Sequence[MethodResult]) -> str:
    """Return what stands for single seeds: circles, or their range where they would cover one another."""
    return "Pale line: from the lowest to the highest seed." if many_seeds(methods) else "Open circles: single seeds."


def _accuracy_rows(methods: Sequence[MethodResult], majority: Mapping[int, float]) -> list[dict[str, Raw]]:
    return [
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


def _limits(shares: Sequence[float]) -> tuple[float, float]:
    """Return limits in percent around the data; intervals of two seeds would dwarf it."""
    low, high = 100 * min(shares), 100 * max(shares)
    pad = max(1.0, 0.18 * (high - low))
    return max(0.0, low - pad), min(100.5, high + pad)


def _method_row(axes: Axes, hover: HoverPoints, method: MethodResult, row: int, limits: tuple[float, float]) -> None:
    name, color = method.experiment.name, METHOD_COLORS[method.experiment.method]
    hover.series(name, color, "D")
    _interval_line(axes, hover, method, row, limits)
    seeds = [100 * value for value in method.by_seed]
    if many_seeds([method]):
        (span,) = axes.plot([min(seeds), max(seeds)], [row, row], color=color, lw=5, alpha=0.2, zorder=1.5)
        hover.add(name, span)
    else:
        (dots,) = axes.plot(seeds, [row] * len(seeds), "o", ms=4.5, mfc=PAPER, mec=color, mew=1.1, zorder=3)
        texts = [f"seed {seed}: {percent(v)}" for seed, v in zip(method.seeds, method.by_seed, strict=True)]
        hover.add(name, dots, texts)
    mean = 100 * method.test_accuracy.estimate
    (diamond,) = axes.plot([mean], [row], "D", ms=5, color=color, mec=PAPER, mew=0.6, zorder=4)
    hover.add(name, diamond, [f"mean, {counted(len(seeds), 'seed')}: {percent_interval(method.test_accuracy)}"])
    number = axes.annotate(
        f"{fixed(mean, 1)}",
        (1.0, row),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
    )
    hover.add(name, number)


def _interval_line(axes: Axes, hover: HoverPoints, method: MethodResult, row: int, limits: tuple[float, float]) -> None:
    interval, color = method.test_accuracy, METHOD_COLORS[method.experiment.method]
    if interval.low is None or interval.high is None:
        return
    ends = np.clip([100 * interval.low, 100 * interval.high], *limits)
    (line,) = axes.plot(ends, [row, row], color=color, lw=2.2, alpha=0.45, solid_capstyle="butt", zorder=2)
    hover.add(method.experiment.name, line)
    for end, limit, marker in zip(ends, limits, (CARETLEFT, CARETRIGHT), strict=True):
        if end == limit:
            (arrow,) = axes.plot([end], [row], marker=marker, ms=6, color=color, clip_on=False, zorder=3)
            hover.add(method.experiment.name, arrow)


def _dot_legend(majority: float | None, *, differs: bool) -> list[Line2D]:
    handles = [
        Line2D([], [], marker="o", ls="", mfc=PAPER, mec=MUTED, ms=4.5, label="one seed"),
        Line2D([], [], marker="D", ls="", color=MUTED, ms=5, label="mean"),
        Line2D([], [], color=MUTED, lw=2.2, alpha=0.45, label="95 % interval"),
    ]
    if majority:
        label = f"majority class, {'on average ' if differs else ''}{fixed(100 * majority, 1)} %"
        handles.append(Line2D([], [], color=INK, lw=1, ls=(0, (4, 3)), label=label))
    return handles
