"""Diagrams of one model: its training, and how often it is right when it is sure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_vit.base.statistics import proportion_interval
from peft_vit.base.statistics.reliability import ReliabilityBin
from peft_vit.core.records import RunRecord
from peft_vit.core.tasks import DecidingMetric
from peft_vit.deploy.page.document import Drawing, Raw
from peft_vit.deploy.page.figure import DASHED, INK, LINE_COLORS, MARKERS, MUTED, Canvas, draw, line_style, quiet_grid
from peft_vit.deploy.page.formatting import counted, fixed, value_of

STEPS = 4_000  # of all curves together


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Return the centered moving average; at the ends over what there is of the window."""
    data, box, offset = np.asarray(values, dtype=np.float64), np.ones(window), window // 2
    sums, counts = np.convolve(data, box), np.convolve(np.ones_like(data), box)
    return np.asarray((sums / counts)[offset : offset + data.size])


def smoothing_window(steps: int) -> int:
    """Return the steps of a moving average over a run of so many steps."""
    return steps // 20 * 2 + 1  # about a tenth, odd so that it has a center


def smoothed_losses(record: RunRecord, window: int) -> dict[int, float]:
    """Return the smoothed training loss by step."""
    losses = smoothed([row.loss for row in record.steps], window).tolist()
    return dict(zip((row.step for row in record.steps), losses, strict=True))


def learning_curves(record: RunRecord, metric: DecidingMetric) -> Drawing | None:
    """Draw one run: training loss at the left, the metric on validation at the right; None if it took no steps.

    Args:
        record: of a finished run.
        metric: what decides.
    """
    if record.spec.experiment.is_probe or len(record.steps) < 2:
        return None
    window, stride = smoothing_window(len(record.steps)), -(-len(record.steps) // STEPS)
    losses = dict(list(smoothed_losses(record, window).items())[::stride])
    shares = {row.step: metric.of(row.metrics) for row in record.evaluations}
    unit = 100 if metric.is_share else 1
    probe = None if record.head_fit is None or not shares else record.head_fit.chosen
    start, chosen = None if probe is None else metric.of(probe), record.chosen_step
    (color, other, *_), words = LINE_COLORS, metric.words

    def paint(canvas: Canvas) -> None:
        left, right = canvas.figure.subplots(*((2, 1) if canvas.narrow else (1, 2)))
        canvas.series("model", color, "o")
        texts = [f"step {step}: training loss {fixed(loss, 3)}" for step, loss in losses.items()]
        canvas.plot("model", left, list(losses), list(losses.values()), texts, color=color, lw=1.6)
        left.set_title("training loss")
        for axes in (left, right):
            axes.set_xlabel("step")
            quiet_grid(axes)
        if not shares:
            right.set_axis_off()
            return
        texts = [f"step {step}: {value_of(metric, share)}" for step, share in shares.items()]
        x, y = list(shares), [unit * share for share in shares.values()]
        canvas.plot("model", right, x, y, texts, color=color, lw=1.4, marker="o", ms=4)
        right.set_title(f"{words} on validation{' (%)' if metric.is_share else ''}")
        if chosen in shares:
            right.plot([chosen], [unit * shares[chosen]], marker="o", ms=10, mfc="none", color=INK, ls="")
        if start is not None:
            canvas.series("linear probe", other, "")
            style: dict[str, Any] = {"color": other, "ls": DASHED, "lw": 1.4, "label": "linear probe"}
            canvas.plot("linear probe", right, [0, max(losses)], [unit * start] * 2, **style)
            right.legend(loc="best")

    caption = "Left: loss of the training batches" + (f", moving average over {window} steps." if window > 1 else ".")
    if shares:
        caption += f" Right: {words} on the {record.split_sizes['validation']:,} validation images"
        caption += "; the ring marks the step that was kept." if chosen in shares else "."
        caption += " Dashed: the linear probe, from which training started." if start is not None else ""
    data: list[dict[str, Raw]] = [
        {"step": step, "measure": measure, "value": value}
        for measure, values in (("training loss", losses), (f"validation {words}", shares))
        for step, value in values.items()
    ]
    return draw("learning", "Training and validation", caption, 2.7, paint, data, 4.6)


def draw_reliability(bins: Sequence[ReliabilityBin], caption: str) -> Drawing:
    """Draw how often predictions on test are right over how sure they are, with Wilson's 95 % intervals."""

    def paint(canvas: Canvas) -> None:
        axes, name, style = canvas.figure.add_subplot(), "test images", line_style(0)
        axes.plot([0, 100], [0, 100], color=MUTED, lw=0.9, ls=DASHED, zorder=1)
        canvas.series(name, style["color"], MARKERS[0])
        x, y = 100 * np.array([(b.confidence, b.accuracy) for b in bins]).T  # (bins,) each
        texts = [
            f"says {fixed(sure, 1)} %, is right in {fixed(right, 1)} %\n{counted(b.count, 'prediction')}"
            for sure, right, b in zip(x, y, bins, strict=True)
        ]
        for sure, b in zip(x, bins, strict=True):
            ends = proportion_interval(b.accuracy * b.count, b.count)
            ys = [100 * (ends.low or 0.0), 100 * (ends.high or 0.0)]
            canvas.plot(name, axes, [sure] * 2, ys, color=style["color"], lw=2.2, alpha=0.35, zorder=1)
        canvas.plot(name, axes, x, y, texts, **style, marker=MARKERS[0], lw=1.4, ms=4, zorder=2)
        axes.set_xlabel("mean confidence of a bin (%)")
        axes.set_ylabel("right in that bin (%)")
        axes.set_ylim(max(0.0, 10 * (min(*x, *y) // 10) - 20), 102)
        axes.set_xlim(max(0.0, min(x) - 4), 102)
        quiet_grid(axes)

    data: list[dict[str, Raw]] = [
        {
            "images": "test images",
            "low": b.low,
            "high": b.high,
            "predictions": b.count,
            "confidence": b.confidence,
            "accuracy": b.accuracy,
        }
        for b in bins
    ]
    return draw("reliability", "Confidence and accuracy", caption, 3.9, paint, data, 3.14)
