"""Reliability diagram: how often a model is right when it says how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from peft_vit.analysis import Calibration
from peft_vit.report.curves import DASHES, LINE_COLORS
from peft_vit.report.document import Drawing, Raw
from peft_vit.report.formatting import counted, fixed
from peft_vit.report.hover import HoverPoints
from peft_vit.report.plot_selection import leading, selection_note
from peft_vit.report.scatter import place_legend
from peft_vit.report.style import MUTED, draw, quiet_grid

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
    drawn = [recorded[i] for i in leading([c.experiment.name for c in recorded], validation, LINES)]

    def paint(figure: Figure) -> HoverPoints:
        axes, hover, handles = figure.add_subplot(), HoverPoints(), []
        axes.plot([0, 100], [0, 100], color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1)
        for index, calibration in enumerate(drawn):
            name, color = calibration.experiment.name, LINE_COLORS[index % len(LINE_COLORS)]
            hover.series(name, color, "")
            filled = [(b, b.confidence, b.accuracy) for b in calibration.bins if b.count]
            x = [100 * (confidence or 0.0) for _, confidence, _ in filled]
            y = [100 * (accuracy or 0.0) for _, _, accuracy in filled]
            dashes = DASHES[index // len(LINE_COLORS) % len(DASHES)]
            (line,) = axes.plot(x, y, color=color, lw=1.4, ls=dashes, marker="o", ms=4, label=name, zorder=2)
            texts = [
                f"says {fixed(said, 1)} %, is right in {fixed(right, 1)} %\n{counted(b.count, 'prediction')}, "
                f"{counted(len(calibration.seeds), 'seed')}"
                for said, right, (b, _, _) in zip(x, y, filled, strict=True)
            ]
            hover.add(name, line, texts)
            handles.append(line)
        axes.set_xlabel("mean confidence of a bin (%)")
        axes.set_ylabel("right in that bin (%)")
        axes.set_ylim(0, 102)
        low = min((b.confidence or 0.0) for c in drawn for b in c.bins if b.count)
        axes.set_xlim(max(0.0, 100 * low - 4), 102)
        quiet_grid(axes)
        place_legend(figure, handles)
        return hover

    bins = len(drawn[0].bins)
    caption = (
        f"Predictions on test in {bins} bins of equal width of their confidence, all seeds together; empty bins are "
        "left out, and a bin with few predictions moves by chance. On the dashed line confidence and accuracy agree; "
        f"below it a model is too sure of itself.{selection_note(len(drawn), len(recorded))}"
    )
    rows = [row for c in recorded for row in _rows(c)]
    return (draw("reliability", "How sure, and how often right", caption, 3.9, paint, rows, 3.0 + 0.14 * len(drawn)),)


def _rows(calibration: Calibration) -> list[dict[str, Raw]]:
    return [
        {
            "experiment": calibration.experiment.name,
            "low": b.low,
            "high": b.high,
            "predictions": b.count,
            "confidence": b.confidence,
            "accuracy": b.accuracy,
        }
        for b in calibration.bins
    ]
