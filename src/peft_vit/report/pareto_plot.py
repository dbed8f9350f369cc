"""Accuracy against each cost, with the experiments that nobody beats at their cost joined by a stair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from peft_vit.analysis import Front, MethodResult
from peft_vit.report.document import Drawing, Raw
from peft_vit.report.formatting import count, fixed, megabytes, percent
from peft_vit.report.hover import HoverPoints
from peft_vit.report.plot_selection import leading, validation_means
from peft_vit.report.scatter import LEGEND_ENTRIES, MARKERS, place_legend, short_count
from peft_vit.report.style import INK, METHOD_COLORS, PAPER, draw, is_narrow, quiet_grid

_PANEL_IN = 2.5
_AXES = {
    "final_parameters": ("trainable parameters", 1.0),
    "stored_bytes": ("stored (MB, 10⁶ bytes)", 1e-6),
    "seconds_per_step": ("training (s a step)", 1.0),
    "latency_s": ("latency of one image (ms)", 1e3),
}


def pareto_panels(fronts: Sequence[Front], methods: Sequence[MethodResult]) -> tuple[Drawing, ...]:
    """Return one figure with a panel for each cost that can be compared; none where there is no such cost.

    Args:
        fronts: of the study.
        methods: of the study, for colors and for what is drawn where there are many.
    """
    shown = [front for front in fronts if front.points]
    if not shown or len(methods) < 2:
        return ()
    on_front = {point.experiment for front in shown for point in front.on_front}
    first = {name: value + (name in on_front) for name, value in validation_means(methods).items()}
    chosen = leading([m.experiment.name for m in methods], first, LEGEND_ENTRIES)
    looks = _looks([methods[i] for i in chosen])

    def paint(figure: Figure) -> HoverPoints:
        hover = HoverPoints()
        for name, (color, marker) in looks.items():
            hover.series(name, color, marker)
        columns = 1 if is_narrow(figure) else 2
        rows = -(-len(shown) // columns)
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        for index, (axes, front) in enumerate(zip(panels, shown, strict=False)):
            _panel(axes, hover, front, looks)
            if index % columns == 0:
                axes.set_ylabel("validation accuracy (%)")
        place_legend(
            figure,
            [
                Line2D([], [], marker=marker, ls="", color=color, ms=6, label=name)
                for name, (color, marker) in looks.items()
            ],
        )
        return hover

    caption = (
        "Means over seeds. Filled: on the front of validation accuracy, which nobody beats at no more cost, and joined "
        "by a stair. Open: beaten by another. Validation chooses the front; the table has the accuracy on test and "
        f"what the paired test says of each step.{_note(len(looks), len(methods))}"
    )
    height = _PANEL_IN * -(-len(shown) // 2) + 0.4
    narrow = _PANEL_IN * len(shown) + 0.4 + 0.14 * len(looks)
    title = "Pareto fronts: accuracy against what it costs"
    return (draw("pareto_fronts", title, caption, height, paint, _rows(shown), narrow),)


def _note(drawn: int, there: int) -> str:
    if drawn == there:
        return ""
    return (
        f" Drawn are {drawn} of {there} experiments: those on a front first, then those with the highest mean accuracy "
        "on validation."
    )


def _looks(methods: Sequence[MethodResult]) -> dict[str, tuple[str, str]]:
    """Return experiment -> color of its method, and a marker that others of the method do not have."""
    seen: dict[str, int] = {}
    looks = {}
    for method in methods:
        family = method.experiment.method
        index = seen[family] = seen.get(family, -1) + 1
        looks[method.experiment.name] = (METHOD_COLORS[family], MARKERS[index % len(MARKERS)])
    return looks


def _panel(axes: Axes, hover: HoverPoints, front: Front, looks: Mapping[str, tuple[str, str]]) -> None:
    label, scale = _AXES[front.cost]
    stair = [(scale * p.cost, 100 * p.validation_accuracy) for p in front.on_front]
    axes.step(*zip(*stair, strict=True), where="post", color=INK, lw=0.9, alpha=0.6, zorder=2)
    for point in front.points:
        if point.experiment not in looks:
            continue
        color, marker = looks[point.experiment]
        (mark,) = axes.plot(
            [scale * point.cost],
            [100 * point.validation_accuracy],
            marker,
            ms=6,
            color=color,
            mfc=color if point.on_front else PAPER,
            mec=color,
            mew=1.2,
            zorder=3,
        )
        stands = "on the front" if point.on_front else "not on the front"
        accuracies = f"validation {percent(point.validation_accuracy)}, test {percent(point.test_accuracy.estimate)}"
        hover.add(point.experiment, mark, [f"{_cost(front, point.cost)}: {stands}\n{accuracies}"])
    if front.cost == "final_parameters":
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        axes.minorticks_off()
    axes.margins(x=0.08, y=0.1)
    axes.set_xlabel(label)
    quiet_grid(axes)


def _cost(front: Front, cost: float) -> str:
    if front.cost == "final_parameters":
        return f"{count(cost)} trainable parameters"
    if front.cost == "stored_bytes":
        return f"{megabytes(cost)} to store"
    if front.cost == "seconds_per_step":
        return f"{fixed(cost, 3)} s a step"
    return f"{fixed(1e3 * cost, 2)} ms an image"


def _rows(fronts: Sequence[Front]) -> list[dict[str, Raw]]:
    return [
        {
            "cost": front.cost,
            "experiment": point.experiment,
            "value": point.cost,
            "validation_accuracy": point.validation_accuracy,
            "test_accuracy": point.test_accuracy.estimate,
            "on_front": "yes" if point.on_front else "no",
        }
        for front in fronts
        for point in front.points
    ]
