"""Reliability diagram: how often a model is right when it says how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from peft_vit.analysis import Calibration
from peft_vit.analysis.calibration import Bin
from peft_vit.report.document import Drawing, Raw
from peft_vit.report.formatting import counted, fixed
from peft_vit.report.hover import MARKERS, HoverPoints
from peft_vit.report.plot_selection import leading, selection_note
from peft_vit.report.style import DASHED, MUTED, draw, line_look, place_legend, quiet_grid

LINES = 8


def reliability_diagram(calibrations: Sequence[Calibration], validation: Mapping[str, float]) -> tuple[Drawing, ...]:
    """Return the diagram of every experiment that recorded predictions; none where no run did.

    Args:
        calibrations: of the study.
        validation: experiment -> mean validation accuracy, which chooses what is drawn where there are many.
    """
    recorded = [c for c in calibrations if any(b.count for b in c.bins)]
    if not recorded:
        return ()
    drawn = leading(recorded, validation, LINES)

    caption = (
        f"Predictions on test in {len(drawn[0].bins)} bins of equal width of their confidence, all seeds together; "
        "empty bins are left out, and a bin with few predictions moves by chance. On the dashed line confidence and "
        f"accuracy agree; below it a model is too sure of itself.{selection_note(len(drawn), len(recorded))}"
    )
    data: list[dict[str, Raw]] = [
        {
            "experiment": c.experiment.name,
            "low": b.low,
            "high": b.high,
            "predictions": b.count,
            "confidence": b.confidence,
            "accuracy": b.accuracy,
        }
        for c in recorded
        for b in c.bins
    ]
    lines = [Line(c.experiment.name, c.bins, "{count}, " + counted(len(c.seeds), "seed")) for c in drawn]
    return (draw_reliability(lines, caption, data),)


@dataclass(frozen=True)
class Line:
    """Bins of a diagram under one name; `note` is said of each, with {count} in place of its predictions."""

    name: str
    bins: Sequence[Bin]
    note: str = "{count}"


def draw_reliability(lines: Sequence[Line], caption: str, data: Sequence[dict[str, Raw]]) -> Drawing:
    """Draw how often predictions are right over how sure they are; at least one bin is not empty."""

    def paint(figure: Figure) -> HoverPoints:
        axes, hover, handles = figure.add_subplot(), HoverPoints(), []
        axes.plot([0, 100], [0, 100], color=MUTED, lw=0.9, ls=DASHED, zorder=1)
        for index, line in enumerate(lines):
            name, look = line.name, line_look(index)
            marker = MARKERS[index % len(MARKERS)]
            hover.series(name, look["color"], marker)
            filled = [b for b in line.bins if b.count]
            x = [100 * (b.confidence or 0.0) for b in filled]
            y = [100 * (b.accuracy or 0.0) for b in filled]
            texts = [
                f"says {fixed(said, 1)} %, is right in {fixed(right, 1)} %\n"
                + line.note.format(count=counted(b.count, "prediction"))
                for said, right, b in zip(x, y, filled, strict=True)
            ]
            handles.append(
                hover.plot(name, axes, x, y, texts, **look, lw=1.4, marker=marker, ms=4, label=name, zorder=2)
            )
        axes.set_xlabel("mean confidence of a bin (%)")
        axes.set_ylabel("right in that bin (%)")
        axes.set_ylim(0, 102)
        low = min((b.confidence or 0.0) for line in lines for b in line.bins if b.count)
        axes.set_xlim(max(0.0, 100 * low - 4), 102)
        quiet_grid(axes)
        place_legend(figure, handles)
        return hover

    return draw("reliability", "How sure, and how often right", caption, 3.9, paint, data, 3.0 + 0.14 * len(lines))
