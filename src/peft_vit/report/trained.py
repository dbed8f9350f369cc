"""What a call of `peft-vit train` came to, in lines and as a row beside others: the answer first."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from peft_vit.records import ProbeTest, RunRecord
from peft_vit.report.document import Table
from peft_vit.report.formatting import known, percent, points
from peft_vit.report.tables import Column, table
from peft_vit.statistics import Interval
from peft_vit.tasks import metric_of


def test_score(record: RunRecord) -> Interval:
    """Return what decides in a finished run, on the test images, with its interval."""
    own = record.predictions
    assert own is not None
    return metric_of(record.spec).interval(np.array(own.labels), np.array(own.predicted))


def result_lines(record: RunRecord, folder: Path, seconds: float, page: Path | None = None) -> list[str]:
    """Return what training came to, beside the probe that it started from, and what to do with the model.

    Args:
        record: of a finished run.
        folder: of the run, or of the call that made it.
        seconds: that all of the call took.
        page: on the model, if one was written.
    """
    score, place = test_score(record), shlex.quote(str(folder))
    lines = [f"Test {metric_of(record.spec).words} {_percent(score)}, on {score.n} images that training has not seen."]
    if record.probe_test is not None:
        lines += _beside_the_probe(record, record.probe_test)
    return [
        *lines,
        f"Time: {seconds:.0f} s.",
        f"Model: {folder}",
        f"Page: {page}" if page is not None else f"Page: peft-vit report {place}",
        f"To predict: peft-vit predict {place} PHOTO.jpg",
    ]


def _beside_the_probe(record: RunRecord, probe: ProbeTest) -> list[str]:
    """Return what the probe has on the same test images, and in words whether training gained on it."""
    assert record.predictions is not None
    metric, labels, before = metric_of(record.spec), np.array(record.predictions.labels), np.array(probe.predicted)
    of_probe = f"A logistic regression on the same frozen features has {_percent(metric.interval(labels, before))}."
    if record.chosen_step == 0:
        none = "Training has gained nothing on it on validation images, so the model is this regression."
        return [of_probe, none]
    gain = metric.gain(labels, before, np.array(record.predictions.predicted))
    assert gain.low is not None
    assert gain.high is not None
    size = f"{points(gain.estimate)} points ({points(gain.low)} to {points(gain.high)})"
    if gain.low > 0:
        return [of_probe, f"Training gained on it: {size}."]
    return [of_probe, f"Training lost against it: {size}." if gain.high < 0 else f"No clear difference: {size}."]


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
    metric: str | None = None  # that decides
    test: float | None = None
    low: float | None = None  # of its 95 % interval
    high: float | None = None
    test_images: int | None = None
    minutes: float | None = None

    @classmethod
    def of(cls, folder: Path, method: str, settings: str, state: str, record: RunRecord | None, seconds: float) -> Self:
        """Return the row of a call with its record, if there is one yet; `seconds` are those of all that it did."""
        if record is None:
            return cls(folder.name, method, settings, state)
        if record.spec.experiment.method != method:
            method = "regression on frozen features"  # which was better than what was trained
        row = cls(folder.name, method, settings, state, minutes=seconds / 60)
        if record.test is None:
            return row
        score, metric = test_score(record), metric_of(record.spec).name
        return replace(row, metric=metric, test=score.estimate, low=score.low, high=score.high, test_images=score.n)

    def test_text(self) -> str:
        """Return what decides with its interval: accuracy 80.0 % (71.1 to 86.7)."""
        assert self.metric is not None
        assert self.test is not None
        assert self.low is not None
        assert self.high is not None
        return f"{self.metric.replace('_', ' ')} {percent(self.test)} ({100 * self.low:.1f} to {100 * self.high:.1f})"


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
            Column("test", lambda row: known(row.test, lambda _: row.test_text())),
            Column("minutes", "minutes", lambda minutes: known(minutes, lambda value: f"{value:.1f}")),
            "state",
        ],
        "In brackets the 95 % interval: what other test images would change.",
    )
