"""Accuracy of one study against the bytes that must be stored, every seed and the mean of each method."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle
from statistics import fmean

from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from peft_vit.deploy.page.document import Drawing
from peft_vit.deploy.page.figure import MARKERS, METHOD_COLORS, PAPER, Canvas, draw, quiet_grid
from peft_vit.deploy.page.formatting import counted, megabytes, percent, percent_interval
from peft_vit.lab.analysis import MethodResult

_MARKER_STEP_PT = 7.0


def accuracy_against_bytes(methods: Sequence[MethodResult]) -> Drawing:
    """Draw every seed and the mean of each method at the bytes that it takes to store."""
    places = [method.stored_bytes / 1e6 for method in methods]

    def paint(canvas: Canvas) -> None:
        axes, handles = canvas.figure.add_subplot(), []
        for method, x, offset, marker in zip(methods, places, side_by_side(places), cycle(MARKERS), strict=False):
            name, color = method.name, METHOD_COLORS[method.experiment.method]
            seeds = [100 * value for value in method.by_seed.values()]
            takes = f"{megabytes(method.stored_bytes)} to store"
            handles.append(Line2D([], [], marker=marker, color=color, mec=color, ls="", ms=6, label=name))
            canvas.series(name, color, marker)
            moved = axes.transData + ScaledTranslation(offset / 72, 0, canvas.figure.dpi_scale_trans)
            draw_at = partial(canvas.plot, name, axes, color=color, transform=moved)
            draw_at([x, x], [min(seeds), max(seeds)], lw=0.8, alpha=0.5, zorder=2)
            texts = [f"seed {seed}: {percent(value)}\n{takes}" for seed, value in method.by_seed.items()]
            draw_at([x] * len(seeds), seeds, texts, marker=".", ls="", ms=4, alpha=0.7, zorder=3)
            text = f"mean, {counted(len(seeds), 'seed')}: {percent_interval(method.test_accuracy)}\n{takes}"
            style = {"marker": marker, "ls": "", "ms": 6.5, "mec": PAPER, "mew": 0.6, "zorder": 4}
            draw_at([x], [100 * method.test_accuracy.estimate], [text], **style)
            axes.update_datalim([(x, value) for value in seeds])  # moved artists do not count on their own
        axes.margins(x=0.1, y=0.08)
        axes.autoscale_view()
        axes.set_ylabel("test accuracy (%)")
        quiet_grid(axes)
        canvas.name_experiments(handles)
        axes.set_xlim(0, 1.1 * max(places))  # room for markers beside the last one
        axes.set_xlabel("frozen weights + adapter file (MB, 10⁶ bytes)")

    data = [
        {
            "experiment": method.name,
            "method": method.experiment.method,
            "seed": seed,
            "test_accuracy": value,
            "mean_test_accuracy": method.test_accuracy.estimate,
            "frozen_bytes": fmean(run.bytes.frozen_bytes for run in method.runs),
            "adapter_file_bytes": fmean(run.bytes.adapter_file_bytes for run in method.runs),
        }
        for method in methods
        for seed, value in method.by_seed.items()
    ]
    caption = (
        "What must be stored for one task: the frozen weights as they are held, scales and offsets included, plus the "
        "saved adapter. Dots: single seeds, joined by a thin line. Large marker: mean. If markers coincide, the "
        "leftmost is in its place and the others are beside it."
    )
    return draw("accuracy_by_bytes", "Accuracy against bytes", caption, 3.9, paint, data)


def side_by_side(positions: Sequence[float]) -> list[float]:
    """Return offsets in points: of markers at the same position (within 0.2 %), the first stays, others follow."""
    return [
        _MARKER_STEP_PT * sum(abs(position - other) <= 0.002 * position for other in positions[:i])
        for i, position in enumerate(positions)
    ]
