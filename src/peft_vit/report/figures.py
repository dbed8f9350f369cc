"""Every figure of a study, by section; a figure without data becomes a sentence that says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import ScaledTranslation

from peft_vit.analysis import Analysis, MethodResult
from peft_vit.report.curves import loss_curves
from peft_vit.report.document import Block, Drawing, Paragraph
from peft_vit.report.heatmaps import importance_maps, rank_maps
from peft_vit.report.numbers import fixed
from peft_vit.report.style import INK, METHOD_COLORS, MUTED, PAPER, draw, quiet_grid

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
_ROW_IN = 0.31
_MARKER_STEP_PT = 7.0
_SCATTER_CAPTION = (
    "Dots: single seeds, joined by a thin line. Large marker: mean. Of markers at the same place the "
    "leftmost stands where it belongs, the others beside it."
)


def comparison_figures(analysis: Analysis) -> tuple[Block, ...]:
    """Return accuracy by method, against trainable parameters and against bytes, and the loss curves."""
    methods = analysis.methods
    if not methods:
        return (Paragraph("No figure of accuracy: no run of this study has finished."),)
    majority = analysis.study.runs[0].record.majority_accuracy.get("test")
    return (
        accuracy_by_method(methods, majority),
        accuracy_by_parameters(methods),
        accuracy_by_bytes(methods),
        loss_curves(analysis.study),
    )


def importance_figures(analysis: Analysis) -> tuple[Block, ...]:
    """Return importance by layer."""
    if not analysis.importance:
        return (Paragraph("No figure of importance: no finished run of this study recorded importance scores."),)
    return (importance_maps(analysis.importance),)


def allocation_figures(analysis: Analysis) -> tuple[Block, ...]:
    """Return ranks over training."""
    mapped = [a for a in analysis.allocation if a.maps]
    if not mapped:
        return (Paragraph("No rank maps: the study has no finished AdaLoRA run that recorded its ranks."),)
    return (rank_maps(mapped),)


def accuracy_by_method(methods: Sequence[MethodResult], majority: float | None) -> Drawing:
    """Draw one row an experiment: each seed, mean, interval, and the majority class as a line."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        low, high = _limits([v for m in methods for v in m.by_seed] + ([majority] if majority else []))
        for row, method in enumerate(methods):
            color = METHOD_COLORS[method.experiment.method]
            _interval_line(axes, method, row, color, (low, high))
            seeds = [100 * value for value in method.by_seed]
            axes.plot(seeds, [row] * len(seeds), "o", ms=4.5, mfc=PAPER, mec=color, mew=1.1, zorder=3)
            mean = 100 * method.test_accuracy.estimate
            axes.plot([mean], [row], "D", ms=5, color=color, mec=PAPER, mew=0.6, zorder=4)
            axes.annotate(
                f"{fixed(mean, 1)}", (1.0, row), xycoords=("axes fraction", "data"), xytext=(6, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        if majority:
            axes.axvline(100 * majority, color=INK, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.set_xlim(low, high)
        axes.set_ylim(len(methods) - 0.4, -0.6)
        axes.set_yticks(range(len(methods)), [m.experiment.name for m in methods])
        axes.set_xlabel("test accuracy (%)")
        quiet_grid(axes, "x")
        axes.spines["left"].set_visible(False)
        figure.legend(handles=_dot_legend(majority), loc="outside lower center", ncols=4, handletextpad=0.4)

    caption = (
        "Open circles: single seeds. Diamond and number at the right: their mean. Line: 95 % t "
        "interval over seeds, with an arrow where it leaves the picture (the table has its ends). "
        "The interval describes other seeds on the same images, not other images."
    )
    return draw("accuracy_by_method", "Accuracy by method", caption, 1.15 + _ROW_IN * len(methods), paint)


def _limits(shares: Sequence[float]) -> tuple[float, float]:
    """Return limits in percent around the data; intervals of two seeds would dwarf it."""
    low, high = 100 * min(shares), 100 * max(shares)
    pad = max(1.0, 0.18 * (high - low))
    return max(0.0, low - pad), min(100.5, high + pad)


def _interval_line(axes: Axes, method: MethodResult, row: int, color: str, limits: tuple[float, float]) -> None:
    interval = method.test_accuracy
    if interval.low is None or interval.high is None:
        return
    ends = np.clip([100 * interval.low, 100 * interval.high], *limits)
    axes.plot(ends, [row, row], color=color, lw=2.2, alpha=0.45, solid_capstyle="butt", zorder=2)
    for end, limit, marker in zip(ends, limits, (CARETLEFT, CARETRIGHT), strict=True):
        if end == limit:
            axes.plot([end], [row], marker=marker, ms=6, color=color, clip_on=False, zorder=3)


def _dot_legend(majority: float | None) -> list[Line2D]:
    handles = [
        Line2D([], [], marker="o", ls="", mfc=PAPER, mec=MUTED, ms=4.5, label="one seed"),
        Line2D([], [], marker="D", ls="", color=MUTED, ms=5, label="mean"),
        Line2D([], [], color=MUTED, lw=2.2, alpha=0.45, label="95 % interval"),
    ]
    if majority:
        handles.append(
            Line2D([], [], color=INK, lw=1, ls=(0, (4, 3)), label=f"majority class, {fixed(100 * majority, 1)} %")
        )
    return handles


def accuracy_by_parameters(methods: Sequence[MethodResult]) -> Drawing:
    """Draw accuracy against final trainable parameters, log scale."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        _scatter(figure, axes, methods, lambda m: m.final_parameters)
        line = [(m.final_parameters, 100 * m.test_accuracy.estimate) for m in _fixed_rank(methods)]
        if len(line) > 1:
            axes.plot(*zip(*sorted(line), strict=True), color=METHOD_COLORS["lora"], lw=1.2, alpha=0.6, zorder=2)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_count(value)))
        axes.minorticks_off()
        axes.set_xlabel("trainable parameters at the end of the run, head included (log scale)")

    caption = (
        f"{_SCATTER_CAPTION} The blue line joins the fixed-rank LoRA means: an adaptive method earns "
        "its cost where it lies above that line."
    )
    title = "Accuracy against trainable parameters"
    return draw("accuracy_by_parameters", title, caption, 3.9, paint)


def accuracy_by_bytes(methods: Sequence[MethodResult]) -> Drawing:
    """Draw accuracy against the bytes to store: frozen weights plus adapter file."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        _scatter(figure, axes, methods, lambda m: (m.frozen_bytes + m.adapter_file_bytes) / 1e6)
        axes.set_xlim(left=0)
        axes.set_xlabel("frozen weights + adapter file (MB, 10⁶ bytes)")

    caption = (
        "What must be stored for one task: the frozen weights as they are held, scales and offsets "
        f"included, plus the saved adapter. {_SCATTER_CAPTION}"
    )
    return draw("accuracy_by_bytes", "Accuracy against bytes", caption, 3.9, paint)


def _fixed_rank(methods: Sequence[MethodResult]) -> list[MethodResult]:
    return [m for m in methods if m.experiment.lora is not None and m.experiment.lora.rank is not None]


def _scatter(
    figure: Figure, axes: Axes, methods: Sequence[MethodResult], position: Callable[[MethodResult], float]
) -> None:
    seen: dict[str, int] = {}
    handles = []
    offsets = _side_by_side([position(method) for method in methods])
    for method, offset in zip(methods, offsets, strict=True):
        family = method.experiment.method
        index = seen[family] = seen.get(family, -1) + 1
        color, marker = METHOD_COLORS[family], _MARKERS[index % len(_MARKERS)]
        moved = axes.transData + ScaledTranslation(offset / 72, 0, figure.dpi_scale_trans)
        x, seeds = position(method), [100 * value for value in method.by_seed]
        axes.plot([x] * len(seeds), seeds, "-", color=color, lw=0.8, alpha=0.5, zorder=2, transform=moved)
        axes.plot([x] * len(seeds), seeds, ".", ms=4, color=color, alpha=0.7, zorder=3, transform=moved)
        mean = 100 * method.test_accuracy.estimate
        axes.plot([x], [mean], marker, ms=6.5, color=color, mec=PAPER, mew=0.6, zorder=4, transform=moved)
        handles.append(Line2D([], [], marker=marker, ls="", color=color, ms=6, label=method.experiment.name))
    points = [(position(m), 100 * value) for m in methods for value in m.by_seed]
    axes.update_datalim(points)  # moved artists do not count for the limits on their own
    axes.margins(x=0.1, y=0.08)
    axes.autoscale_view()
    axes.set_ylabel("test accuracy (%)")
    quiet_grid(axes)
    figure.legend(handles=handles, loc="outside right upper", handletextpad=0.3, labelspacing=0.55)


def _side_by_side(positions: Sequence[float]) -> list[float]:
    """Return offsets in points: of markers at the same position (within 0.2 %), the first stays, others follow."""
    offsets: list[float] = []
    for i, position in enumerate(positions):
        before = sum(abs(position - other) <= 0.002 * position for other in positions[:i])
        offsets.append(_MARKER_STEP_PT * before)
    return offsets


def _short_count(value: float) -> str:
    """Return 1000 as 1k and 1000000 as 1M."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"
