"""What a call of `peft-vit train` came to, in lines and as a row beside others: the answer first."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from peft_vit.records import RunRecord
from peft_vit.report.document import Table
from peft_vit.report.formatting import known, percent, points, signed
from peft_vit.report.tables import Column, table
from peft_vit.statistics import Interval, paired_proportions, proportion_interval

_PROBE = "logistic regression on the same frozen features"


def test_accuracy(record: RunRecord) -> Interval:
    """Return the accuracy of a finished run on the test images, with its interval."""
    assert record.test is not None
    return proportion_interval(record.test.accuracy * record.test.n, record.test.n)


def result_lines(record: RunRecord, folder: Path, page: Path | None = None) -> list[str]:
    """Return what training came to, beside the probe that it started from, and what to do with the model.

    Args:
        record: of a finished run.
        folder: of the run, or of the call that made it.
        page: on the model, if one was written.
    """
    assert record.test is not None
    place = shlex.quote(str(folder))
    lines = [f"Test accuracy {_percent(test_accuracy(record))}, on {record.test.n} images that training has not seen."]
    if (probe := record.probe_test) is not None:
        own = proportion_interval(probe.metrics.accuracy * probe.metrics.n, probe.metrics.n)
        lines += [f"A {_PROBE} has {_percent(own)}.", _gain(record)]
    lines += [
        f"Time: {record.seconds:.0f} s.",
        f"Model: {folder}",
        f"Page: {page}" if page is not None else f"Page: peft-vit report {place}",
        f"To predict: peft-vit predict {place} PHOTO.jpg",
    ]
    return lines


def _gain(record: RunRecord) -> str:
    """Return in words whether training gained on the probe, on the same test images."""
    assert record.predictions is not None
    assert record.probe_test is not None
    if record.chosen_step == 0:
        return "Training has gained nothing on it on validation images, so the model is this regression."
    labels, before = np.array(record.predictions.labels), np.array(record.probe_test.predicted)
    right, was_right = np.array(record.predictions.predicted) == labels, before == labels
    gain = paired_proportions(int((right & ~was_right).sum()), int((was_right & ~right).sum()), len(labels))
    assert gain.low is not None
    assert gain.high is not None
    size = f"{points(gain.estimate)} points ({signed(100 * gain.low)} to {signed(100 * gain.high)})"
    if gain.low > 0:
        return f"Training gained on it: {size}."
    return f"Training lost against it: {size}." if gain.high < 0 else f"No clear difference between the two: {size}."


def _percent(interval: Interval) -> str:
    assert interval.low is not None
    assert interval.high is not None
    return f"{percent(interval.estimate)} (95 % interval {100 * interval.low:.1f} to {100 * interval.high:.1f})"


@dataclass(frozen=True)
class TrainRow:
    """A call of `train`; what is not known of it is None."""

    run: str
    method: str
    settings: str  # as they were typed
    state: str
    test_accuracy: float | None = None
    low: float | None = None  # of its 95 % interval
    high: float | None = None
    test_images: int | None = None
    minutes: float | None = None

    @classmethod
    def of(cls, folder: Path, method: str, settings: str, state: str, record: RunRecord | None) -> Self:
        """Return the row of a call whose run has a record, or none yet."""
        if record is None:
            return cls(folder.name, method, settings, state)
        minutes = record.seconds / 60
        if record.test is None:
            return cls(folder.name, method, settings, state, minutes=minutes)
        score = test_accuracy(record)
        values = (score.estimate, score.low, score.high, record.test.n, minutes)
        return cls(folder.name, method, settings, state, *values)


def train_runs_table(rows: Sequence[TrainRow]) -> Table:
    """Return a row a call of `train`."""
    return table(
        "runs",
        "Runs of `peft-vit train`",
        rows,
        [
            "run",
            "method",
            Column("settings", "settings", lambda settings: settings or "defaults"),
            Column(
                "test accuracy",
                lambda row: known(
                    row.test_accuracy, lambda share: f"{percent(share)} ({100 * row.low:.1f} to {100 * row.high:.1f})"
                ),
            ),
            Column("minutes", "minutes", lambda minutes: known(minutes, lambda value: f"{value:.1f}")),
            "state",
        ],
        "Accuracy with its 95 % interval: what other test images would change.",
    )
