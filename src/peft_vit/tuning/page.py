"""The page of a tuned model: that of any model, with what it was compared with, its files and its prediction sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peft_vit.records import RECORD_FILE
from peft_vit.report.class_blocks import Pictures
from peft_vit.report.document import Block, Card, Facts, Paragraph, StudyDocument
from peft_vit.report.formatting import (
    fixed,
    joined,
    margin_in_points,
    megabytes,
    percent,
    percent_interval,
    plain,
    points_interval,
    signed,
)
from peft_vit.report.model_page import BELIEF, IMAGES, MADE, ModelSummary, accuracy_card, labels_card, model_document
from peft_vit.report.summary import run_provenance
from peft_vit.statistics import Interval
from peft_vit.tuning.blocks import TuningSummary, calibration_blocks, compared_blocks, forms_table
from peft_vit.tuning.result import Choice

_AT = 0.9  # coverage that stands at the top
COMPARED, FORMS = "What it was compared with", "Files and speed"


def model_summary(summary: TuningSummary) -> ModelSummary:
    """Return what the page of any model tells of the chosen one."""
    use = f"peft-vit predict model/{summary.exports.model.name}"
    return ModelSummary(summary.chosen, summary.sealed.quality, use)


def tuning_document(summary: TuningSummary, pictures: Pictures | None) -> StudyDocument:
    """Return the document.

    Args:
        summary: everything that is told.
        pictures: makes pictures of test images; None: there are none.
    """
    choice = summary.choice
    page = model_document(model_summary(summary), pictures)
    (made,) = page.sections[MADE]
    assert isinstance(made, Facts)
    asked = dict(_facts(summary))
    sections: dict[str, tuple[Block, ...]] = {}
    for title, blocks in page.sections.items():
        if title == BELIEF:
            sections[COMPARED] = tuple(compared_blocks(choice))
            sections[BELIEF] = tuple(calibration_blocks(summary))
            sections[FORMS] = (forms_table(summary),)
        else:
            sections[title] = blocks
    sections[IMAGES] = tuple(Paragraph(f"{plain(line)}.") for line in choice.seen.lines())
    sections[MADE] = (Facts((*asked.items(), *(row for row in made.rows if row[0] not in (*asked, "Folder")))),)
    return replace(
        page,
        label=f"A model for {plain(choice.request.images.name)}",
        alerts=(*_notices(summary), *page.alerts),
        cards=tuple(_cards(summary)),
        came_out=tuple(_came_out(summary)),
        how_sure=tuple(_how_sure(summary)),
        sections=sections,
        not_shown=tuple(_not_shown(summary)),
        runs=tuple(run_provenance(record)._replace(title=name) for name, record in summary.records.items()),
    )


def _notices(summary: TuningSummary) -> Iterator[str]:
    if not summary.choice.shown:
        courses = [one.course for one in summary.choice.candidates if one.course is not None]
        in_time = all(course.stopped is not None for course in courses)
        why = "comparisons have ended without an answer" if in_time else "time ended before a comparison did"
        yield f"NOT DECIDED: {why}. The chosen model is the best guess so far."
    yield from summary.exports.missed


def _facts(summary: TuningSummary) -> Iterator[tuple[str, str]]:
    request, choice = summary.choice.request, summary.choice
    limits = [
        *([megabytes(request.max_bytes)] if request.max_bytes is not None else []),
        *([f"{1e3 * request.max_latency:g} ms an image"] if request.max_latency is not None else []),
        *([f"{request.memory_limit} of memory in training"] if request.memory_limit is not None else []),
    ]
    yield "Images", str(request.images)
    yield (
        "Promise",
        f"loses less than {margin_in_points(request.margin_share)} of {choice.metric.words} against the reference",
    )
    yield "Limits", joined(limits) or "none"
    seconds = sum(seconds for _, seconds in choice.stages)
    stages = joined(f"{name} {_duration(one)}" for name, one in choice.stages)
    yield "Time", f"{_duration(seconds)} of {request.minutes:g} minutes a call: {stages}"
    yield "Models", f"{joined(request.models)}; taken: {choice.model} at {choice.image_size} pixels"


def _cards(summary: TuningSummary) -> Iterator[Card]:
    sealed, taken = summary.sealed, summary.exports.taken
    yield accuracy_card(model_summary(summary))
    assert taken.bytes is not None
    yield Card("Size", summary.exports.model.name, megabytes(taken.bytes), (taken.name,))
    assert taken.median_s is not None
    float32 = summary.exports.float32_s
    against = () if float32 is None else (f"{fixed(1e3 * float32, 1)} ms in float32",)
    yield Card("Time for an image", summary.exports.processor, f"{fixed(1e3 * taken.median_s, 1)} ms", against)
    for one in sealed.coverage_results:
        if one.asked == _AT:
            said = f"hold {percent(one.sealed.estimate)} of the test images' classes"
            yield Card("Classes in a set", f"--coverage {_AT:g}", fixed(one.sealed_size, 2), (said,))
    yield labels_card(summary.chosen)


def _came_out(summary: TuningSummary) -> Iterator[str]:
    choice, sealed = summary.choice, summary.sealed
    yield f"{choice.chosen} was chosen: {choice.why}"
    said = f"It is right on {percent_interval(sealed.quality.accuracy)} of {sealed.quality.accuracy.n} test images"
    if sealed.reference is None or sealed.lost is None:
        yield f"{said}. It is itself the reference with which all others were compared."
    else:
        yield (
            f"{said}; the reference, {choice.reference}, on {percent_interval(sealed.reference)}. The difference is "
            f"{points_interval(_negative(sealed.lost))} points."
        )
    form = summary.exports.taken
    assert form.bytes is not None
    assert form.median_s is not None
    yield f"Its file takes {megabytes(form.bytes)} ({form.name}), an image {fixed(1e3 * form.median_s, 1)} ms here."


def _negative(interval: Interval) -> Interval:
    assert interval.low is not None
    assert interval.high is not None
    return Interval(-interval.estimate, -interval.high, -interval.low, interval.n, interval.confidence)


def _how_sure(summary: TuningSummary) -> Iterator[str]:
    choice = summary.choice
    if choice.shown:
        yield (
            "The promise was tested on repeated folds, over other images as well as seeds; at most 5 % of tunings show "
            f"a model that truly loses {margin_in_points(choice.request.margin_share)} or more."
        )
    else:
        yield "The promise was not shown: the comparisons below that are not decided say how far they came."
    yield f"More time: {choice.more_time}" if choice.more_time else "More time would change nothing that was asked."
    readers, own = _readers(choice), len(choice.final_runs)
    once = "read once, by the chosen model and the reference, after everything was chosen"
    if readers > own:
        once = (
            f"read by {readers} models, {readers - own} of them of earlier calls that went on; no choice rests on them"
        )
    yield (
        f"The test images were {once}. Their intervals tell what as many other images of the same kind would change."
    )
    if summary.exports.int8_loss is not None:
        yield f"Activations in 8 bits lose {signed(100 * summary.exports.int8_loss, 1)} points on images of folds."


def _readers(choice: Choice) -> int:
    """Return how many models have read the sealed images: of a call that went on, those of the earlier ones, too."""
    study = choice.final_runs[choice.chosen].parents[1]
    return len({record.parents[1] for record in study.glob(f"*/*/{RECORD_FILE}")})


def _duration(seconds: float) -> str:
    return f"{fixed(seconds, 0)} s" if seconds < 100 else f"{fixed(seconds / 60, 1)} min"


def _not_shown(summary: TuningSummary) -> Iterator[str]:
    undecided = [
        one.name
        for one in summary.choice.candidates
        if one.course is not None and one.course.noninferiority == "not decided"
    ]
    if undecided:
        yield f"Not decided: {joined(undecided)}."
    left_out = [one for one in summary.choice.candidates if one.left_out]
    if left_out:
        yield f"Not raced: {joined(f'{one.name} ({one.left_out})' for one in left_out)}."
    yield "Images of another kind, camera or time than these: nothing here speaks of them."
    yield "Other backbones and methods than those in the tables."
    if len(summary.sealed.coverage_results) == 0:
        yield "Prediction sets: there are too few images for thresholds."
