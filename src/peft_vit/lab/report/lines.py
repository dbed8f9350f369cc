"""Diagrams of lines: loss over training, and how often a model is right when sure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

import numpy as np
from matplotlib.lines import Line2D

from peft_vit.core.config import METHOD_KINDS
from peft_vit.deploy.page.document import Block, Paragraph, Raw
from peft_vit.deploy.page.figure import Canvas, draw, leading, line_style, quiet_grid
from peft_vit.deploy.page.formatting import counted, fixed
from peft_vit.deploy.page.lines import STEPS, smoothed_losses, smoothing_window
from peft_vit.lab.analysis import Study

_ROW_IN = 1.65
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
    height, legend = 0.6 + _ROW_IN * len(rows), _ENTRY_IN * len(drawn)
    return draw("loss_curves", "Loss curves", caption, max(height, 0.3 + legend), paint, data, height + legend)
