"""Tables, figures and pictures of what a tuning came to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_vit.analysis import read_results
from peft_vit.analysis.stopping import study_courses
from peft_vit.deployment import Calibrated
from peft_vit.errors import UserError
from peft_vit.records import RunRecord
from peft_vit.report.document import Block, Cell, Gallery, Paragraph, Picture, Table
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
from peft_vit.report.lines import stopping_blocks
from peft_vit.report.tables import cell, interval_cell
from peft_vit.statistics import Interval
from peft_vit.tuning.figures import MOST_CLASSES, calibration_figure, confusion_figure
from peft_vit.tuning.forms import Exports, Form
from peft_vit.tuning.machine import said_ms
from peft_vit.tuning.result import Candidate, Choice
from peft_vit.tuning.sealed import Mistake, Sealed

SHOWN_MISTAKES = 18  # as pictures
# From positions of images to PNG files; raises UserError if the images are not at hand.
Pictures = Callable[[Sequence[int]], list[bytes]]


@dataclass(frozen=True)
class TuningSummary:
    """Everything that is told of a tuning.

    Attributes:
        choice: what was chosen and what it was chosen by.
        records: of the final runs, by the candidates' names.
        sealed: the chosen model on the sealed images.
        calibrated: what the file says of how far it can be believed.
        exports: what was written.
        weights_licence: of the backbone's weights.
    """

    choice: Choice
    records: Mapping[str, RunRecord]
    sealed: Sealed
    calibrated: Calibrated
    exports: Exports
    weights_licence: str

    @property
    def chosen(self) -> RunRecord:
        """Return the record of the chosen model's final run."""
        return self.records[self.choice.chosen]


def metric(choice: Choice) -> str:
    """Return the name of what decides."""
    return choice.metric.replace("_", " ")


def sealed_blocks(summary: TuningSummary, pictures: Pictures | None) -> Iterator[Block]:
    """Yield accuracy by class, what was taken for what, and the worst mistakes."""
    sealed, names = summary.sealed, summary.chosen.class_names
    yield Table.of(
        "classes",
        "Accuracy by class",
        (
            {
                "Class": cell("class", plain(one.name)),
                "Images": cell("images", one.images, count),
                "Found": interval_cell("found", one.found, percent_interval),
                "Called so": cell("predicted", one.predicted, count),
                "Right of these": cell("precision", one.precision, percent),
            }
            for one in sealed.classes
        ),
        "Found: share of the class's sealed images that the model calls so (recall), with Wilson's 95 % interval. "
        "Right of these: share of what it calls so that is of the class (precision).",
        folded=len(names) > MOST_CLASSES,
    )
    figure = confusion_figure(sealed.confusion, [plain(name) for name in names])
    if figure is not None:
        yield figure
    else:
        yield Paragraph(f"No confusion matrix is drawn for {len(names)} classes, more than {MOST_CLASSES}.")
    yield _gallery(sealed, names, pictures)


def _gallery(sealed: Sealed, names: Sequence[str], pictures: Pictures | None) -> Block:
    shown = sealed.mistakes[:SHOWN_MISTAKES]
    if not shown:
        return Paragraph("There are no mistakes on the sealed images to be shown.")
    rule = "The mistakes of which the model was surest, by its calibrated probability; so they are no typical images."
    if pictures is None:
        return Paragraph(f"{rule} No pictures: none were asked for.")
    try:
        made = pictures([one.position for one in shown])
    except UserError as error:
        return Paragraph(f"{rule} No pictures: {plain(str(error))}.")

    def picture(png: bytes, one: Mistake) -> Picture:
        taken = f"taken for {plain(names[one.predicted])}, {percent(one.probability)}"
        return Picture(png, (f"{plain(names[one.label])}", taken, f"image {one.position}"))

    return Gallery(
        slug="mistakes",
        title="The worst mistakes",
        caption=f"{rule} Is the label right? The images are yours; whoever passes this page on passes them on.",
        groups=(
            (
                f"{len(shown)} of {len(sealed.mistakes)} mistakes",
                tuple(picture(png, one) for png, one in zip(made, shown, strict=True)),
            ),
        ),
    )


def compared_blocks(choice: Choice) -> Iterator[Block]:
    """Yield the candidates, and what was tried before they raced."""
    margin = margin_in_points(choice.request.margin_share)
    yield Table.of(
        "candidates",
        f"Candidates, smallest first; the reference is {choice.reference}",
        (_candidate_row(choice, one) for one in choice.candidates),
        "On images of repeated folds, each predicted by a model that was not trained on it. Difference to the "
        f"reference in points of {metric(choice)}, with the interval that accounts for the looks. Loses less than "
        f"{margin}: supported, refuted or not decided, at 5 % for all comparisons together.",
    )
    yield from _courses(choice)
    if choice.probes:
        yield Table.of(
            "probes",
            "Models and image sizes, by linear probes",
            (
                {
                    "Model": cell("model", one.model),
                    "Pixels": cell("image_size", one.image_size),
                    f"{metric(choice).capitalize()} on folds": cell("score", one.score, percent),
                    "Flips": one.flips,
                    "An image": cell("image_s", one.image_s, said_ms),
                    "Why": f"{'taken: ' if one.chosen else ''}{plain(one.why)}",
                }
                for one in choice.probes
            ),
            "A linear probe on the frozen backbone, on the folds of one repetition. How training images are flipped "
            "was chosen likewise, at the first size.",
            folded=True,
        )
    if choice.rates:
        yield Table.of(
            "rates",
            "Learning rates, by successive halving",
            (
                {
                    "Method": cell("kind", one.kind),
                    "Rate": cell("learning_rate", one.learning_rate, lambda rate: f"{rate:.2g}"),
                    "On validation": joined(percent(score) for score in one.scores),
                    "Steps": cell("steps", one.steps, count),
                    "Outcome": "taken" if one.chosen else "–",
                }
                for one in choice.rates
            ),
            "Every method gets the same effort; a rate that falls behind gets no more steps. Rates are ranked by the "
            "folds' validation and test images, half each, so what is taken need not be the best on validation.",
            folded=True,
        )


def _courses(choice: Choice) -> Iterator[Block]:
    """Yield how the race went, from its records; nothing if there was no comparison."""
    for study in read_results(choice.folds_dir).studies:
        scores = {one.name: one.score or 0.0 for one in choice.candidates}
        blocks = stopping_blocks(study, study_courses(study), scores)
        yield from (block for block in blocks if block.kind == "figure")


def _candidate_row(choice: Choice, one: Candidate) -> dict[str, Cell | str]:
    look = one.course.looks[-1] if one.course is not None and one.course.looks else None
    is_reference = one.name == choice.reference
    if look is not None:
        interval = Interval(look.difference, look.low, look.high, look.pairs, 0.9)
        difference = points_interval(interval if all(map(math.isfinite, (look.low, look.high))) else _bare(interval))
    else:
        difference = "is the reference" if is_reference else "–"
    verdict = (one.course.noninferiority if one.course is not None else None) or "–"
    return {
        "Candidate": Cell(f"{one.name} (chosen)" if one.name == choice.chosen else one.name, {"candidate": one.name}),
        "File, about": cell("bytes", one.bytes, megabytes),
        "On folds": cell("score", one.score, percent),
        "Difference": Cell(
            difference,
            {
                "difference": None if look is None else look.difference,
                "low": None if look is None else look.low,
                "high": None if look is None else look.high,
            },
        ),
        "Pairs": cell("pairs", one.pairs or None),
        "Loses less": cell("verdict", verdict),
        "Ended": one.left_out or _ended(one),
    }


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
    yield Table.of(
        "coverage",
        "Prediction sets",
        (
            {
                "Coverage asked": cell("asked", one.asked, percent),
                "On folds": cell("folds", one.folds, percent),
                "Classes in a set": cell("folds_size", one.folds_size, fixed),
                "On sealed images": interval_cell("sealed", one.sealed, percent_interval),
                "Classes in a set there": cell("sealed_size", one.sealed_size, fixed),
            }
            for one in sealed.coverage_results
        ),
        f"How often `predict --coverage` holds the true class. Thresholds come from {calibrated.images} images of "
        "folds, as in split-conformal prediction. On folds each image is asked by thresholds of other images. "
        "For one final model behind several fold models nothing is guaranteed (CV+ would guarantee 1 - 2 alpha), so "
        "coverage is measured, here. The most probable class is always in a set.",
    )


def forms_table(summary: TuningSummary) -> Table:
    """Return every form that was tried."""

    def row(form: Form) -> dict[str, Cell | str]:
        compared = form.comparison
        same = None if compared is None else compared.same_predictions
        return {
            "Form": f"{form.name}",
            "File": cell("bytes", form.bytes, megabytes),
            "ms an image": cell("median_s", form.median_s, lambda s: fixed(1e3 * s, 1)),
            "Quartiles": Cell(
                "–"
                if form.low_s is None or form.high_s is None
                else f"{fixed(1e3 * form.low_s, 1)} to {fixed(1e3 * form.high_s, 1)}",
                {"low_s": form.low_s, "high_s": form.high_s},
            ),
            "Predicts as trained": cell("same_predictions", same, percent),
            "Outcome": plain(form.left_out) or "taken",
        }

    float32 = summary.exports.float32_s
    beside = "" if float32 is None else f" The same model in float32 takes {fixed(1e3 * float32, 1)} ms."
    split = next((form.comparison.split for form in summary.exports.forms if form.comparison is not None), "")
    return Table.of(
        "forms",
        "Forms of the model",
        map(row, summary.exports.forms),
        f"A call on one image on {summary.exports.processor}, with all its processors, each form in processes of its "
        f"own, in turn.{beside} Predicts as trained: share of {split} images on which the file and the "
        "run's model agree.",
    )
