"""What a tuning came to, and what it leaves: the model in its fastest form, what trains it again, a card, a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from peft_vit.base.console import duration, quoted, some_of
from peft_vit.base.errors import UserError
from peft_vit.base.files import read_bytes, write_whole
from peft_vit.base.statistics import Interval
from peft_vit.core.records import Calibrated, RunRecord
from peft_vit.core.records import Decision as Meaning
from peft_vit.data import thumbnails_of
from peft_vit.deploy.explain import explained_images
from peft_vit.deploy.measures.fastest import Exports, export_fastest
from peft_vit.deploy.page.class_blocks import Maps, Pictures, fonts_for, no_font
from peft_vit.deploy.page.document import (
    Block,
    Card,
    Column,
    Facts,
    Paragraph,
    StudyDocument,
    Table,
    only_in_file,
    own_interval_columns,
    table,
)
from peft_vit.deploy.page.files import write_report
from peft_vit.deploy.page.formatting import (
    bounds_of,
    fixed,
    joined,
    megabytes,
    number_interval,
    percent,
    plain,
    points,
    points_interval,
    scaled,
    score_interval,
    score_of,
    value_of,
)
from peft_vit.deploy.page.model_page import (
    BELIEF,
    CARD_FILE,
    IMAGES,
    MADE,
    ModelSummary,
    accuracy_card,
    card_head,
    card_text,
    labels_card,
    model_document,
)
from peft_vit.deploy.page.provenance import run_provenance
from peft_vit.fit.decide import ModelDecision
from peft_vit.fit.fit import TITLES
from peft_vit.fit.intake import LabelledSet, refuse_among_images
from peft_vit.fit.outcomes import Outcome, predictions_on, with_meaning
from peft_vit.fit.recipe import Recipe
from peft_vit.fit.request import TUNE_FILE, TuneRequest
from peft_vit.fit.sizes import NO_TIME, SizeResult
from peft_vit.runs.records.storage import ADAPTER_FILE, FEATURES_FILE, HTML_FILE, MODEL_FOLDER, RECORD_FILE, read_record
from peft_vit.runs.records.study_yaml import study_yaml

STUDY_COPY = "config.yaml"


_NAMED = 4  # recipes that are named in a sentence


@dataclass(frozen=True)
class Tuning:
    """A model that a tuning writes, and what it was chosen by."""

    request: TuneRequest  # what was asked for
    images: LabelledSet  # that it was fitted to
    sizes: tuple[SizeResult, ...]  # every model and image size
    recipe: Recipe  # what was taken
    final: Outcome  # of its last training, on the sealed images, in that form
    before_rounding: Outcome  # the same run in float; where nothing was rounded after training, the same as `final`
    decision: ModelDecision | None = None  # what was compared, and the odds; None: nothing was yet
    folds: tuple[Outcome, ...] = ()  # of the chosen recipe, in the form that was taken
    longer: float = 1.0  # times the steps that follow from the folds, of the last training
    more: tuple[str, ...] = ()  # what more labels and more minutes would buy, sentences
    stage_seconds: tuple[tuple[str, float], ...] = ()  # by name, of all calls together
    meaning: Calibrated | Meaning | None = None  # of the outputs, from what runs on folds said of their test images

    @property
    def score(self) -> Interval:
        """Return what decides, on the test images."""
        return self.images.metric.interval(self.final.labels, *self.final.predictions(self.meaning))

    @property
    def changed_by_rounding(self) -> Interval | None:
        """Return what rounding changed of that; None: nothing was rounded after training."""
        (before, least), (after, _) = (own.predictions(self.meaning) for own in (self.before_rounding, self.final))
        rounded = self.before_rounding is not self.final
        return self.images.metric.gain(self.final.labels, before, after, least, least) if rounded else None


def check_output(request: TuneRequest) -> None:
    """Refuse an output among the images, and one where files of others would be replaced."""
    refuse_among_images(request.images, request.output)
    output = request.output.resolve()
    if not (output / TUNE_FILE).exists():
        for name in (MODEL_FOLDER, "figures", "tables", STUDY_COPY, CARD_FILE, HTML_FILE):
            if (output / name).exists():
                problem = "exists already, and tune did not make it; move it away, or choose another --output"
                raise UserError(problem, file=request.output / name)


def write_output(choice: Tuning, directory: Path, tell: Callable[[str], None] = print) -> None:
    """Write everything that a tuning leaves; what an earlier call left is replaced.

    Raises:
        UserError: if a run can't be restored, the model can't be exported, or a file can't be read or written.
    """
    try:
        _write(choice, directory, tell)
    except OSError as error:  # of reading as well as of writing: the error names the file
        problem = f"{error.strerror or error}; fix that, and the same command continues"
        raise UserError(problem, file=error.filename or directory) from None


def _write(choice: Tuning, directory: Path, tell: Callable[[str], None]) -> None:
    run_dir, recipe, model_folder = choice.final.folder, choice.recipe, directory / MODEL_FOLDER
    record = with_meaning(read_record(run_dir / RECORD_FILE), choice.meaning, choice.folds, choice.final)
    exports = export_fastest(
        run_dir,
        model_folder,
        meaning=choice.meaning,
        bits=recipe.rounded_to,
        max_bytes=choice.request.max_bytes,
        max_latency_s=choice.request.max_latency,
        tell=lambda text: tell(f"  {text}"),
    )
    use = {"To predict": f"peft-vit predict {quoted(exports.model)} PHOTO.jpg"}
    on_folds = predictions_on(choice.folds, choice.final.learned, choice.meaning, choice.images.index)
    model = ModelSummary(record, use, answer(choice, exports.timed.bytes), on_folds=on_folds)
    adapter, config = model_folder / ADAPTER_FILE, directory / STUDY_COPY
    for name in (ADAPTER_FILE, *([] if record.features_sha256 is None else [FEATURES_FILE])):
        write_whole(model_folder / name, read_bytes(run_dir / name, limit_bytes=None))
    write_whole(model_folder / RECORD_FILE, (record.model_dump_json(indent=1) + "\n").encode())
    write_whole(config, configuration(choice, record).encode())
    library = "openvino" if exports.model.suffix == ".xml" else "onnx"
    head = card_head(model, library, choice.request.images.name or "images")
    pictures, maps = partial(thumbnails_of, record), partial(explained_images, run_dir, record)
    document = tuning_document(choice, model, exports, pictures, maps)
    again, file = "\n".join(_again(choice, record)), f"model/{exports.model.name}"
    sets = " --coverage 0.9" if record.calibrated and record.calibrated.coverages else ""
    how = (
        f"```\npeft-vit predict {file} IMAGES...{sets}\n\n# trains it again\n{again}\n"
        f'```\n\n```python\nimport peft_vit\n\nprint(peft_vit.load("{file}").predict("photo.jpg"))\n```\n\nThe '
        "file takes `images` (B, 3, S, S) and gives `logits`; how pixels become these, the classes and the "
        "temperature\nare in its metadata `peft_vit_model`. `model/adapter.safetensors` holds what was "
        "trained, without the backbone."
    )
    write_report([document], {CARD_FILE: card_text(document, head, how)}, directory)
    if missing := fonts_for(record.class_names)[1]:
        tell(f"  {no_font(missing)}")
    for sentence in (*document.results, *exports.missed):
        tell(f"  {sentence}")
    for path in (exports.model, adapter, config, directory / CARD_FILE, directory / HTML_FILE):
        tell(f"  {path}")


def configuration(choice: Tuning, record: RunRecord) -> str:
    """Return a study of the final run alone; run again it gives the same adapter, on the same kind of machine."""
    comments = [
        f"Trains {choice.recipe.title} again, as it was chosen for {choice.request.images}:",
        *_again(choice, record),
        f"The adapter's SHA-256 was {record.adapter_sha256}.",
    ]
    return study_yaml(record.spec, [record.spec.seed], suffix="", comments=[" ".join(one.split()) for one in comments])


def _again(choice: Tuning, record: RunRecord) -> list[str]:
    """Return the commands that train the model again."""
    commands = [f"peft-vit run {STUDY_COPY} --output again"]
    if choice.recipe.rounded_to:
        commands.append(f"peft-vit export again/{record.spec.run_id} --bits {choice.recipe.bits} --output again.onnx")
    return commands


# --- how good it is, and what more would bring ---


def answer(choice: Tuning, written: int | None = None) -> str:
    """Return what was taken, what it has on the test images, and its odds: a line; `written` is the file's bytes."""
    decision, metric, score = choice.decision, choice.images.metric, choice.score
    right, value = "right" if metric.name == "accuracy" else metric.words, value_of(metric, score.estimate)
    by = f"{bounds_of(metric, score)}, by {score.n:,} test images"
    size = written or (0 if decision is None else decision.taken.bytes)
    head = f"{choice.recipe.title}{f', {megabytes(size)}' if size else ''}: {value} {right} on new images ({by})."
    if decision is None:
        return f"{head} It is the first model; nothing else was compared with it."
    odds = decision.odds
    if choice.recipe == decision.reference:
        return f"{head} It is the best float model found."
    scores, margin = choice.images.scores, choice.images.scores.hundredths(choice.request.margin_share)
    amount, better = fixed(100 * abs(odds.loss), 1), "better" if odds.loss > 0 else "worse"
    gap = f"{amount} {scores.unit} {better}" if float(amount) else "as good"
    than = f"The best float model found ({decision.reference.title}) is expected to be {gap}"
    chance = "below 1 %" if odds.chance_of_loss < 0.01 else f"{fixed(100 * odds.chance_of_loss, 0)} %"
    shown = f" Shown: it does not lose more than {margin}." if odds.shown else ""
    return f"{head} {than}; the chance that it is more than {margin} better is {chance}.{shown}"


def what_more_buys(
    labels: Interval | None,
    error: float,
    steps: Interval | None,
    longer: float,
    sizes: Sequence[SizeResult],
    untried: Sequence[Recipe],
    minutes: float,
    unit: str = "points",
) -> tuple[str, ...]:
    """Return what more labels and more minutes would bring, in sentences.

    Args:
        labels: by what share of its error twice as many lower the regression's; None: unknown.
        error: that is expected of what was taken, a share.
        steps: by how much twice as many lower that, a share; None: unknown.
        longer: times as many steps the last training has had.
        sizes, untried: sizes, and recipes that there was no time for.
        minutes: of this call.
        unit: of a hundredth of a share, see `Scores`.
    """
    sentences = []
    if labels is None:
        sentences.append("What more labels would bring is unknown: there are too few to learn from half of them.")
    else:
        learns = "if errors fall as the regression's do with half and with all of them"
        sentences.append(f"Twice as many labels: {_gain(scaled(labels, error), unit)}, {learns}.")
    if steps is not None:
        learns = f"as it learns with half and all of its steps, on {steps.n} images of folds"
        had = f" The last training has had {longer:.2g} times the steps of the folds." if longer != 1 else ""
        sentences.append(f"Twice the steps of the folds: {_gain(steps, unit)}, {learns}.{had}")
    left = ["all steps of the last training"] if longer < 1 else []
    left += [f"{size.model} at {size.image_size} px" for size in sizes if size.why == NO_TIME]
    left += [f"{recipe.title} ({recipe.settings})" for recipe in untried]
    if left:
        sentences.append(
            f"Not tried for lack of time: {some_of(left, _NAMED)}. The same command with --minutes "
            f"{2 * minutes:g} tries some of it, and keeps what was done."
        )
    return tuple(sentences)


def _gain(expected: Interval, unit: str) -> str:
    low, high = (points(end or 0.0) for end in (expected.low, expected.high))
    return f"about {points(expected.estimate)} {unit} ({low} to {high})"


# --- the page: that of any model, what it was compared with, its files, and what more would bring ---------------------

_AT = 0.9  # coverage that stands at the top
COMPARED, FORMS, MORE = "Compared with", "Files and speed", "What more would bring"


def tuning_document(
    choice: Tuning, model: ModelSummary, exports: Exports, pictures: Pictures | None, maps: Maps | None = None
) -> StudyDocument:
    """Return the document; pictures and maps as in `model_document`."""
    page = model_document(model, pictures, maps)
    (made,) = page.sections[MADE]
    assert isinstance(made, Facts)
    asked, calibrated = dict(_facts(choice)), model.record.calibrated
    has_sets = model.quality is None or (calibrated is not None and calibrated.coverages)
    sections: dict[str, tuple[Block, ...]] = {}
    for title, blocks in page.sections.items():
        if title == (BELIEF if BELIEF in page.sections else IMAGES):
            sections[COMPARED] = tuple(_compared(choice))
            sections[MORE] = tuple(Paragraph(plain(sentence)) for sentence in choice.more)
            sections[FORMS] = (forms_table(exports),)
        sections[title] = blocks
    asked_for = None if choice.request.metric == "auto" else choice.images.metric
    sections[IMAGES] = tuple(Paragraph(f"{plain(line)}.") for line in choice.images.inspection.lines(asked_for))
    sections[MADE] = (Facts((*asked.items(), *(row for row in made.rows if row[0] not in (*asked, "Folder")))),)
    return replace(
        page,
        label=f"A model for {plain(choice.request.images.name)}",
        alerts=(*exports.missed, *page.alerts),
        cards=tuple(_cards(model, exports)),
        how_sure=tuple(_how_sure(choice)),
        sections=sections,
        not_shown=(
            "Images of another kind, camera or time than these: nothing here is about them.",
            "Other backbones and methods than those in the tables.",
            *([] if has_sets else ["Prediction sets: there are too few images for thresholds."]),
        ),
        runs=(run_provenance(model.record)._replace(title=choice.recipe.title),),
    )


def _facts(choice: Tuning) -> Iterator[tuple[str, str]]:
    request = choice.request
    limits = (
        "" if request.max_bytes is None else megabytes(request.max_bytes),
        "" if request.max_adapter_bytes is None else f"{request.max_adapter_bytes / 1e3:g} kB of updates",
        "" if request.max_latency is None else f"{1e3 * request.max_latency:g} ms an image",
        "" if request.memory_limit is None else f"{request.memory_limit} of memory in training",
    )
    yield "Images", str(request.images)
    of = "" if choice.images.metric.has_unit else f" of {choice.images.metric.words}"
    yield "Margin", choice.images.scores.hundredths(request.margin_share) + of
    yield "Limits", joined(filter(None, limits)) or "none"
    stages = joined(f"{TITLES[name]} {duration(taken)}" for name, taken in choice.stage_seconds)
    yield "Time", f"{duration(sum(dict(choice.stage_seconds).values()))} in all calls, before this page: {stages}"
    yield "Models", f"{joined(request.models)}; chosen: {choice.recipe.model} at {choice.recipe.image_size} pixels"


def _cards(model: ModelSummary, exports: Exports) -> Iterator[Card]:
    tested, timed = model.record.tested_calibration, exports.timed
    yield accuracy_card(model)
    yield Card("Size", exports.model.name, megabytes(timed.bytes), (exports.taken.name,))
    float32 = exports.float32_s
    against = () if float32 is None else (f"{fixed(1e3 * float32, 1)} ms in float32",)
    yield Card("Time for an image", timed.processor, f"{fixed(1e3 * timed.median_s, 1)} ms", against)
    if model.quality is not None and tested is not None and _AT in tested.covered:
        said = f"these hold the true class of {percent(tested.covered[_AT])} of test images"
        where = f"that an image may be of, on average, by --coverage {_AT:g}"
        yield Card("Classes in a set", where, fixed(tested.set_size[_AT], 2), (said,))
    yield labels_card(model.record)


def _how_sure(choice: Tuning) -> Iterator[str]:
    changed = choice.changed_by_rounding
    if changed is not None:
        by = f"{points_interval(changed)} points" if choice.images.metric.is_share else number_interval(changed, 3)
        yield f"Rounding changed {choice.images.metric.words} on the test images by {by}."
    # Of a call that went on, those of the earlier ones, too.
    read = choice.final.folder.parents[2].glob(f"final-*/*/*/{RECORD_FILE}")
    readers, once = len({record.parents[1] for record in read}), "read once, after everything was chosen"
    if readers > 1:
        once = f"read by {readers} models, each when it was written; no choice rests on them"
    yield (f"The test images were {once}. The interval says what as many other images of the same kind would change.")
    if choice.longer != 1:
        why, others = "time was short", "longer"
        if choice.longer > 1:
            why, others = "more steps usually gain, and the folds do not contradict it", "shorter"
        times = f"The last training has {choice.longer:.2g} times the steps of those on folds"
        yield f"{times}, since {why}; the odds, probabilities and sets of classes are from the {others} ones."
    if choice.decision is not None and choice.decision.odds.shown and choice.recipe != choice.decision.reference:
        yield "Shown means: at most 5 % of such statements are wrong."


def _compared(choice: Tuning) -> Iterator[Block]:
    """Yield the models that were compared, and the image sizes that were tried."""
    scores, words = choice.images.scores, choice.images.metric.words.capitalize()
    if (decision := choice.decision) is not None:
        expected = partial(score_interval, scores), partial(own_interval_columns, "score")
        yield table(
            "candidates",
            "Models that were compared, smallest first",
            decision.candidates,
            [
                Column("Model", "recipe.title", data="model"),
                Column("Trained", lambda candidate: candidate.recipe.settings or None, data="trained"),
                Column("File, about", "bytes", megabytes),
                Column("Folds", "folds"),
                Column(f"{words} expected", "odds.score", *expected),
                Column(f"Against the best, {scores.unit}", "odds.loss", lambda loss: points(-loss), "loss"),
                Column("Loses more than the margin", "odds.chance_of_loss", percent, "chance_of_loss"),
                Column("Why not", lambda candidate: plain(candidate.why) or "taken", data="why_not"),
            ],
            "By images of folds, each predicted by a model that was not trained on it; expected is what another "
            "training has on new images, since the best of many was usually lucky. The best is the best float model "
            f"found, {decision.reference.title}; the last but one column has the chance to be more than "
            f"{scores.hundredths(choice.request.margin_share)} worse.",
        )
    yield table(
        "sizes",
        "Image sizes, by regressions on frozen features",
        choice.sizes,
        [
            Column("Model", "model"),
            Column("Pixels", "image_size"),
            Column(words, "score", partial(score_of, scores)),
            Column("Steps that fit a run", lambda size: size.steps or None, data="steps"),
            Column("Left out", lambda size: plain(size.why) or None, data="left_out"),
        ],
        "On images that are left out of the fit in turn. Larger images leave fewer steps to training.",
        folded=True,
    )


def forms_table(exports: Exports) -> Table:
    """Return every form that was tried."""
    float32 = exports.float32_s
    beside = "" if float32 is None else f" The same model in float32 takes {fixed(1e3 * float32, 1)} ms."
    split = next((form.comparison.split for form in exports.forms if form.comparison is not None), "")
    return table(
        "forms",
        "Forms of the model",
        exports.forms,
        [
            Column("Form", "name", data=""),
            Column("File", "timed.bytes", megabytes, "bytes"),
            Column("ms an image", "timed.median_s", lambda s: fixed(1e3 * s, 1), "median_s"),
            Column("Quartiles", "timed", lambda row: f"{fixed(1e3 * row.low_s, 1)} to {fixed(1e3 * row.high_s, 1)}"),
            *only_in_file(low_s="timed.low_s", high_s="timed.high_s"),
            Column(
                "Predicts as trained",
                lambda form: form.comparison and form.comparison.same_predictions,
                percent,
                "same_predictions",
            ),
            Column("Outcome", lambda form: plain(form.left_out) or "taken"),
        ],
        f"A call on one image on {exports.timed.processor}, each form in processes of its own, in turn.{beside} "
        f"Predicts as trained: share of {split} images on which the file and the "
        "run's model agree.",
    )
