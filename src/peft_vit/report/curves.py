"""Loss over training: one row a method, training loss at the left, validation at the right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peft_vit.analysis import Run, Study
from peft_vit.config import Method
from peft_vit.report.document import Block, Paragraph
from peft_vit.report.style import METHOD_TITLES, draw, quiet_grid

_ROW_IN = 1.65
# Within a row only few lines need telling apart: Okabe and Ito's colors without yellow, which is faint on paper.
_LINE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Return the centered moving average; at the ends over what there is of the window."""
    data = np.asarray(values, dtype=np.float64)
    half = window // 2
    return np.array([data[max(0, i - half) : i + half + 1].mean() for i in range(data.size)])


def loss_curves(study: Study) -> Block:
    """Draw the curves of all finished runs."""
    recorded = [run for run in study.runs if run.record.steps]
    methods: list[Method] = list(dict.fromkeys(run.experiment.method for run in recorded))
    if not methods:
        return Paragraph("No loss curves: no finished run of this study recorded its steps.")
    window = max(len(run.record.steps) for run in recorded) // 20 * 2 + 1  # about a tenth, odd so that it has a center

    def paint(figure: Figure) -> None:
        panels = figure.subplots(len(methods), 2, squeeze=False, sharex=True, sharey="col")
        for row, method in enumerate(methods):
            left, right = panels[row]
            for index, experiment in enumerate(study.with_method(method)):
                _experiment(left, right, study.of(experiment.name), index, window)
            left.set_ylabel(METHOD_TITLES[method])
            right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.8, borderaxespad=0.3)
            for axes in (left, right):
                quiet_grid(axes)
        panels[0][0].set_title("training loss")
        panels[0][1].set_title("validation NLL")
        for axes in panels[-1]:
            axes.set_xlabel("step")

    caption = (
        f"Left: task loss of the training batches, centered moving average over {window} steps. "
        "Right: negative log-likelihood on the validation images after each epoch. Thick: mean over "
        "seeds; thin: single seeds. All rows of a column share one scale."
    )
    return draw("loss_curves", "Loss curves", caption, 0.6 + _ROW_IN * len(methods), paint)


def _experiment(left: Axes, right: Axes, runs: Sequence[Run], index: int, window: int) -> None:
    color = _LINE_COLORS[index % len(_LINE_COLORS)]
    dashes = _DASHES[index // len(_LINE_COLORS) % len(_DASHES)]
    label = runs[0].experiment.name
    train = [
        ([row.step for row in run.record.steps], smoothed([row.loss for row in run.record.steps], window))
        for run in runs
    ]
    validation = [
        ([e.step for e in run.record.evaluations], np.array([e.metrics.nll for e in run.record.evaluations]))
        for run in runs
    ]
    for axes, curves, marker in ((left, train, ""), (right, validation, "o")):
        for steps, values in curves:
            axes.plot(steps, values, color=color, lw=0.7, alpha=0.4, ls=dashes)
        if len({tuple(steps) for steps, _ in curves}) == 1:  # a mean needs the same steps in every seed
            mean = np.mean([values for _, values in curves], axis=0)
            axes.plot(curves[0][0], mean, color=color, lw=1.6, ls=dashes, marker=marker, ms=3.5, label=label)
        else:
            axes.plot([], [], color=color, lw=1.6, ls=dashes, label=label)
