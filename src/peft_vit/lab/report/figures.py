"""Figures of a study's report: accuracy by method, paired differences, loss over training, blocks by matrix types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from operator import attrgetter
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT

from peft_vit.base.statistics import Interval, Verdict
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.core.config import METHOD_KINDS, ExperimentConfig
from peft_vit.core.tasks import Scores
from peft_vit.deploy.page.document import Block, Drawing, Paragraph, Raw
from peft_vit.deploy.page.figure import (
    DASHED,
    GRID,
    INK,
    METHOD_COLORS,
    MUTED,
    PAPER,
    SEQUENTIAL,
    Canvas,
    draw,
    leading,
    line_style,
    quiet_grid,
)
from peft_vit.deploy.page.formatting import (
    better_question,
    counted,
    fixed,
    points_interval,
    scaled,
    score_interval,
    signed,
)
from peft_vit.deploy.page.lines import STEPS, smoothed_losses, smoothing_window
from peft_vit.lab.analysis import Allocation, Analysis, Estimate, ImportancePattern, MethodResult, Study
from peft_vit.lab.analysis.comparison import validation_means
from peft_vit.lab.analysis.layers import Grid

# --- accuracy by method: rows with every seed, and paired differences -------------------------------------------------


_ROW_IN = 0.31
ROWS = 40
_Style = dict[str, Any]  # of artists, as matplotlib names it
_INTERVAL: _Style = {"lw": 2.2, "alpha": 0.45}


class _Unit(NamedTuple):
    """What shares are drawn in: times a factor, with how many decimals, and what stands behind a number."""

    factor: float
    decimals: int
    name: str


def _unit(scores: Scores) -> _Unit:
    """Return what values are drawn in: percent, or what the metric is in."""
    return _Unit(100.0, 1, " %") if scores.metric.is_share else _Unit(scores.factor, 3, "")


# How a row of accuracies and one of paired differences look.
_MEANS: dict[bool, _Style] = {
    False: {"marker": "D", "ms": 5, "mec": PAPER, "mew": 0.6},
    True: {"marker": "s", "ms": 5.5, "mew": 1.2},
}
_SEEDS: dict[bool, _Style] = {False: {"ms": 4.5, "mew": 1.1}, True: {"ms": 3.5, "mew": 0.9}}


def _rows(
    canvas: Canvas,
    axes: Axes,
    estimates: Sequence[Estimate],
    colors: Mapping[str, str],
    limits: tuple[float, float],
    legend: Sequence[Line2D],
    scores: Scores,
    *,
    paired: bool,
) -> None:
    """Draw a row an estimate: each seed, the interval, and the mean with its number beside it.

    Estimates are shares, drawn in the metric's unit or, if `paired`, differences in points.
    """
    mean_style, unit = _MEANS[paired], _Unit(100.0, 1, f" {scores.unit}") if paired else _unit(scores)
    write = signed if paired else partial(fixed, decimals=unit.decimals)
    for at, estimate in enumerate(estimates):
        name, interval, color = estimate.name, estimate.interval, colors[estimate.name]
        seeds = [unit.factor * value for value in estimate.by_seed.values()]
        assert interval is not None
        mean = unit.factor * interval.estimate
        canvas.series(name, color, mean_style["marker"])
        if interval.low is not None and interval.high is not None:
            ends = np.clip(sorted([unit.factor * interval.low, unit.factor * interval.high]), *limits)
            canvas.plot(name, axes, ends, [at, at], color=color, **_INTERVAL, solid_capstyle="butt", zorder=2)
            for end, limit, arrow in zip(ends, limits, (CARETLEFT, CARETRIGHT), strict=True):
                if end == limit:
                    canvas.plot(name, axes, [end], [at], marker=arrow, ms=6, color=color, clip_on=False, zorder=3)
        texts = [f"seed {seed}: {write(value)}{unit.name}" for seed, value in zip(estimate.by_seed, seeds, strict=True)]
        style = {"marker": "o", "ls": "", "mfc": PAPER, "mec": color, "zorder": 3} | _SEEDS[paired]
        canvas.plot(name, axes, seeds, [at] * len(seeds), texts, **style)
        text = f"mean, {counted(len(seeds), 'seed')}: {score_interval(scores, interval)}"
        if paired:
            text = (
                f"mean of {len(seeds)} pair{'' if len(seeds) == 1 else 's'}: {points_interval(interval)}{unit.name}\n"
            )
            text += f"{better_question(scores)} {estimate.verdict}"
        face = PAPER if paired and estimate.verdict == Verdict.NOT_DECIDED else color
        style = {"color": color, "mec": color, "mfc": face, "ls": "", "zorder": 4} | mean_style
        canvas.plot(name, axes, [mean], [at], [text], **style)
        beside: _Style = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        canvas.add(name, axes.annotate(write(mean), (1.0, at), xycoords=("axes fraction", "data"), **beside))
    axes.set_xlim(*limits)
    axes.set_ylim(len(estimates) - 0.4, -0.6)
    axes.set_yticks(range(len(estimates)), [estimate.name for estimate in estimates])
    quiet_grid(axes, "x")
    axes.spines["left"].set_visible(False)
    canvas.legend(legend, (2, 4), handletextpad=0.4)


def _entry(label: str, **style: Any) -> Line2D:
    return Line2D([], [], **{"color": MUTED, "mec": MUTED, "ls": ""} | style, label=label)


def _interval_values(interval: Interval | None) -> dict[str, Raw]:
    assert interval is not None
    return {"mean": interval.estimate, "low": interval.low, "high": interval.high}


def accuracy_by_method(study: Study, methods: Sequence[MethodResult]) -> Drawing:
    """Draw one row an experiment: each seed, mean, interval, and the share of the majority class as a line."""
    scores, unit, of_test = study.scores, _unit(study.scores), f"test_{study.scores.metric.name}"
    drawn, note = leading(methods, validation_means(methods), ROWS)
    majority = {run.seed: run.record.majority_accuracy.get("test") for run in study.runs}
    shares = [share for share in majority.values() if share is not None]
    differs, line = len(set(shares)) > 1, 100 * fmean(shares) if shares else 0.0
    legend = [
        _entry("one seed", marker="o", ms=4.5, mfc=PAPER),
        _entry("mean", marker="D", ms=5),
        _entry("95 % interval", ls="-", **_INTERVAL),
    ]
    dashes: _Style = {"color": INK, "lw": 1, "ls": DASHED}
    if line:
        legend.append(_entry(f"majority class, {'on average ' if differs else ''}{fixed(line, 1)} %", **dashes))
    values = [unit.factor * value for m in drawn for value in m.by_seed.values()] + ([line] if line else [])
    low, high = min(values), max(values)  # of intervals nothing: those of two seeds would dwarf the data
    pad = max(1.0 if scores.metric.is_share else 0.02 * max(abs(low), abs(high)), 0.18 * (high - low))
    least, most = (0.0, 100.5) if scores.metric.is_share else (-np.inf, np.inf)

    def paint(canvas: Canvas) -> None:
        axes = canvas.figure.add_subplot()
        if line:
            axes.axvline(line, **dashes, zorder=1)
        shown = [Estimate(name=m.name, by_seed=m.by_seed, interval=m.test_accuracy) for m in drawn]
        colors = {m.name: METHOD_COLORS[m.experiment.method] for m in drawn}
        limits = max(least, low - pad), min(most, high + pad)
        _rows(canvas, axes, shown, colors, limits, legend, scores, paired=False)
        metric, names = scores.metric, study.runs[0].record.class_names
        axis_unit = "%" if metric.is_share else ""
        if metric.has_unit:
            axis_unit = names[0] if len(names) == 1 else "standard deviations"
        axes.set_xlabel(f"test {metric.words}{axis_unit and f' ({axis_unit})'}")

    on = "on the same test images, not other images"
    if study.images_tested_by_seed:
        on = "with other test images out of the same data set, not other data sets"
    caption = (
        "Open circles: single seeds. Diamond and number at the right: their mean. Line: 95 % t "
        "interval over seeds, with an arrow where it leaves the picture (the table has its ends). "
        f"The interval describes other seeds {on}.{note}"
    )
    data = [
        {
            "experiment": m.name,
            "method": m.experiment.method,
            "seed": seed,
            of_test: scores.factor * value,
            **_interval_values(scaled(m.test_accuracy, scores.factor)),
            "seeds": len(m.runs),
            **({"majority_accuracy": majority.get(seed)} if scores.metric.counts_images else {}),
        }
        for m in methods
        for seed, value in m.by_seed.items()
    ]
    words = scores.metric.words
    title = f"{words[0].upper()}{words[1:]} by method"
    return draw("accuracy_by_method", title, caption, 1.15 + _ROW_IN * len(drawn), paint, data)


def forests(analysis: Analysis) -> dict[str, Drawing]:
    """Return one figure for each reference that something could be paired with."""
    paired = grouped(
        (estimate.reference, estimate) for estimate in analysis.comparisons if estimate.interval is not None
    )
    return {reference: _forest(analysis, reference, estimates) for reference, estimates in paired.items()}


def _forest(analysis: Analysis, reference: str, estimates: Sequence[Estimate]) -> Drawing:
    scores = analysis.study.scores
    rows, note = leading(estimates, validation_means(analysis.methods), ROWS, lambda estimate: estimate.name)
    colors = {m.name: METHOD_COLORS[m.experiment.method] for m in analysis.methods}
    legend = [
        _entry("one pair", marker="o", ms=3.5, mfc=PAPER),
        _entry("mean, decided", marker="s", ms=5.5),
        _entry("mean, not decided", mfc=PAPER, **_MEANS[True]),
        _entry("95 % interval", ls="-", **_INTERVAL),
    ]
    # Around zero and the pairs, and intervals up to that width beside them.
    inner = [0.0, *(100 * pair for row in rows for pair in row.by_seed.values())]
    low, high = min(inner), max(inner)
    room = max(0.5, high - low)
    intervals = [row.interval for row in rows if row.interval is not None]
    ends = [100 * end for interval in intervals for end in (interval.low, interval.high) if end is not None]
    low, high = max(low - room, min([low, *ends])), min(high + room, max([high, *ends]))

    def paint(canvas: Canvas) -> None:
        axes = canvas.figure.add_subplot()
        axes.axvline(0, color=INK, lw=1, zorder=1)
        _rows(canvas, axes, rows, colors, (low - 0.05 * room, high + 0.05 * room), legend, scores, paired=True)
        end, words = "\n" if canvas.narrow else " ", scores.metric.words
        what = f"test {words} minus that of {reference}"
        if scores.metric.sign < 0:
            end, what = "\n", f"by how much the test {words} is smaller than that of {reference}"
        axes.set_xlabel(f"{what}{end}({'percentage points' if scores.metric.is_share else scores.unit})")

    caption = (
        f"Each run minus the run of {reference} with the same seed. Small circles: single pairs. Square and number: "
        "their mean. Line: 95 % t interval over seeds, with an arrow where it leaves the picture. The intervals "
        "describe and are not corrected for their number; the table's test decides. Filled squares: decided; open "
        f"squares: not decided.{note}"
    )
    data = [
        {
            "experiment": estimate.name,
            "reference": reference,
            "seed": seed,
            "difference": value,
            **_interval_values(estimate.interval),
            "verdict": estimate.verdict,
        }
        for estimate in estimates
        for seed, value in estimate.by_seed.items()
    ]
    title = f"How far from {reference}: paired differences"
    return draw(f"differences_to_{reference}", title, caption, 1.25 + _ROW_IN * len(rows), paint, data)


# --- loss over training -----------------------------------------------------------------------------------------------


_PANEL_ROW_IN = 1.65
_ENTRY_IN = 0.17  # of a legend
LINES = 24
_MEASURES = ("training loss", "validation NLL")


_VALUES = ("step", "mean", "lowest", "highest")  # of a curve


def curve_of(by_seed: Sequence[Mapping[int, float]]) -> np.ndarray:
    """Return the _VALUES over seeds at the steps that all of them recorded, (4, steps), of values by step."""
    steps = sorted(set.intersection(*map(set, by_seed)))
    values = np.array([[by_step[step] for step in steps] for by_step in by_seed], dtype=np.float64)  # (seeds, steps)
    return np.stack([np.array(steps, dtype=np.float64), values.mean(0), values.min(0), values.max(0)])


def loss_curves(study: Study, validation: Mapping[str, float]) -> Block:
    """Draw the curves of all finished runs: a row a method, training loss at the left, validation at the right.

    Args:
        study: with its runs.
        validation: experiment -> mean validation accuracy, which chooses what is drawn where there are many.
    """
    runs = {e.name: [run.record for run in study.runs_of(e.name) if run.record.steps] for e in study.experiments}
    recorded = [e for e in study.experiments if runs[e.name]]
    if not recorded:
        return Paragraph("No loss curves: no finished run of this study recorded its steps.")
    window = smoothing_window(max(len(record.steps) for e in recorded for record in runs[e.name]))
    drawn, note = leading(recorded, validation, LINES, attrgetter("name"))
    curves: dict[str, list[np.ndarray]] = {}
    for name in (e.name for e in drawn):
        evaluations = [{row.step: row.metrics.nll for row in record.evaluations} for record in runs[name]]
        curves[name] = [curve_of([smoothed_losses(record, window) for record in runs[name]]), curve_of(evaluations)]
    stride = max(1, -(-sum(curve.shape[1] for pair in curves.values() for curve in pair) // STEPS))
    curves = {name: [curve[:, ::-stride][:, ::-1] for curve in pair] for name, pair in curves.items()}
    rows = list(dict.fromkeys(e.method for e in drawn))

    def paint(canvas: Canvas) -> None:
        panels = canvas.figure.subplots(len(rows), 2, squeeze=False, sharex=True, sharey="col")
        handles: list[Line2D] = []
        for index, e in enumerate(drawn):
            style = line_style(index)
            canvas.series(e.name, style["color"], "")
            for axes, measure, curve in zip(panels[rows.index(e.method)], _MEASURES, curves[e.name], strict=True):
                step, mean, lowest, highest = curve
                band = axes.fill_between(step, lowest, highest, color=style["color"], alpha=0.15, lw=0)
                canvas.add(e.name, band)
                unit = f"{measure} (nats), mean, {counted(len(runs[e.name]), 'seed')}"
                texts = [f"step {x:.0f}: {fixed(y, 3)}\n{unit}" for x, y in zip(step, mean, strict=True)]
                look = style | {"lw": 1.6, "ms": 3.5, "marker": "o" if measure == "validation NLL" else ""}
                line = canvas.plot(e.name, axes, step, mean, texts, **look, label=e.name)
            handles.append(line)
        for row, method in zip(panels, rows, strict=True):
            row[0].set_ylabel(METHOD_KINDS[method].title)
        for axes, measure in zip(panels[0], _MEASURES, strict=True):
            axes.set_title(measure)
        for axes in panels[-1]:
            axes.set_xlabel("step")
        for axes in panels.flat:
            quiet_grid(axes)
        canvas.name_experiments(handles)

    right = "negative log-likelihood on the validation images after each epoch"
    if not any(run.record.evaluations for run in study.runs):
        right = "nothing, as there are no validation images"
    fewer = f" To keep the page small, one point in {stride} of each line is drawn, the last too."
    caption = (
        f"Left: task loss of the training batches, centered moving average over {window} steps. Right: {right}. Line: "
        "mean over seeds; band: lowest to highest. All rows of a column share one scale."
        f"{fewer if stride > 1 else ''}{note}"
    )
    data: list[dict[str, Raw]] = [
        {"experiment": name, "measure": measure} | dict(zip(_VALUES, (int(step), *values), strict=True))
        for name, pair in curves.items()
        for measure, curve in zip(_MEASURES, pair, strict=True)
        for step, *values in curve.T.tolist()
    ]
    height, legend = 0.6 + _PANEL_ROW_IN * len(rows), _ENTRY_IN * len(drawn)
    return draw("loss_curves", "Loss curves", caption, max(height, 0.3 + legend), paint, data, height + legend)


# --- blocks by matrix types: final ranks, and importance --------------------------------------------------------------


PANEL_IN = 2.8  # of an experiment
_COLORS = matplotlib.colormaps[SEQUENTIAL].with_extremes(bad=GRID)  # where there is nothing it is that of the grid


def rank_maps(allocations: Sequence[Allocation], note: str) -> Drawing:
    """Draw the mean final rank of every site; `note` is a sentence for the caption, with a space before it."""
    caption = "Rank of every module at the end, mean over seeds. Rows are blocks, columns are matrices."
    return _maps("rank_maps", "Ranks by layer and matrix", caption + note, allocations)


def importance_maps(patterns: Sequence[ImportancePattern], note: str) -> Drawing:
    """Draw the final relative score of every site; `note` is a sentence for the caption, with a space before it."""
    caption = (
        "Scores at the last decision, divided by the mean over their run's modules: 1 is an average module. Mean over "
        "seeds, each experiment on its own scale. A score is what the method decided with; it is not a measured harm."
    )
    return _maps("importance_by_layer", "Importance by layer", caption + note, patterns)


def _maps(slug: str, title: str, caption: str, maps: Sequence[Allocation | ImportancePattern]) -> Drawing:
    """Draw a panel an experiment; its first measure is drawn, the data have all."""

    def paint(canvas: Canvas) -> None:
        columns = 1 if canvas.narrow else 2
        parts = canvas.figure.subfigures(-(-len(maps) // columns), columns, squeeze=False).flat
        for part, panel in zip(parts, maps, strict=False):
            titled(canvas, part, panel.experiment)
            measure, values = next(iter(panel.measures.items()))
            norm, axes = Normalize(0, max(1.0, *values.values())), part.subplots()
            heat(canvas, axes, panel.experiment.name, panel.grid, values, norm, measure.replace("_", " "))
            color_bar(part, norm, axes, "")

    data: list[dict[str, Raw]] = []
    for panel in maps:
        for block, matrix, site in panel.grid.cells():
            cell: dict[str, Raw] = {"experiment": panel.experiment.name, "block": block, "matrix": matrix}
            values = {name: by_site.get(site) for name, by_site in panel.measures.items()}
            data.append(cell | values | {"seeds": panel.seeds})
    if any(not site for panel in maps for *_, site in panel.grid.cells()):
        caption += " Grey: the block has no such matrix."
    return draw(slug, title, caption, PANEL_IN * -(-len(maps) // 2), paint, data, PANEL_IN * len(maps))


def titled(canvas: Canvas, part: SubFigure, experiment: ExperimentConfig) -> None:
    """Write the experiment above its part of a figure."""
    canvas.series(experiment.name, METHOD_COLORS[experiment.method])
    part.suptitle(experiment.name, x=0.01, ha="left", fontweight="bold", fontsize="medium")


def heat(
    canvas: Canvas, axes: Axes, name: str, grid: Grid, values: Mapping[str, float], norm: Normalize, what: str
) -> None:
    """Draw values of sites, block 0 at the top, as vector cells."""
    cells = list(grid.cells())
    shape = (len(grid.blocks), len(grid.matrices))
    array = np.reshape([values.get(site, np.nan) for *_, site in cells], shape)
    mesh = axes.pcolormesh(np.ma.masked_invalid(array), cmap=_COLORS, norm=norm, edgecolors=PAPER, linewidth=0.4)
    axes.set_ylim(len(grid.blocks), 0)
    turned: dict[str, Any] = {"rotation": 90, "va": "center"} if canvas.narrow else {"rotation": 45}
    axes.set_xticks(np.arange(len(grid.matrices)) + 0.5, grid.matrices, rotation_mode="anchor", ha="right", **turned)
    axes.set_yticks(np.arange(len(grid.blocks)) + 0.5, [str(block) for block in grid.blocks])
    axes.tick_params(length=0, labelsize=7.5 if len(grid.blocks) <= 14 else 6.5)
    axes.set_ylabel("block")
    axes.spines[:].set_visible(False)
    texts = [
        f"block {block}, {matrix}\n{f'{what} {fixed(values[site])}' if site else 'no such matrix in this block'}"
        for block, matrix, site in cells
    ]
    canvas.add(name, mesh, texts)


def color_bar(part: SubFigure, norm: Normalize, axes: Axes | list[Axes], label: str) -> None:
    """Draw the scale of a part of a figure."""
    bar = part.colorbar(ScalarMappable(norm, _COLORS), ax=axes, pad=0.02, aspect=24)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set(rasterized=False, edgecolor="face")  # equal images would share an id
    bar.set_label(label)
    bar.ax.tick_params(length=0)
