"""Accuracy against what it costs: by parameters and by bytes with every seed, and the Pareto front of each cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import ScaledTranslation

from peft_vit.analysis import Front, MethodResult
from peft_vit.analysis.comparison import CostName
from peft_vit.config import LoraConfig
from peft_vit.report.document import Drawing, Raw
from peft_vit.report.figure import (
    INK,
    MARKERS,
    METHOD_COLORS,
    PAPER,
    SEED_DOTS,
    Canvas,
    draw,
    leading,
    quiet_grid,
    validation_means,
)
from peft_vit.report.formatting import COSTS, counted, percent, percent_interval

LEGEND_ENTRIES = 24
_MARKER_STEP_PT = 7.0
_PANEL_IN = 2.5
_READ = (
    "Dots: single seeds, joined by a thin line. Large marker: mean. Of markers at the same place the "
    "leftmost stands where it belongs, the others beside it."
)


class _Against(NamedTuple):
    """A figure of accuracy against a cost; `columns` of its data are fields of a result."""

    slug: str
    title: str
    caption: str
    label: str
    columns: dict[str, str]


_AGAINST: dict[CostName, _Against] = {
    "final_parameters": _Against(
        "accuracy_by_parameters",
        "Accuracy against trainable parameters",
        f"{_READ} The blue line joins the fixed-rank LoRA means: an adaptive method earns its cost where it lies above "
        "that line.",
        "trainable parameters at the end of the run,{end}head included (log scale)",
        {"trainable_parameters": "final_parameters"},
    ),
    "stored_bytes": _Against(
        "accuracy_by_bytes",
        "Accuracy against bytes",
        "What must be stored for one task: the frozen weights as they are held, scales and offsets included, plus the "
        f"saved adapter. {_READ}",
        "frozen weights + adapter file (MB, 10⁶ bytes)",
        {"frozen_bytes": "frozen_bytes", "adapter_file_bytes": "adapter_file_bytes"},
    ),
}


def accuracy_against(cost: CostName, methods: Sequence[MethodResult]) -> Drawing:
    """Draw every seed and the mean of each experiment at its cost: trainable parameters (log scale), or bytes."""
    own, words = _AGAINST[cost], COSTS[cost]
    drawn, note = leading(methods, validation_means(methods), LEGEND_ENTRIES)

    def paint(canvas: Canvas) -> None:
        axes = canvas.figure.add_subplot()
        places = [words.scale * getattr(m, cost) for m in drawn]
        _scatter(canvas, axes, drawn, places, [f"{words.write(getattr(m, cost))}{words.unit}" for m in drawn])
        if cost == "final_parameters":
            ranked = [(m, lora) for m in drawn if (lora := m.experiment.section(LoraConfig)) is not None]
            line = sorted((m.final_parameters, 100 * m.test_accuracy.estimate) for m, lora in ranked if lora.rank)
            if len(line) > 1:
                axes.plot(*zip(*line, strict=True), color=METHOD_COLORS["lora"], lw=1.2, alpha=0.6, zorder=2)
            _count_axis(axes)
        else:
            axes.set_xlim(0, 1.1 * max(places))  # room for markers beside the last one
        axes.set_xlabel(own.label.format(end="\n" if canvas.narrow else " "))

    data: list[dict[str, Raw]] = [
        {
            "experiment": m.experiment.name,
            "method": m.experiment.method,
            "seed": seed,
            "test_accuracy": value,
            "mean_test_accuracy": m.test_accuracy.estimate,
            **{column: getattr(m, field) for column, field in own.columns.items()},
        }
        for m in methods
        for seed, value in zip(m.seeds, m.by_seed, strict=True)
    ]
    return draw(own.slug, own.title, own.caption + note, 3.9, paint, data, 2.7 + 0.14 * len(drawn))


Looks = Mapping[str, tuple[str, str]]
"""Experiment -> color of its method, and a marker that up to a dozen others do not have."""


def _looks(methods: Sequence[MethodResult]) -> Looks:
    return {
        method.experiment.name: (METHOD_COLORS[method.experiment.method], MARKERS[index % len(MARKERS)])
        for index, method in enumerate(methods)
    }


def _legend(canvas: Canvas, looks: Looks) -> None:
    canvas.name_experiments(
        [Line2D([], [], marker=m, ls="", color=color, ms=6, label=name) for name, (color, m) in looks.items()]
    )


def _scatter(
    canvas: Canvas, axes: Axes, methods: Sequence[MethodResult], places: Sequence[float], says: Sequence[str]
) -> None:
    """Draw each seed and the mean of each method at its place; `says` is what a place is."""
    looks = _looks(methods)
    for method, x, offset, said in zip(methods, places, side_by_side(places), says, strict=True):
        name, mean = method.experiment.name, 100 * method.test_accuracy.estimate
        color, marker = looks[name]
        canvas.series(name, color, marker)
        moved = axes.transData + ScaledTranslation(offset / 72, 0, canvas.figure.dpi_scale_trans)
        seeds = [100 * value for value in method.by_seed]
        span = [min(seeds), max(seeds)]
        canvas.plot(name, axes, [x, x], span, color=color, lw=0.8, alpha=0.5, zorder=2, transform=moved)
        if len(seeds) <= SEED_DOTS:
            texts = [f"seed {s}: {percent(v)}\n{said}" for s, v in zip(method.seeds, method.by_seed, strict=True)]
            look = {"marker": ".", "ls": "", "ms": 4, "alpha": 0.7, "zorder": 3}
            canvas.plot(name, axes, [x] * len(seeds), seeds, texts, color=color, transform=moved, **look)
        texts = [f"mean, {counted(len(seeds), 'seed')}: {percent_interval(method.test_accuracy)}\n{said}"]
        look = {"marker": marker, "ls": "", "ms": 6.5, "mec": PAPER, "mew": 0.6, "zorder": 4}
        canvas.plot(name, axes, [x], [mean], texts, color=color, transform=moved, **look)
    # Moved artists do not count for the limits on their own.
    axes.update_datalim([(x, 100 * v) for m, x in zip(methods, places, strict=True) for v in m.by_seed])
    axes.margins(x=0.1, y=0.08)
    axes.autoscale_view()
    axes.set_ylabel("test accuracy (%)")
    quiet_grid(axes)
    _legend(canvas, looks)


def side_by_side(positions: Sequence[float]) -> list[float]:
    """Return offsets in points: of markers at the same position (within 0.2 %), the first stays, others follow."""
    return [
        _MARKER_STEP_PT * sum(abs(position - other) <= 0.002 * position for other in positions[:i])
        for i, position in enumerate(positions)
    ]


def _count_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.minorticks_off()


def short_count(value: float) -> str:
    """Return 1000 as 1k and 1000000 as 1M."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"


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
    looks = _looks(leading(methods, first, LEGEND_ENTRIES)[0])

    def paint(canvas: Canvas) -> None:
        for name, (color, marker) in looks.items():
            canvas.series(name, color, marker)
        columns = 1 if canvas.narrow else 2
        panels = canvas.figure.subplots(-(-len(shown) // columns), columns, squeeze=False, sharey=True).ravel()
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        for axes, front in zip(panels, shown, strict=False):
            _front_panel(axes, canvas, front, looks)
        for axes in panels[: len(shown) : columns]:
            axes.set_ylabel("validation accuracy (%)")
        _legend(canvas, looks)

    some = (
        f" Drawn are {len(looks)} of {len(methods)} experiments: those on a front first, then those with the highest "
        "mean accuracy on validation."
    )
    caption = (
        "Means over seeds. Filled: on the front of validation accuracy, which nobody beats at no more cost, and joined "
        "by a stair. Open: beaten by another. Validation chooses the front; the table has the accuracy on test and "
        f"what the paired test says of each step.{'' if len(looks) == len(methods) else some}"
    )
    data: list[dict[str, Raw]] = [
        {
            "cost": front.cost,
            "experiment": point.experiment,
            "value": point.cost,
            "validation_accuracy": point.validation_accuracy,
            "test_accuracy": point.test_accuracy.estimate,
            "on_front": "yes" if point.on_front else "no",
        }
        for front in shown
        for point in front.points
    ]
    height = _PANEL_IN * -(-len(shown) // 2) + 0.4
    narrow = _PANEL_IN * len(shown) + 0.4 + 0.14 * len(looks)
    return (
        draw("pareto_fronts", "Pareto fronts: accuracy against what it costs", caption, height, paint, data, narrow),
    )


def _front_panel(axes: Axes, canvas: Canvas, front: Front, looks: Looks) -> None:
    cost = COSTS[front.cost]
    stair = [(cost.scale * p.cost, 100 * p.validation_accuracy) for p in front.on_front]
    axes.step(*zip(*stair, strict=True), where="post", color=INK, lw=0.9, alpha=0.6, zorder=2)
    for point in front.points:
        if point.experiment not in looks:
            continue
        color, marker = looks[point.experiment]
        stands = "on the front" if point.on_front else "not on the front"
        accuracies = f"validation {percent(point.validation_accuracy)}, test {percent(point.test_accuracy.estimate)}"
        texts = [f"{cost.write(point.cost)}{cost.unit}: {stands}\n{accuracies}"]
        look = {"marker": marker, "ls": "", "ms": 6, "mfc": color if point.on_front else PAPER, "mec": color}
        x, y = cost.scale * point.cost, 100 * point.validation_accuracy
        canvas.plot(point.experiment, axes, [x], [y], texts, color=color, mew=1.2, **look, zorder=3)
    if front.cost == "final_parameters":
        _count_axis(axes)
    axes.margins(x=0.08, y=0.1)
    axes.set_xlabel(cost.axis)
    quiet_grid(axes)
