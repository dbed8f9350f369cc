"""Commands that ask models about images: labels are tested and reviewed, features written and compared."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from peft_vit.base.console import progress, quoted
from peft_vit.base.errors import UserError, printable
from peft_vit.base.extras import missing_packages, require_extra
from peft_vit.base.settings import Option, Request
from peft_vit.cli.app import OVERWRITE, command
from peft_vit.cli.deploy_commands import GIVEN_IMAGES, ModelRequest, print_rows, refuse_swapped
from peft_vit.core.config import DEFAULT_MODEL, SEEDS
from peft_vit.fit.request import GROUP, IMAGES, MODEL, WEIGHTS

if TYPE_CHECKING:
    from torch import nn

    from peft_vit.deploy import ExportMetadata
    from peft_vit.deploy.page.document import StudyDocument


# --- test -------------------------------------------------------------------------------------------------------------


class LabelledRequest(ModelRequest):
    """A model, labelled images, and where the page on them goes."""

    images: Annotated[Path, Option(is_argument=True)] = Field(description=IMAGES)
    output: Path = Field(
        default=Path("peft-vit-test"), description="The folder of the page. That of an earlier test there is replaced."
    )


@command(LabelledRequest)
def test(request: LabelledRequest) -> None:
    """Test a trained model on new labelled images: its score, the change to its own test, and a page.

    Where the images have a test split of their own, these are used. Exit codes: 0 done, 1 an image can't be read and is
    named, 2 bad input.
    """
    refuse_swapped(request.model, request.images, "test")
    from peft_vit.api import open_classifier
    from peft_vit.core.tasks import TASKS
    from peft_vit.data import decode_image, find_images
    from peft_vit.data.pixels import thumbnail
    from peft_vit.deploy.page.quality import later_lines
    from peft_vit.deploy.testing import score_images
    from peft_vit.runs.records.storage import RECORD_FILE, read_record, single_run, tuned_model

    images, file = find_images(request.images), tuned_model(request.model) or request.model
    with progress(f"opening {request.model}", sys.stderr):
        classifier = open_classifier(file, request.weights, request.adapter)
    card = classifier.card
    if images.task is not TASKS[card.task]:
        images = find_images(request.images, card.task)
    beside = (folder / RECORD_FILE for folder in (single_run(file), file.parent))  # where the run that made it may lie
    records = [read_record(place) for place in beside if place.is_file()]
    record = next((own for own in records if own.spec.run_id == card.run), None)
    trained_on = None if record is None else record.spec.data.path
    if not images.tested and trained_on and Path(trained_on).resolve() == images.path.resolve():
        reason = "holds the images that the model was trained on; name others. Its page has its own test"
        raise UserError(reason, file=request.images)
    with progress("testing", sys.stderr) as on_progress:
        tested = score_images(classifier, images, record, on_progress)
    print("\n".join(map(printable, later_lines(tested))))
    names = dict(zip(tested.predictions.images, tested.predictions.files or (), strict=True))

    def pictures(positions: Sequence[int]) -> list[bytes]:
        decoded = (decode_image(partial(images.tree.read, names[at]), names[at]) for at in positions)
        return [thumbnail(image, card.channels) for image in decoded]

    def document() -> StudyDocument:
        from peft_vit.deploy.page.model_page import later_document

        return later_document(tested, printable(images.path.resolve().stem), pictures)

    _write_images_page(document, f"peft-vit predict {quoted(request.model)} IMAGES", request.output)
    _end(tested.unreadable)


def _end(unreadable: Sequence[UserError]) -> None:
    """Name the images that can't be read; if there are any, that is the exit code."""
    for error in unreadable:
        print(f"error: {error}", file=sys.stderr)
    if unreadable:
        raise typer.Exit(1)


def _write_images_page(document: Callable[[], StudyDocument], use: str, output: Path) -> None:
    if missing_packages("report"):
        print("No page: that takes packages; run: pip install 'peft-vit[report]'")
        return
    from peft_vit.deploy.page.files import write_report
    from peft_vit.deploy.page.model_page import CARD_FILE, card_text

    with progress("writing the page", sys.stderr):
        made = document()
        written = write_report([made], {CARD_FILE: card_text(made, "", f"```\n{use}\n```").lstrip()}, output)
    print(f"Page: {written.html}")


# --- embed ------------------------------------------------------------------------------------------------------------


class _FeaturesRequest(Request):
    """Whose features."""

    model: str = Field(
        default=DEFAULT_MODEL,
        min_length=1,
        description="Whose features: a trained model's, by the folder of a run or of tune or a .safetensors file, or a "
        f"pretrained one's. {MODEL}",
    )
    weights: Annotated[str | None, Option(keys=("file", "sha256"))] = Field(default=None, description=WEIGHTS)
    image_size: int | None = Field(
        default=None,
        ge=14,
        le=1024,
        description="The side of a pretrained model's square input, in pixels. Without it, 224, or less of a model for "
        "smaller images. A trained model has its own.",
    )

    def opened(self) -> tuple[nn.Module, ExportMetadata]:
        """Return the model, and how it takes images."""
        from peft_vit.api import open_module

        return open_module(self.model, self.weights, self.image_size)


class EmbedRequest(_FeaturesRequest):
    """Images, whose features they get, and the file."""

    images: Annotated[list[Path], Option(is_argument=True)] = Field(description=GIVEN_IMAGES)
    output: Path = Field(
        description="The file to write: .npy, a row for each image, with the names of the images beside it in a .csv "
        "file; or .parquet, with the columns file, 0, 1, ..."
    )
    overwrite: bool = Field(default=False, description=OVERWRITE)


@command(EmbedRequest)
def embed(request: EmbedRequest) -> None:
    """Write the features of images: what the head of a trained or pretrained model sees.

    Exit codes: 0 done, 1 an image can't be read and is named, 2 bad input.
    """
    from peft_vit.deploy import ImageFile, image_files
    from peft_vit.deploy.page.printed import check_rows_file

    output = request.output
    check_rows_file(output, (".npy", ".parquet"), overwrite=request.overwrite)
    if output.suffix.lower() == ".parquet":
        require_extra("parquet", file=output)
    else:
        check_rows_file(output.with_suffix(".csv"), overwrite=request.overwrite)
    images = image_files(request.images)
    with progress(f"opening {request.model}", sys.stderr):
        from peft_vit.deploy.features import embed_images, write_features

        model, card = request.opened()
    with progress("embedding", sys.stderr) as on_progress:
        places, features, unreadable = embed_images(model, card, images, on_progress)
    if not places:
        raise unreadable[0]
    read = [images[place] for place in places]
    write_features([image.file for image in read if isinstance(image, ImageFile)], features, output)
    print(f"{len(places):,} images, {features.shape[1]:,} features each: {output}")
    _end(unreadable)


# --- similar ----------------------------------------------------------------------------------------------------------


class SimilarRequest(_FeaturesRequest):
    """An image, and where images like it are looked for."""

    image: Annotated[Path, Option(is_argument=True)] = Field(description="The image.")
    folder: Annotated[Path, Option(is_argument=True)] = Field(description="Where to look: a folder or a zip of images.")
    top: int = Field(default=10, ge=1, description="Print this many images, the nearest first.")
    json_: Annotated[bool, Option("--json")] = Field(default=False, description="Print them as JSON, unrounded.")


@command(SimilarRequest)
def similar(request: SimilarRequest) -> None:
    """Print the images that are most like one, by the cosine of their features to its own.

    Features are kept in the cache: the next call with this folder and model computes those of new images alone. Exit
    codes: 0 done, 1 an image can't be read and is named, 2 bad input.
    """
    from peft_vit.data.files import open_tree
    from peft_vit.data.sources.folders import is_image
    from peft_vit.deploy import image_files

    if request.image.is_dir():
        raise UserError("is a folder; name one image", file=request.image)
    image_files([request.folder])  # refuses what holds none
    tree = open_tree(request.folder)
    with progress(f"opening {request.model}", sys.stderr) as on_progress:
        from peft_vit.deploy.features import cached_features, cosines, embed_images

        model, card = request.opened()
        _, query, faults = embed_images(model, card, image_files([request.image]))  # (1, D)
        if faults:
            raise faults[0]
        images = [*filter(is_image, tree.names)]
        names, features, unreadable = cached_features(model, card, tree, images, partial(on_progress, what="embedding"))
        if not names and unreadable:
            raise unreadable[0]
    found = zip((tree.location / name for name in names), cosines(features, query[0]).tolist(), strict=True)
    others = [(file, cosine) for file, cosine in found if file != request.image.resolve()]
    nearest = sorted(others, key=lambda other: -other[1])[: request.top]
    rows = [{"file": printable(str(file)), "cosine": cosine} for file, cosine in nearest]
    print_rows("json" if request.json_ else "table", ["file", "cosine"], rows, {})
    _end(unreadable)


# --- review -----------------------------------------------------------------------------------------------------------


_FOLLOW = (
    "Files move to other class folders, or rows of the CSV change. What was done is written to corrections.jsonl there."
)


class ReviewRequest(_FeaturesRequest):
    """Labelled images, what predicts them, and where the page on them goes."""

    images: Annotated[Path, Option(is_argument=True)] = Field(description=IMAGES)
    model: str = Field(
        default=DEFAULT_MODEL,
        min_length=1,
        description="What predicts: a regression on the features of a pretrained model; or what a call of train or "
        f"tune has trained on folds, by its folder. {MODEL}",
    )
    group: str | None = Field(default=None, description=GROUP)
    top: int = Field(default=20, ge=1, description="Show at most this many labels, those that are believed least.")
    output: Path = Field(
        default=Path("peft-vit-review"),
        description="The folder of the page and of its tables. Those of an earlier review there are replaced.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=SEEDS.stop,
        description="The test images are those of train or tune with this seed. Without it, of their last call.",
    )
    page: bool = Field(default=False, description=f"Then confirm or correct these labels in your browser. {_FOLLOW}")
    undo: bool = Field(default=False, description="Take back what was corrected last, and end.")


@command(ReviewRequest)
def review(request: ReviewRequest) -> None:
    """List images whose label is probably wrong, those believed least first.

    Models predict images that they were not trained on. Nothing of yours is changed without --page or --undo. Exit
    codes: 0 done, 2 bad input.
    """
    from peft_vit.api import is_trained
    from peft_vit.data.pixels import thumbnail
    from peft_vit.deploy.page.printed import print_blocks
    from peft_vit.fit.intake import refuse_among_images
    from peft_vit.fit.request import TrainRequest
    from peft_vit.fit.review import by_folds, by_regression, review_document, review_labels

    refuse_among_images(request.images, request.output)
    asked = TrainRequest.of(images=request.images, group=request.group)
    if not asked.found.task.one_class:
        raise UserError("has several labels an image, or numbers; review takes one class each", file=request.images)
    if request.page or request.undo:
        from peft_vit.label.corrections import Checking, Corrections, Doubt
        from peft_vit.label.images import ImageFolder

        corrections = Corrections(asked.found)
    if request.undo:
        answer = corrections.undo()
        print(printable(f"{answer.renamed}: '{answer.before}' is '{answer.after}' again"))
        return
    if request.page:
        require_extra("label", "The page")
    if is_trained(request.model):
        if request.image_size is not None or request.weights is not None:
            reason = "have no effect with what was trained; leave them out"
            raise UserError(reason, field="--image-size, --weights")
        predicted = by_folds(asked, Path(request.model))
    else:
        with progress("reading images", sys.stderr) as on_progress:
            predicted = by_regression(asked, request.seed, request.opened, on_progress)
    reviewed = review_labels(predicted, request.top)
    print("\n".join(map(printable, reviewed.came_out)))
    print_blocks(table for table, _ in reviewed.shown)

    def pictures(positions: Sequence[int]) -> list[bytes]:
        return [thumbnail(reviewed.images.read(position), 3) for position in positions]

    document = partial(review_document, reviewed, printable(asked.found.path.resolve().stem), pictures)
    _write_images_page(document, f"peft-vit train {quoted(request.images)}", request.output)
    if not missing_packages("report"):
        print(f"All labels, in this order: {request.output / 'tables' / 'review_labels.csv'}")
    if request.page:
        from peft_vit.cli.label_command import serve_page
        from peft_vit.label.server import LabelServer, listen

        doubts = [Doubt(**row) for row in reviewed.doubts]
        train = f"peft-vit train {quoted(request.images)}"
        names = reviewed.images.class_names
        checking = Checking(corrections, ImageFolder(corrections.root), doubts, names, train)
        serve_page(LabelServer(checking, listen()))
