"""The page of one model: how good it is, what it confuses, how far to believe it, and how it was made.

It is the same for `train`, for any run of a study, and for `tune`, which adds what it compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from peft_vit.base.errors import DataWarning
from peft_vit.base.statistics import Interval
from peft_vit.core.records import Predictions, RunRecord
from peft_vit.core.tasks import TASKS, DecidingMetric, metric_of
from peft_vit.data.index import ImagesFile
from peft_vit.deploy.page.class_blocks import (
    Maps,
    Pictures,
    class_blocks,
    copies_block,
    example_gallery,
    map_blocks,
    mistakes_block,
)
from peft_vit.deploy.page.document import Block, Card, Facts, Paragraph, StudyDocument, table
from peft_vit.deploy.page.files import escaped, section_parts, summary_parts
from peft_vit.deploy.page.formatting import bounds_of, count, fixed, joined, megabytes, percent, plain, value_of
from peft_vit.deploy.page.lines import draw_reliability, learning_curves
from peft_vit.deploy.page.output_blocks import coverage_table, output_blocks, shown_blocks
from peft_vit.deploy.page.provenance import caveats, images_name, run_provenance, settings
from peft_vit.deploy.page.quality import (
    ImagesTest,
    ModelQuality,
    beside_the_probe,
    best_known,
    constant_on,
    doubted_labels,
    later_lines,
    model_quality,
    most_frequent_mistake,
    test_score,
    untested,
)

CARD_FILE = "card.md"
LOOK, BELIEF, IMAGES, MADE = (
    "Look at your images",
    "Can you trust its probabilities?",
    "The images",
    "How it was made",
)  # titles of sections
_FIRST = 8  # rows up to which a table is unfolded


@dataclass(frozen=True)
class ModelSummary:
    """What is shown of a model.

    Attributes:
        record: of its run, which is finished.
        commands: that use it, by what they are for.
        said: how good it is, in a line; empty: that is made of the record.
        web: the address of a page of it for a browser, if there is one.
        call: the command that made it; empty: another one.
        seconds: that the call took; None: those of the run.
        on_folds: what models like it predicted of images that each left out; None: there are none.
    """

    record: RunRecord
    commands: Mapping[str, str]
    said: str = ""
    web: str = ""
    call: str = ""
    seconds: float | None = None
    on_folds: Predictions | None = None

    @property
    def metric(self) -> DecidingMetric:
        """Return what decides."""
        return metric_of(self.record.spec)

    @property
    def value(self) -> Interval:
        """Return what decides, on test."""
        return test_score(self.record)

    @cached_property
    def quality(self) -> ModelQuality | None:
        """Return what it confuses on its test images; None of several labels, or of numbers."""
        return model_quality(self.record)

    @property
    def constant(self) -> float:
        """Return the same of always giving one answer, such as the most frequent class."""
        assert self.record.predictions is not None
        return constant_on(self.record.predictions, self.metric, self.record.task)


def model_document(summary: ModelSummary, pictures: Pictures | None = None, maps: Maps | None = None) -> StudyDocument:
    """Return the page of a model.

    Args:
        summary: what is shown.
        pictures: makes pictures of images by their positions; None: there are none.
        maps: likewise of where the model looked.
    """
    record, quality = summary.record, summary.quality
    looked, shortcuts = ((), []) if quality is None else map_blocks(quality, maps)
    learning, tested = learning_curves(record, summary.metric), _tested(record, quality, pictures, looked)
    tested[LOOK] = (*tested.get(LOOK, ()), *_of_training(summary, pictures))
    sections = {
        **tested,
        "How it learned": () if learning is None else (learning,),
        IMAGES: tuple(_images(summary)),
        MADE: (Facts(tuple(_made(summary))),),
    }
    return StudyDocument(
        label=f"A model for {images_name(record.spec.data)}",
        slug="model",
        alerts=(*_alerts(summary), *shortcuts),
        warnings=tuple(plain(text) for text in record.warnings if not text.startswith(DataWarning.PREFIX)),
        cards=tuple(_cards(summary)),
        came_out=tuple(_answer(summary)),
        commands=tuple((what, plain(command)) for what, command in summary.commands.items()),
        sections=sections,
        not_shown=(
            "Images of another kind, camera or time than these: try the model on some of them before you rely on it.",
            "What another seed or another split of the images would change: this is one run.",
            *caveats([record]),
        ),
        runs=(run_provenance(record),),
        kind="model",
        web=summary.web,
    )


def later_document(tested: ImagesTest, images: str, pictures: Pictures | None) -> StudyDocument:
    """Return the page of a model's test on later images, which have a name; pictures as in `model_document`."""
    size = Card("Images", "with labels", count(tested.value.n), (f"{count(len(tested.unreadable))} can't be read",))
    return StudyDocument(
        label=f"A model on {images}",
        slug="test",
        alerts=(),
        warnings=tuple(plain(str(error)) for error in tested.unreadable),
        cards=(accuracy_card(tested), size),
        came_out=tuple(map(plain, later_lines(tested))),
        sections=_tested(tested, tested.quality, pictures),
        not_shown=("Whether some of these images trained the model: then it is worse than this says.",),
        runs=(),
        kind="model",
    )


def _tested(
    record: RunRecord | ImagesTest,
    quality: ModelQuality | None,
    pictures: Pictures | None,
    looked: tuple[Block, ...] = (),
) -> dict[str, tuple[Block, ...]]:
    """Return the sections on what a model says of labelled images."""
    if quality is None:
        return {
            "How good it is": tuple(output_blocks(record)),
            "Where it is wrong": tuple(shown_blocks(record, pictures)),
        }
    examples = example_gallery(quality, pictures)
    return {
        "Test images and what it says of them": () if examples is None else (examples, *looked),
        "Classes": tuple(class_blocks(quality)),
        LOOK: (mistakes_block(quality.mistakes, pictures),) if quality.mistakes else (),
        BELIEF: tuple(_reliability(record, quality)),
    }


def _of_training(summary: ModelSummary, pictures: Pictures | None) -> Iterator[Block]:
    """Yield labels that models on folds doubt, and copies."""
    record, on_folds = summary.record, summary.on_folds
    if on_folds is not None and (doubted := doubted_labels(on_folds, record.class_names)):
        yield mistakes_block(doubted, pictures, tested=False)
    file = record.spec.data.images_file
    if file is not None and Path(file).is_file() and (content := ImagesFile.read(Path(file))).copies:
        yield copies_block(content, pictures)


def card_text(document: StudyDocument, head: str, use: str) -> str:
    """Return card.md: what the page says, without pictures.

    Args:
        document: the page.
        head: metadata, see `card_head`.
        use: how to predict with the model, as Markdown.
    """
    parts = [head, f"# {escaped(document.label)}", *summary_parts(document), "## How to use it", use]
    return "\n\n".join([*parts, *section_parts(document)]) + "\n"


def card_head(summary: ModelSummary, library: str, name: str) -> str:
    """Return the fields of the hub's model cards. No licence is named: that of weights and that of images both bind.

    Args:
        summary: what is shown.
        library: that opens the model.
        name: of the images.
    """
    from huggingface_hub import EvalResult, ModelCardData

    experiment, quality = summary.record.spec.experiment, summary.quality
    kind = "image-classification" if quality is not None or summary.metric.is_share else "image-feature-extraction"
    values = {summary.metric.name: summary.value.estimate}
    if quality is not None:
        values = {"accuracy": quality.accuracy.estimate, "balanced_accuracy": quality.balanced_accuracy.estimate}
    results = [
        EvalResult(
            task_type=kind,
            dataset_type="imagefolder",
            dataset_name=name,
            dataset_split="test",
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in values.items()
    ]
    data = ModelCardData(
        library_name=library,
        pipeline_tag=kind,
        tags=["peft-vit", summary.record.spec.backbone.model, experiment.method],
        metrics=list(values),
        model_name=f"{experiment.name} for {name}",
        eval_results=results,
    )
    return f"---\n{str(data.to_yaml()).strip()}\n---"


# --- what stands on top ---


def _alerts(summary: ModelSummary) -> Iterator[str]:
    """Yield what a person should act on before using the model."""
    record = summary.record
    if record.spec.smoke:
        yield "A smoke run: random weights and synthetic images. It shows that the code runs, and nothing else."
    elif record.provenance is not None and record.provenance.random_weights:
        yield (
            "The backbone's weights are random: no number here says what a pretrained one would reach. Train again "
            "with pretrained weights."
        )
    if summary.metric.sign * (summary.value.estimate - summary.constant) <= 0:
        one = "always giving one answer" if summary.quality is None else "always naming the most frequent class"
        always = f"{one}, which has {value_of(summary.metric, summary.constant)}"
        yield f"It is no better than {always}. Do not use it."
    yield from (plain(text) for text in record.warnings if "one of the labels is wrong" in text)


def _cards(summary: ModelSummary) -> Iterator[Card]:
    record = summary.record
    yield accuracy_card(summary)
    metric, probe_test = summary.metric, record.probe_test
    if probe_test is not None:
        of_probe = value_of(metric, metric.of(probe_test.metrics))
        yield Card("Linear probe", "without fine-tuning", of_probe, ("on the same test images",))
    if record.bytes is not None:
        trained = f"{megabytes(record.bytes.adapter_file_bytes)} were trained"
        yield Card("Size", "backbone and what was trained", megabytes(record.bytes.stored_bytes), (trained,))
    if record.latency_s:
        batch = min(record.latency_s)
        where = "" if record.provenance is None else plain(record.provenance.processor)
        yield Card("Time for an image", where, f"{fixed(1e3 * record.latency_s[batch] / batch, 1)} ms", ())
    yield labels_card(record)


def accuracy_card(summary: ModelSummary | ImagesTest) -> Card:
    """Return what decides, with its interval."""
    metric, value, where = summary.metric, summary.value, "images"
    if isinstance(summary, ModelSummary):
        value, where = best_known(summary.record)
    words = metric.words[0].upper() + metric.words[1:]
    one = "answer" if summary.quality is None else "class"
    constant = f"always the same {one}: {value_of(metric, summary.constant)}"
    bounds = f"95 %: {bounds_of(metric, value)}{' %' if metric.is_share else ''}"
    return Card(words, f"on {count(value.n)} {where}", value_of(metric, value.estimate), (bounds, constant))


def labels_card(record: RunRecord) -> Card:
    """Return how many labels it took."""
    sizes = record.split_sizes
    held_out = {"to validate": sizes["validation"], "to test": sizes["test"]}
    more = tuple(f"{count(images)} more {to}" for to, images in held_out.items() if images)
    what = TASKS[record.spec.task].counted(record.class_names)
    return Card("Labels used", f"training images of {what}", count(sizes["train"]), more)


def _answer(summary: ModelSummary) -> Iterator[str]:
    quality, n, metric = summary.quality, summary.value.n, summary.metric
    if summary.said:
        yield plain(summary.said)
    else:
        if quality is not None:
            yield f"It is right on {count(n - len(quality.mistakes))} of {count(n)} test images."
        if metric.equal_classes:
            yield (
                "Classes are uneven, so balanced accuracy counts, the mean of the accuracies of the classes: "
                f"{percent(summary.value.estimate)}."
            )
        expected = f"{bounds_of(metric, summary.value)}{' %' if metric.is_share else ''}"
        yield f"On other images of the same kind expect {expected} ({metric.words}, 95 % interval)."
    yield from untested(summary.record)
    yield from beside_the_probe(summary.record)
    yield from most_frequent_mistake(quality)


# --- sections ---


def _reliability(record: RunRecord | ImagesTest, quality: ModelQuality) -> Iterator[Block]:
    """Yield whether probabilities hold, what was done so that they do, and how often sets hold the class."""
    sure, right = quality.mean_confidence, quality.accuracy.estimate
    low, high = quality.accuracy.low or 0.0, quality.accuracy.high or 0.0
    bins, verdict = quality.reliability(), "so its probabilities hold"
    if not low <= sure <= high:
        gap = fixed(100 * abs(sure - right), 1)
        verdict = f"so it is too {'sure' if sure > right else 'careful'} by {gap} points"
    elif not bins:
        verdict = f"and {count(quality.accuracy.n)} images are too few to tell whether its probabilities hold"
    yield Paragraph(f"It says {percent(sure)} on average and is right on {percent(right)}, {verdict}.")
    if bins:
        caption = (
            f"Test images in {len(bins)} groups of about {bins[0].count}, by the probability of the answer. Bars: "
            "95 % intervals. On the dashed line a model is right as often as it says; below it it is too sure."
        )
        yield draw_reliability(bins, caption)
    n, calibrated, tested = quality.accuracy.n, record.calibrated, record.tested_calibration
    if calibrated is None or tested is None:
        return
    by = "as usual at the accuracy that is expected; there was no time for models that leave images out"
    if calibrated.images:
        by = f"on {count(calibrated.images)} images not trained on"
    yield Paragraph(f"All probabilities here are calibrated, {by}.")
    yield from coverage_table(record, fixed)
    if tested.unlike is not None and isinstance(record, ImagesTest):
        unlike = f"{count(tested.unlike)} of {count(n)} images"
        yield Paragraph(f"`predict` flags {unlike} as unlike all that the model was trained on.")
    elif tested.unlike is not None:
        yield Paragraph(
            "`predict` flags images that are unlike all that the model was trained on. It also flagged "
            f"{count(tested.unlike)} of {count(n)} ordinary test images: {percent(tested.unlike / n)} false alarms."
        )


def _images(summary: ModelSummary) -> Iterator[Block]:
    record = summary.record
    if counts := record.class_counts:
        yield table(
            "class_counts",
            "Images by class",
            [
                {"class": plain(name)} | dict(zip(counts, each, strict=True))
                for name, *each in zip(record.class_names, *counts.values(), strict=True)
            ],
            None,
            "Test images are read once, at the end.",
            folded=len(record.class_names) > _FIRST,
        )
    if left_out := record.left_out:
        what = "item" if any(name.endswith("/") for name in left_out) else "file"  # a folder's name ends so
        yield table(
            "left_out",
            f"{count(len(left_out))} {what}{'s' * (len(left_out) > 1)} left out",
            [{"File": plain(name), "Why": plain(why)} for name, why in left_out.items()],
            None,
            "Nothing was trained on them or tested with them.",
            folded=len(left_out) > _FIRST,
        )
    for text in record.warnings:
        if text.startswith(DataWarning.PREFIX):
            yield Paragraph(f"{plain(text.removeprefix(DataWarning.PREFIX))}.")


def _made(summary: ModelSummary) -> Iterator[tuple[str, str]]:
    record, seconds = summary.record, summary.seconds or summary.record.seconds
    if summary.call:
        yield "Command", plain(summary.call)
    yield "Date", record.started_at[:10]
    spec, origin, training = record.spec, record.provenance, record.spec.experiment.training
    assert origin is not None
    ranks = sorted(record.rank_history[-1].ranks.values()) if record.rank_history else []
    ends = " to ".join(map(str, dict.fromkeys((*ranks[:1], *ranks[-1:]))))
    each = f", rank {ends} on {len(ranks)} matrices" if ranks else ""
    yield "Method", spec.experiment.kind.title + each
    sizes = joined(f"{size:,} {name}" for name, size in record.split_sizes.items())
    rows = settings([spec], [record], smoke=spec.smoke) | {"Split": sizes}
    yield from ((key, value) for key, value in rows.items() if value)
    if spec.data.path is not None:
        yield "Folder", plain(str(spec.data.path))
    if not spec.experiment.is_probe:
        chosen = "" if record.chosen_step is None else f", of which step {record.chosen_step} was kept"
        size = f"{len(record.steps):,} of {training.batch_size} images"
        yield "Steps", f"{size}{chosen}; learning rate {training.learning_rate:g}"
    if training.loss is not None:
        yield "Loss", training.loss.replace("_", " ")
    if training.class_weights != "none":
        yield "Class weights", f"{training.class_weights}, in the loss"
    if (counted := record.parameters) is not None:
        yield "Trained", f"{counted.final:,} of {counted.backbone_total + counted.head:,} parameters"
    yield "Time", f"{seconds:.0f} s"
    yield "Seed", str(spec.seed)
    shown = ("peft-vit", "torch", "timm", "transformers")
    yield "Versions", joined(f"{name} {origin.packages[name]}" for name in shown if name in origin.packages)
    integers = ""
    if spec.multiplies_integers:
        integers = ", int8 forward pass" if record.is_measured_in_integers else ", frozen layers trained in int8"
    yield "Machine", f"{plain(origin.processor)}, {spec.threads} threads, {origin.device}, {spec.precision}{integers}"
