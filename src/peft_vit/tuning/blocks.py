"""Tables and figures of what a tuning came to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from peft_vit.analysis.model_quality import ModelQuality
from peft_vit.records import RunRecord
from peft_vit.report.document import Block, Table
from peft_vit.report.formatting import fixed, margin_in_points, megabytes, percent, percent_interval, plain, points
from peft_vit.report.tables import Column, own_interval_columns, table
from peft_vit.runs.fastest import Exports, Form
from peft_vit.tuning.result import Choice
from peft_vit.tuning.throughput import said_ms


@dataclass(frozen=True)
class TuningSummary:
    """Everything that is told of a tuning.

    Attributes:
        choice: what was chosen and what it was chosen by.
        record: of the last training, in the form that is delivered, on the sealed images.
        quality: likewise.
        exports: what was written.
    """

    choice: Choice
    record: RunRecord
    quality: ModelQuality
    exports: Exports


def compared_blocks(choice: Choice) -> Iterator[Block]:
    """Yield the models that were compared, and the image sizes that were tried."""
    margin, words = margin_in_points(choice.request.margin_share), choice.metric.words
    yield table(
        "candidates",
        "Models that were compared, smallest first",
        choice.decision.candidates,
        [
            Column("Model", "recipe.title", data="model"),
            Column("Trained", lambda candidate: candidate.recipe.settings or None, data="trained"),
            Column("File, about", "bytes", megabytes),
            Column("Folds", "folds"),
            Column(
                f"{words.capitalize()} expected", "odds.score", percent_interval, partial(own_interval_columns, "score")
            ),
            Column("Against the best, points", lambda candidate: -candidate.odds.loss, points, "difference"),
            Column("Loses more than the margin", "odds.chance_of_loss", percent, "chance_of_loss"),
            Column("Why not", lambda candidate: plain(candidate.why) or "taken", data="why_not"),
        ],
        "By images of folds, each predicted by a model that was not trained on it; expected is what another training "
        "has on new images, since the best of many was lucky as a rule. The best is the best float model found, "
        f"{choice.decision.reference.title}; the last but one column has the chance to be more than {margin} worse.",
    )
    yield table(
        "sizes",
        "Image sizes, by regressions on frozen features",
        choice.sizes,
        [
            Column("Model", "model"),
            Column("Pixels", "image_size"),
            Column(words.capitalize(), "score", percent),
            Column("Steps that fit a run", lambda size: size.steps or None, data="steps"),
            Column("An image", "image_s", said_ms),
            Column("Left out", lambda size: plain(size.why) or None, data="left_out"),
        ],
        "On images that are left out of the fit in turn. Larger images leave fewer steps to training.",
        folded=True,
    )


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
