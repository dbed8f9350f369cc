"""Accuracy against what it costs: each seed, the mean, and the line of fixed-rank LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import ScaledTranslation

from peft_vit.analysis import MethodResult
from peft_vit.config import LoraConfig
from peft_vit.report.document import Drawing, Raw
from peft_vit.report.formatting import count, counted, megabytes, percent, percent_interval
from peft_vit.report.hover import HoverPoints
from peft_vit.report.plot_selection import leading, many_seeds, selection_note, validation_means
from peft_vit.report.style import METHOD_COLORS, PAPER, draw, is_narrow, quiet_grid

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
LEGEND_ENTRIES = 24
_MARKER_STEP_PT = 7.0
_SCATTER_CAPTION = (
    "Dots: single seeds, joined by a thin line. Large marker: mean. Of markers at the same place the "
    "leftmost stands where it belongs, the others beside it."
)


def accuracy_by_parameters(methods: Sequence[MethodResult]) -> Drawing:
    """Draw accuracy against final trainable parameters, log scale."""
    drawn = _drawn(methods)

    def paint(figure: Figure) -> HoverPoints:
        axes = figure.add_subplot()
        hover = _scatter(figure, axes, drawn, lambda m: m.final_parameters, _parameters)
        line = [(m.final_parameters, 100 * m.test_accuracy.estimate) for m in _fixed_rank(drawn)]
        if len(line) > 1:
            axes.plot(*zip(*sorted(line), strict=True), color=METHOD_COLORS["lora"], lw=1.2, alpha=0.6, zorder=2)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        axes.minorticks_off()
        end = "\n" if is_narrow(figure) else " "
        axes.set_xlabel(f"trainable parameters at the end of the run,{end}head included (log scale)")
        return hover

    caption = (
        f"{_SCATTER_CAPTION} The blue line joins the fixed-rank LoRA means: an adaptive method earns "
        f"its cost where it lies above that line.{selection_note(len(drawn), len(methods))}"
    )
    title = "Accuracy against trainable parameters"
    rows = _rows(methods, lambda m: {"trainable_parameters": m.final_parameters})
    return draw("accuracy_by_parameters", title, caption, 3.9, paint, rows, 2.7 + 0.14 * len(drawn))


def accuracy_by_bytes(methods: Sequence[MethodResult]) -> Drawing:
    """Draw accuracy against the bytes to store: frozen weights plus adapter file."""
    drawn = _drawn(methods)

    def paint(figure: Figure) -> HoverPoints:
        axes = figure.add_subplot()
        hover = _scatter(figure, axes, drawn, lambda m: m.stored_bytes / 1e6, _stored)
        axes.set_xlim(0, 1.1 * max(m.stored_bytes for m in drawn) / 1e6)  # room for markers beside the last one
        axes.set_xlabel("frozen weights + adapter file (MB, 10⁶ bytes)")
        return hover

    caption = (
        "What must be stored for one task: the frozen weights as they are held, scales and offsets "
        f"included, plus the saved adapter. {_SCATTER_CAPTION}{selection_note(len(drawn), len(methods))}"
    )
    rows = _rows(methods, lambda m: {"frozen_bytes": m.frozen_bytes, "adapter_file_bytes": m.adapter_file_bytes})
    return draw("accuracy_by_bytes", "Accuracy against bytes", caption, 3.9, paint, rows, 2.7 + 0.14 * len(drawn))


def _drawn(methods: Sequence[MethodResult]) -> list[MethodResult]:
    chosen = leading([m.experiment.name for m in methods], validation_means(methods), LEGEND_ENTRIES)
    return [methods[i] for i in chosen]


def _parameters(method: MethodResult) -> str:
    return f"{count(method.final_parameters)} trainable parameters"


def _stored(method: MethodResult) -> str:
    return f"{megabytes(method.stored_bytes)} to store"


def _rows(methods: Sequence[MethodResult], cost: Callable[[MethodResult], dict[str, Raw]]) -> list[dict[str, Raw]]:
    return [
        {
            "experiment": m.experiment.name,
            "method": m.experiment.method,
            "seed": seed,
            "test_accuracy": value,
            "mean_test_accuracy": m.test_accuracy.estimate,
            **cost(m),
        }
        for m in methods
        for seed, value in zip(m.seeds, m.by_seed, strict=True)
    ]


def _fixed_rank(methods: Sequence[MethodResult]) -> list[MethodResult]:
    return [m for m in methods if (lora := m.experiment.section(LoraConfig)) is not None and lora.rank is not None]


def _scatter(
    figure: Figure,
    axes: Axes,
    methods: Sequence[MethodResult],
    position: Callable[[MethodResult], float],
    cost: Callable[[MethodResult], str],
) -> HoverPoints:
    hover, seen = HoverPoints(), dict[str, int]()
    handles = []
    offsets = _side_by_side([position(method) for method in methods])
    for method, offset in zip(methods, offsets, strict=True):
        name, family = method.experiment.name, method.experiment.method
        index = seen[family] = seen.get(family, -1) + 1
        color, marker = METHOD_COLORS[family], MARKERS[index % len(MARKERS)]
        hover.series(name, color, marker)
        moved = axes.transData + ScaledTranslation(offset / 72, 0, figure.dpi_scale_trans)
        x, seeds = position(method), [100 * value for value in method.by_seed]
        (line,) = axes.plot(
            [x, x], [min(seeds), max(seeds)], "-", color=color, lw=0.8, alpha=0.5, zorder=2, transform=moved
        )
        hover.add(name, line)
        if not many_seeds([method]):
            (dots,) = axes.plot([x] * len(seeds), seeds, ".", ms=4, color=color, alpha=0.7, zorder=3, transform=moved)
            texts = [f"seed {s}: {percent(v)}" for s, v in zip(method.seeds, method.by_seed, strict=True)]
            hover.add(name, dots, [f"{text}\n{cost(method)}" for text in texts])
        mean = 100 * method.test_accuracy.estimate
        (large,) = axes.plot([x], [mean], marker, ms=6.5, color=color, mec=PAPER, mew=0.6, zorder=4, transform=moved)
        of = f"mean, {counted(len(seeds), 'seed')}: {percent_interval(method.test_accuracy)}"
        hover.add(name, large, [f"{of}\n{cost(method)}"])
        handles.append(Line2D([], [], marker=marker, ls="", color=color, ms=6, label=name))
    points = [(position(m), 100 * value) for m in methods for value in m.by_seed]
    axes.update_datalim(points)  # moved artists do not count for the limits on their own
    axes.margins(x=0.1, y=0.08)
    axes.autoscale_view()
    axes.set_ylabel("test accuracy (%)")
    quiet_grid(axes)
    place_legend(figure, handles)
    return hover


def place_legend(figure: Figure, handles: list[Line2D]) -> None:
    """Put a legend of experiments at the right, or below where there is no room at the right."""
    if not is_narrow(figure):
        figure.legend(handles=handles, loc="outside right upper", handletextpad=0.3, labelspacing=0.55)
        return
    longest = max(len(str(handle.get_label())) for handle in handles)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=1 if longest > 26 else 2,
        handletextpad=0.3,
        labelspacing=0.3,
        columnspacing=1.0,
    )


def _side_by_side(positions: Sequence[float]) -> list[float]:
    """Return offsets in points: of markers at the same position (within 0.2 %), the first stays, others follow."""
    offsets: list[float] = []
    for i, position in enumerate(positions):
        before = sum(abs(position - other) <= 0.002 * position for other in positions[:i])
        offsets.append(_MARKER_STEP_PT * before)
    return offsets


def short_count(value: float) -> str:
    """Return 1000 as 1k and 1000000 as 1M."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"
