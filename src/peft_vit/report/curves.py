"""Loss over training: one row a method, training loss at the left, validation at the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peft_vit.analysis import Run, Study
from peft_vit.config import ExperimentConfig
from peft_vit.report.document import Block, Paragraph, Raw
from peft_vit.report.formatting import counted, fixed
from peft_vit.report.hover import HoverPoints
from peft_vit.report.plot_selection import SINGLE_SEEDS, leading, selection_note
from peft_vit.report.style import METHOD_TITLES, draw, is_narrow, line_look, quiet_grid

_ROW_IN = 1.65
_ENTRY_IN = 0.16
PER_METHOD = 8  # a row has room for so many names
VERTICES = 12_000  # of all lines together
Measure = Literal["training loss", "validation NLL"]


_Line = tuple[np.ndarray, np.ndarray]  # steps and values, (steps,) each


@dataclass(frozen=True)
class _Bundle:
    """The lines of one experiment and measure.

    They stand by what they are of: "mean", where all seeds recorded the same steps, and "seed 3" and so on, or of many
    seeds "lowest" and "highest".
    """

    experiment: str
    measure: Measure
    seeds: int
    lines: dict[str, _Line]


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Return the centered moving average; at the ends over what there is of the window."""
    data, box, half = np.asarray(values, dtype=np.float64), np.ones(window), window // 2
    sums, counts = np.convolve(data, box), np.convolve(np.ones_like(data), box)
    return np.asarray((sums / counts)[half : half + data.size])


def loss_curves(study: Study, validation: Mapping[str, float]) -> Block:
    """Draw the curves of all finished runs.

    Args:
        study: with its runs.
        validation: experiment -> mean validation accuracy, which chooses what is drawn where there are many.
    """
    by_name = {e.name: [run for run in study.of(e.name) if run.record.steps] for e in study.experiments}
    recorded = [e for e in study.experiments if by_name[e.name]]
    if not recorded:
        return Paragraph("No loss curves: no finished run of this study recorded its steps.")
    longest = max(len(run.record.steps) for runs in by_name.values() for run in runs)
    window = longest // 20 * 2 + 1  # about a tenth, odd so that it has a center
    by_method: dict[str, list[ExperimentConfig]] = {}
    for experiment in recorded:
        by_method.setdefault(experiment.method, []).append(experiment)
    rows = {method: leading(own, validation, PER_METHOD, lambda e: e.name) for method, own in by_method.items()}
    drawn = [e for members in rows.values() for e in members]
    pairs = {e.name: _bundles(e.name, by_name[e.name], window) for e in drawn}
    bundles = [bundle for pair in pairs.values() for bundle in pair]
    vertices = sum(steps.size for bundle in bundles for steps, _ in bundle.lines.values())
    stride = max(1, -(-vertices // VERTICES))  # every so many-th vertex of each line is few enough to draw

    def paint(figure: Figure) -> HoverPoints:
        hover = HoverPoints()
        for (method, members), (left, right) in zip(rows.items(), _panels(figure, len(rows)), strict=True):
            for index, experiment in enumerate(members):
                hover.series(experiment.name, line_look(index)["color"], "")
                for axes, bundle in zip((left, right), pairs[experiment.name], strict=True):
                    _draw_bundle(axes, hover, bundle, index, stride)
            left.set_ylabel(METHOD_TITLES[method])
            _legend(figure, left, right)
        return hover

    note = selection_note(len(drawn), len(recorded)).replace("accuracy on validation", "accuracy on validation, by row")
    if stride > 1:
        note = f" To keep the page small, one point in {stride} of each line is drawn, the last too.{note}"
    caption = _caption(study, bundles, window) + note
    entries = max(len(members) for members in rows.values())
    height = 0.6 + max(_ROW_IN, 0.5 + _ENTRY_IN * entries) * len(rows)
    narrow = 0.6 + (_ROW_IN + _ENTRY_IN * entries) * len(rows)
    data: list[dict[str, Raw]] = [
        {
            "experiment": bundle.experiment,
            "measure": bundle.measure,
            "of": of,
            "step": int(steps[i]),
            "value": float(values[i]),
        }
        for bundle in bundles
        for of, (steps, values) in bundle.lines.items()
        for i in _kept(steps.size, stride)
    ]
    return draw("loss_curves", "Loss curves", caption, height, paint, data, narrow)


def _caption(study: Study, bundles: Sequence[_Bundle], window: int) -> str:
    validated = "negative log-likelihood on the validation images after each epoch"
    if not any(run.record.evaluations for run in study.runs):
        validated = "nothing, as there are no validation images"
    said = {False: "thin: single seeds", True: f"band: lowest to highest of more than {SINGLE_SEEDS} seeds"}
    return (
        f"Left: task loss of the training batches, centered moving average over {window} steps. "
        f"Right: {validated}. Thick: mean over seeds; "
        f"{'; '.join(said[kind] for kind in sorted({'lowest' in bundle.lines for bundle in bundles}))}. "
        "All rows of a column share one scale."
    )


def _bundles(name: str, runs: Sequence[Run], window: int) -> tuple[_Bundle, _Bundle]:
    train, validation = {}, {}
    for run in runs:
        steps, evaluations, of = run.record.steps, run.record.evaluations, f"seed {run.seed}"
        train[of] = np.array([row.step for row in steps]), smoothed([row.loss for row in steps], window)
        nll = np.array([e.metrics.nll for e in evaluations], dtype=np.float64)
        validation[of] = np.array([e.step for e in evaluations]), nll
    return _bundle(name, "training loss", train), _bundle(name, "validation NLL", validation)


def _bundle(name: str, measure: Measure, by_seed: dict[str, _Line]) -> _Bundle:
    if len({tuple(steps) for steps, _ in by_seed.values()}) > 1:  # a mean needs the same steps in every seed
        return _Bundle(name, measure, len(by_seed), by_seed)
    steps = next(iter(by_seed.values()))[0]
    values = np.stack([line for _, line in by_seed.values()])  # (seeds, steps)
    lines = {"mean": (steps, values.mean(axis=0))}
    if len(by_seed) > SINGLE_SEEDS:
        lines |= {"lowest": (steps, values.min(axis=0)), "highest": (steps, values.max(axis=0))}
    else:
        lines |= by_seed
    return _Bundle(name, measure, len(by_seed), lines)


def _kept(size: int, stride: int) -> np.ndarray:
    """Return every stride-th of so many places, and the last."""
    return np.unique(np.append(np.arange(0, size, stride), max(0, size - 1))) if size else np.arange(0)


def _panels(figure: Figure, rows: int) -> list[tuple[Axes, Axes]]:
    """Return the axes of each row; all of a column share their scales."""
    if is_narrow(figure):  # each row has a legend below it, so a layout of its own
        panels = np.array([sub.subplots(1, 2) for sub in figure.subfigures(rows, 1, squeeze=False)[:, 0]])
        for row in panels[1:]:
            for axes, first in zip(row, panels[0], strict=True):
                axes.sharex(first)
                axes.sharey(first)
    else:
        panels = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey="col")
    panels[0][0].set_title("training loss")
    panels[0][1].set_title("validation NLL")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    for axes in panels.flat:
        quiet_grid(axes)
    return [(row[0], row[1]) for row in panels]


def _legend(figure: Figure, left: Axes, right: Axes) -> None:
    """Name the lines of a row: beside it, or in a narrow figure below it."""
    if is_narrow(figure):
        handles, _ = left.get_legend_handles_labels()
        left.figure.legend(handles=handles, loc="outside lower center", labelspacing=0.2, borderaxespad=0.1)
    else:
        right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.8, borderaxespad=0.3)


def _draw_bundle(axes: Axes, hover: HoverPoints, bundle: _Bundle, index: int, stride: int) -> None:
    name, look, lines = bundle.experiment, line_look(index), bundle.lines

    def line(of: str, texts: bool, **more: object) -> None:
        steps, values = lines[of]
        kept = _kept(steps.size, stride)
        who = f"mean, {counted(bundle.seeds, 'seed')}" if of == "mean" else of
        what = f"{bundle.measure} (nats), {who}"
        said = [f"step {steps[i]}: {fixed(float(values[i]), 3)}\n{what}" for i in kept] if texts else []
        hover.plot(name, axes, steps[kept], values[kept], said, **look, **more)

    if "lowest" in lines:
        (steps, low), (_, high) = lines["lowest"], lines["highest"]
        kept, color = _kept(steps.size, stride), look["color"]
        hover.add(name, axes.fill_between(steps[kept], low[kept], high[kept], color=color, alpha=0.15, lw=0))
    else:
        for of in [of for of in lines if of != "mean"]:
            line(of, "mean" not in lines, lw=0.7, alpha=0.4)
    if "mean" not in lines:
        axes.plot([], [], **look, lw=1.6, label=name)
    else:
        marker = "o" if bundle.measure == "validation NLL" else ""
        line("mean", True, lw=1.6, marker=marker, ms=3.5, label=name)
