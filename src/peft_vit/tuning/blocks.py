"""Tables, figures and pictures of what a tuning came to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft_vit.analysis import read_results
from peft_vit.analysis.stopping import sequential_results
from peft_vit.records import Calibrated, RunRecord
from peft_vit.report.document import Block, Drawing, Table
from peft_vit.report.formatting import (
    count,
    fixed,
    joined,
    margin_in_points,
    megabytes,
    percent,
    percent_interval,
    plain,
    points_interval,
)
from peft_vit.report.lines import Line, draw_reliability, stopping_blocks
from peft_vit.report.tables import Column, own_interval_columns, table
from peft_vit.statistics import Interval
from peft_vit.statistics.sequential import Look
from peft_vit.tuning.forms import Exports, Form
from peft_vit.tuning.result import Candidate, Choice
from peft_vit.tuning.sealed import CalibrationResult, Sealed
from peft_vit.tuning.throughput import said_ms


@dataclass(frozen=True)
class TuningSummary:
    """Everything that is told of a tuning.

    Attributes:
        choice: what was chosen and what it was chosen by.
        records: of the final runs, by the candidates' names.
        sealed: the chosen model on the sealed images.
        calibrated: what the file says of how far it can be believed.
        exports: what was written.
    """

    choice: Choice
    records: Mapping[str, RunRecord]
    sealed: Sealed
    calibrated: Calibrated
    exports: Exports

    @property
    def chosen(self) -> RunRecord:
        """Return the record of the chosen model's final run."""
        return self.records[self.choice.chosen]


def compared_blocks(choice: Choice) -> Iterator[Block]:
    """Yield the candidates, and what was tried before they raced."""
    margin = margin_in_points(choice.request.margin_share)
    yield table(
        "candidates",
        f"Candidates, smallest first; the reference is {choice.reference}",
        choice.candidates,
        _candidate_columns(choice),
        "On images of repeated folds, each predicted by a model that was not trained on it. Difference to the "
        f"reference in points of {choice.metric.words}, with the interval that accounts for the looks. Loses less than "
        f"{margin}: supported, refuted or not decided, at 5 % for all comparisons together.",
    )
    yield from _courses(choice)
    if choice.probes:
        yield table(
            "probes",
            "Models and image sizes, by linear probes",
            choice.probes,
            [
                Column("Model", "model"),
                Column("Pixels", "image_size"),
                Column(f"{choice.metric.words.capitalize()} on folds", "score", percent),
                Column("Flips", "flips", data=""),
                Column("An image", "image_s", said_ms),
                Column("Why", lambda one: f"{'taken: ' if one.chosen else ''}{plain(one.why)}"),
            ],
            "A linear probe on the frozen backbone, on the folds of one repetition. How training images are flipped "
            "was chosen likewise, at the first size.",
            folded=True,
        )
    if choice.rates:
        yield table(
            "rates",
            "Learning rates, by successive halving",
            choice.rates,
            [
                Column("Method", "kind"),
                Column("Rate", "learning_rate", "{:.2g}".format),
                Column("On validation", lambda one: joined(map(percent, one.scores))),
                Column("Steps", "steps", count),
                Column("Outcome", lambda one: "taken" if one.chosen else None),
            ],
            "Every method gets the same effort; a rate that falls behind gets no more steps. Rates are ranked by the "
            "folds' validation and test images, half each, so what is taken need not be the best on validation.",
            folded=True,
        )


def _courses(choice: Choice) -> Iterator[Block]:
    """Yield how the race went, from its records; nothing if there was no comparison."""
    for study in read_results(choice.folds_dir).studies:
        scores = {one.name: one.score or 0.0 for one in choice.candidates}
        blocks = stopping_blocks(study, sequential_results(study), scores)
        yield from (block for block in blocks if block.kind == "figure")


def _candidate_columns(choice: Choice) -> list[Column]:
    def look(one: Candidate) -> Look | None:
        return one.course.looks[-1] if one.course is not None and one.course.looks else None

    def ends(last: Look | None) -> dict[str, float | None]:
        return {name: getattr(last, name, None) for name in ("difference", "low", "high")}

    def difference(one: Candidate) -> str | None:
        last = look(one)
        if last is None:
            return "is the reference" if one.name == choice.reference else None
        interval = Interval(last.difference, last.low, last.high, last.pairs, 0.9)
        return points_interval(interval if all(map(math.isfinite, (last.low, last.high))) else _bare(interval))

    return [
        Column("Candidate", lambda one: f"{one.name} (chosen)" if one.name == choice.chosen else one.name),
        Column("", "name", data="candidate"),
        Column("File, about", "bytes", megabytes),
        Column("On folds", "score", percent),
        Column("Difference", difference),
        Column("", look, data=ends),
        Column("Pairs", lambda one: one.pairs or None, data="pairs"),
        Column("Loses less", lambda one: (one.course and one.course.noninferiority) or "–", data="verdict"),
        Column("Ended", lambda one: one.left_out or _ended(one)),
    ]


def _bare(interval: Interval) -> Interval:
    return Interval(interval.estimate, None, None, interval.n, interval.confidence)


def _ended(one: Candidate) -> str:
    words: dict[Any, str] = {
        "decided": "decided",
        "futile": "more folds would hardly decide it",
        "maximum": "all folds done",
        None: "open",
    }
    return "–" if one.course is None else words[one.course.stopped]


def calibration_blocks(summary: TuningSummary) -> Iterator[Block]:
    """Yield how sure and how often right the model is, and how often sets hold the class."""
    sealed, calibrated = summary.sealed, summary.calibrated
    yield calibration_figure(sealed.calibration, sealed.on_folds, calibrated.temperature)
    yield table(
        "coverage",
        "Prediction sets",
        sealed.coverage_results,
        [
            Column("Coverage asked", "asked", percent),
            Column("On folds", "folds", percent),
            Column("Classes in a set", "folds_size", fixed),
            Column("On test images", "sealed", percent_interval, partial(own_interval_columns, "sealed")),
            Column("Classes in a set there", "sealed_size", fixed),
        ],
        f"How often `predict --coverage` holds the true class. Thresholds come from {calibrated.images} images of "
        "folds, as in split-conformal prediction. On folds each image is asked by thresholds of other images. "
        "For one final model behind several fold models nothing is guaranteed (CV+ would guarantee 1 - 2 alpha), so "
        "coverage is measured, here. The most probable class is always in a set.",
    )


def calibration_figure(sealed: CalibrationResult, folds: CalibrationResult, temperature: float) -> Drawing:
    """Draw how often the model is right over how sure it is, on folds and on test images."""
    bins = {
        "folds, as trained": folds.bins[0],
        "folds, calibrated": folds.bins[1],
        "test images, calibrated": sealed.bins[1],
    }
    caption = (
        "Predictions in bins of equal counts by their confidence; the fewer images, the more a bin moves by chance. On "
        "the dashed line confidence and accuracy agree; below it the model is too sure of itself. Calibrated: "
        f"logits divided by {temperature:.2f}, the temperature with the least "
        "negative log-likelihood on folds. The expected calibration error on test images is "
        f"{percent(sealed.ece[1])}, and {percent(sealed.ece[0])} without."
    )
    return draw_reliability([Line(name, found) for name, found in bins.items()], caption, "images")


def forms_table(summary: TuningSummary) -> Table:
    """Return every form that was tried."""

    def quartiles(form: Form) -> str | None:
        if form.low_s is None or form.high_s is None:
            return None
        return f"{fixed(1e3 * form.low_s, 1)} to {fixed(1e3 * form.high_s, 1)}"

    float32 = summary.exports.float32_s
    beside = "" if float32 is None else f" The same model in float32 takes {fixed(1e3 * float32, 1)} ms."
    split = next((form.comparison.split for form in summary.exports.forms if form.comparison is not None), "")
    return table(
        "forms",
        "Forms of the model",
        summary.exports.forms,
        [
            Column("Form", "name", data=""),
            Column("File", "bytes", megabytes),
            Column("ms an image", "median_s", lambda s: fixed(1e3 * s, 1)),
            Column("Quartiles", quartiles),
            Column("", "low_s"),
            Column("", "high_s"),
            Column(
                "Predicts as trained",
                lambda form: form.comparison and form.comparison.same_predictions,
                percent,
                "same_predictions",
            ),
            Column("Outcome", lambda form: plain(form.left_out) or "taken"),
        ],
        f"A call on one image on {summary.exports.processor}, with all its processors, each form in processes of its "
        f"own, in turn.{beside} Predicts as trained: share of {split} images on which the file and the "
        "run's model agree.",
    )
