"""Diagrams of lines: loss over training, how often a model is right when sure, and comparisons from look to look."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from peft_vit.base.statistics.sequential import SequentialResult
from peft_vit.core.config import METHOD_KINDS, StoppingConfig
from peft_vit.deploy.page.document import Block, Drawing, Paragraph, Raw
from peft_vit.deploy.page.figure import DASHED, INK, METHOD_COLORS, MUTED, Canvas, draw, leading, line_style, quiet_grid
from peft_vit.deploy.page.formatting import counted, fixed, points_interval
from peft_vit.deploy.page.lines import STEPS, _losses, _window
from peft_vit.deploy.page.tables import interval_columns
from peft_vit.lab.analysis import Study
from peft_vit.lab.analysis.stopping import ENDS, repeated_interval
from peft_vit.lab.report.method_tables import QUESTIONS, stopping_table

_ROW_IN = 1.65
_ENTRY_IN = 0.17  # of a legend
LINES = 24
_MEASURES = ("training loss", "validation NLL")


class Curve(NamedTuple):
    """What the seeds of an experiment recorded at the steps that all of them share, (steps,) each."""

    step: np.ndarray
    mean: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray

    @classmethod
    def of(cls, by_seed: Sequence[Mapping[int, float]]) -> Curve:
        """Return the curve over seeds of values by step."""
        steps = sorted(set.intersection(*map(set, by_seed)))
        values = np.array([[of[step] for step in steps] for of in by_seed], dtype=np.float64)  # (seeds, steps)
        return cls(np.array(steps), values.mean(axis=0), values.min(axis=0), values.max(axis=0))

    def thinned(self, stride: int) -> Curve:
        """Return every so many-th step, the last among them."""
        return Curve(*(values[::-stride][::-1] for values in self))


def loss_curves(study: Study, validation: Mapping[str, float]) -> Block:
    """Draw the curves of all finished runs: a row a method, training loss at the left, validation at the right.

    Args:
        study: with its runs.
        validation: experiment -> mean validation accuracy, which chooses what is drawn where there are many.
    """
    runs = {e.name: [run.record for run in study.of(e.name) if run.record.steps] for e in study.experiments}
    recorded = [e for e in study.experiments if runs[e.name]]
    if not recorded:
        return Paragraph("No loss curves: no finished run of this study recorded its steps.")
    window = _window(max(len(record.steps) for own in runs.values() for record in own))
    drawn, note = leading(recorded, validation, LINES, attrgetter("name"))
    curves: dict[str, tuple[Curve, Curve]] = {}
    for name in (e.name for e in drawn):
        evaluations = [{row.step: row.metrics.nll for row in record.evaluations} for record in runs[name]]
        curves[name] = Curve.of([_losses(record, window) for record in runs[name]]), Curve.of(evaluations)
    stride = max(1, -(-sum(curve.step.size for pair in curves.values() for curve in pair) // STEPS))
    curves = {name: (train.thinned(stride), own.thinned(stride)) for name, (train, own) in curves.items()}
    rows = list(dict.fromkeys(e.method for e in drawn))

    def paint(canvas: Canvas) -> None:
        panels = canvas.figure.subplots(len(rows), 2, squeeze=False, sharex=True, sharey="col")
        handles: list[Line2D] = []
        for index, e in enumerate(drawn):
            style = line_style(index)
            canvas.series(e.name, style["color"], "")
            for axes, measure, curve in zip(panels[rows.index(e.method)], _MEASURES, curves[e.name], strict=True):
                band = axes.fill_between(
                    curve.step, curve.lowest, curve.highest, color=style["color"], alpha=0.15, lw=0
                )
                canvas.add(e.name, band)
                of = f"{measure} (nats), mean, {counted(len(runs[e.name]), 'seed')}"
                texts = [f"step {x}: {fixed(float(y), 3)}\n{of}" for x, y in zip(curve.step, curve.mean, strict=True)]
                look = style | {"lw": 1.6, "ms": 3.5, "marker": "o" if measure == "validation NLL" else ""}
                line = canvas.plot(e.name, axes, curve.step, curve.mean, texts, **look, label=e.name)
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
        {"experiment": name, "measure": measure}
        | {column: value.item() for column, value in zip(Curve._fields, values, strict=True)}
        for name, pair in curves.items()
        for measure, curve in zip(_MEASURES, pair, strict=True)
        for values in zip(*curve, strict=True)
    ]
    height, legend = 0.6 + _ROW_IN * len(rows), _ENTRY_IN * len(drawn)
    return draw("loss_curves", "Loss curves", caption, max(height, 0.3 + legend), paint, data, height + legend)


PANELS = 12
_COLUMNS, _PANEL_IN = 3, 1.75
_DASHES = {"noninferiority": DASHED, "superiority": "-"}
_SIDES = ("upper_bound", "lower_bound")


def stopping_blocks(
    study: Study, results: Sequence[SequentialResult], validation: Mapping[str, float]
) -> Iterator[Block]:
    """Yield figure and table of the comparisons that stop; nothing of a study that declared none.

    Args:
        study: the study.
        results: of its comparisons.
        validation: experiment -> mean validation accuracy, by which panels are chosen if there are too many.
    """
    if study.stopping is None:
        return
    if looked := [result for result in results if result.looks]:
        yield _stopping_figure(study, looked, study.stopping, validation)
    yield stopping_table(results, study.stopping, study.scores)


def _stopping_figure(
    study: Study, results: Sequence[SequentialResult], stopping: StoppingConfig, validation: Mapping[str, float]
) -> Drawing:
    """Draw a panel a comparison: its mean difference from look to look, between the bounds that decide it."""
    drawn, note = leading(results, validation, PANELS, lambda result: result.name)
    colors, scores = {e.name: METHOD_COLORS[e.method] for e in study.experiments}, study.scores
    questions = {field: words for field, words in QUESTIONS.items() if getattr(drawn[0], field) is not None}
    legend = [
        Line2D([], [], color=MUTED, marker="o", ms=4, lw=1.2, label="difference, with its repeated interval"),
        *(
            Line2D([], [], color=INK, lw=1, ls=_DASHES[field], label=f"bounds of “{words}”")
            for field, words in questions.items()
        ),
    ]

    def paint(canvas: Canvas) -> None:
        columns = 1 if canvas.narrow else min(_COLUMNS, len(drawn))
        panels = canvas.figure.subplots(math.ceil(len(drawn) / columns), columns, squeeze=False)
        for axes, result in zip(panels.flat, drawn, strict=False):
            _stopping_panel(axes, canvas, result, stopping, colors[result.name], list(questions), scores.unit)
            axes.set_xlim(0, 1.05 * max(look.pairs for other in drawn for look in other.looks))
        for axes in panels.flat[len(drawn) :]:
            axes.set_axis_off()
        for axes in panels.flat[max(0, len(drawn) - columns) : len(drawn)]:
            axes.set_xlabel("pairs")
        canvas.figure.supylabel(f"minus {stopping.control} ({scores.unit})", fontsize="medium")
        canvas.legend(legend, (1, len(legend)))

    margin = "" if stopping.margin is None else f" Not worse is meant by {scores.hundredths(stopping.margin / 100)}."
    caption = (
        f"Mean difference to {stopping.control} at each look, over the pairs that there were. Above the upper of "
        "two bounds of a question its answer is yes, below the lower one the opposite is shown. Bounds outside "
        "the picture could hardly be reached at that look; all come closer when other comparisons are "
        f"decided.{margin} The table has the verdicts.{note}"
    )
    title = f"How the comparisons went with {stopping.control}"
    height, narrow = 0.9 + _PANEL_IN * math.ceil(len(drawn) / _COLUMNS), 1.2 + _PANEL_IN * len(drawn)
    data: list[dict[str, Raw]] = []
    for result in results:
        for look in result.looks:
            row: dict[str, Raw] = {"experiment": result.name, "control": stopping.control, "pairs": look.pairs}
            row |= interval_columns("difference", repeated_interval(look, stopping))
            del row["n"]
            for field in QUESTIONS:
                if (test := getattr(look, field)) is not None:
                    row |= {f"{field}_{side}": _finite(getattr(test, side)) for side in _SIDES}
                    row[field] = getattr(result, field)
            data.append(row | {"stopped": result.stopped})
    return draw("courses", title, caption, height, paint, data, narrow)


def _stopping_panel(
    axes: Axes,
    canvas: Canvas,
    result: SequentialResult,
    stopping: StoppingConfig,
    color: str,
    fields: Sequence[str],
    unit: str,
) -> None:
    name, pairs = result.name, [look.pairs for look in result.looks]
    differences = [100 * look.difference for look in result.looks]
    axes.axhline(0, color=MUTED, lw=0.8, zorder=1)
    heights = [0.5, *map(abs, differences)]
    for field in fields:
        for side in _SIDES:
            bounds = [_finite(getattr(getattr(look, field), side)) for look in result.looks]
            points = [math.nan if bound is None else 100 * bound for bound in bounds]
            axes.plot(pairs, points, color=INK, lw=1, ls=_DASHES[field], marker="_", ms=7, zorder=2)
            heights += [abs(point) for point in points[-1:] if not math.isnan(point)]
    canvas.series(name, color, "o")
    texts = [
        f"{look.pairs} pairs: {points_interval(repeated_interval(look, stopping))} {unit}" for look in result.looks
    ]
    for look in result.looks:
        if math.isfinite(look.high - look.low):
            ends_of = [100 * look.low, 100 * look.high]
            canvas.plot(name, axes, [look.pairs] * 2, ends_of, color=color, lw=2.2, alpha=0.35, zorder=3)
    canvas.plot(name, axes, pairs, differences, texts, color=color, marker="o", ms=4, lw=1.2, zorder=4)
    axes.set_ylim(-1.4 * max(heights), 1.4 * max(heights))
    axes.set_title(f"{name}: {ENDS[result.stopped]}", fontsize="small")
    quiet_grid(axes, "y")


def _finite(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None
