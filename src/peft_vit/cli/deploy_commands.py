"""`export` writes what was trained as files, `predict` asks them."""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import Field, field_validator, model_validator

from peft_vit.base import console
from peft_vit.base.console import OnProgress, no_progress, progress, quoted
from peft_vit.base.errors import UserError, named, printable
from peft_vit.base.extras import require_extra
from peft_vit.base.files import into_empty, refuse_existing
from peft_vit.base.settings import Option, Request
from peft_vit.cli.app import OVERWRITE, command
from peft_vit.core.config import (
    EXPORTS,
    OnlyWith,
    Rounding,
    WrittenBits,
    exported_bytes,
    exported_format,
    format_of_name,
    is_bundle,
    type_of_bits,
)
from peft_vit.fit.request import BITS, WEIGHTS

if TYPE_CHECKING:
    from peft_vit.deploy import Classifier, ImageFile, Prediction
    from peft_vit.deploy.export import Exported

    _Format = str
else:
    _Format = Literal[(*EXPORTS, "web", "peft", "history")]
_MERGED = {
    "float": "Updates added to float weights.",
    "offsets": "Updates moved into the groups' offsets; codes and scales stay.",
    "codes": "No groups, so weights and updates were quantized again: not exact, see the accuracy.",
}
GIVEN_IMAGES = "The images: files, folders of them, or a zip."
_ENDINGS = [kind.ending for kind in EXPORTS.values() if kind.ending]


# --- export -----------------------------------------------------------------------------------------------------------


class ExportRequest(Request):
    """A run, the file or the folder to write, and how."""

    runs: Annotated[list[Path], Option("RUN", is_argument=True)] = Field(
        min_length=1,
        description="The folder of what was trained, such as peft-vit-runs/latest or the output of tune; several with "
        "--bundle. history also accepts a folder of many runs.",
    )
    output: Annotated[Path | None, OnlyWith(bundle=None)] = Field(
        default=None,
        description="The file or folder to write. "
        + "; ".join(f"{name}: {kind.output}" for name, kind in EXPORTS.items())
        + "; web and peft: a new or empty folder, web also a .html file; history: a .parquet, .json or .csv file. "
        "Without it, model.onnx in RUN, or as --format says.",
    )
    format: Annotated[_Format | None, OnlyWith(bundle=None)] = Field(
        default=None,
        description="The kind of file. "
        + "; ".join(f"{name}: {kind.what}" for name, kind in EXPORTS.items())
        + "; web: a page that runs the model in a browser; peft: LoRA files for the PEFT library; history: a table of "
        "ranks and scores by run and step. Without it, what the ending of --output says.",
    )
    bundle: Path | None = Field(
        default=None,
        description="Write adapters into this folder, a small file for each RUN, beside the one backbone that all RUNs "
        "have. A folder that holds the same backbone gets more of them.",
    )
    adapter_bits: Annotated[Literal["1", "2", "4", "8", "16", "32"] | None, OnlyWith(bundle=...)] = Field(
        default=None,
        description="Round the adapters of a bundle to this many bits a value, and their heads to 8 at least; what "
        "that loses is printed. Without it, as they were trained by --adapter-bytes, else 16.",
    )
    overwrite: bool = Field(default=False, description="Replace what an earlier export wrote.")
    bits: Annotated[
        WrittenBits | None,
        OnlyWith(bundle=None, remedy="leave it out; the backbone of a bundle stays as it was trained on"),
        OnlyWith(format=("onnx", "openvino", "safetensors", "web")),
    ] = Field(default=None, description=f"Round the weights of a float run, and print what that loses. {BITS}")
    rounding: Annotated[Rounding | None, OnlyWith(bits=...)] = Field(
        default=None,
        description="How to round. nearest: each weight by itself, the default in 8 bits. gptq: errors make up for "
        "each other on 128 training images, the default in fewer bits, in 4 on 32 images.",
    )
    single: Annotated[bool, OnlyWith(format="web")] = Field(
        default=False, description="Write the page for a browser as one file. A name that ends in .html does so too."
    )
    offline: Annotated[bool, OnlyWith(format="web")] = Field(
        default=False,
        description="Put onnxruntime-web, which is fetched from npm once, into the page. Without it the page fetches "
        "that from cdn.jsdelivr.net when it is opened.",
    )
    runtime_files: Annotated[Path | None, OnlyWith(format="web")] = Field(
        default=None, description="Put onnxruntime-web into the page from this folder of npm's package."
    )
    runtime: Annotated[Literal["small", "fast"] | None, OnlyWith(format=("onnx", "web"))] = Field(
        default=None,
        description="How an ONNX file of low-bit weights runs. small, the default: they stay packed in memory. fast: "
        "they are expanded when the file is loaded, to float32's speed and memory. The file is small either way.",
    )
    activations: Annotated[
        Literal["int8"] | None,
        OnlyWith(runtime=(None, "fast"), remedy="it expands codes as --runtime fast does; leave one of the two out"),
        OnlyWith(format=("onnx", "web")),
    ] = Field(
        default=None,
        description="Let an ONNX file multiply 8-bit integers, which is faster and not exact. The loss is measured on "
        "validation images first.",
    )
    accept_loss: Annotated[float | None, OnlyWith(activations="int8"), OnlyWith(format=("onnx", "web"))] = Field(
        default=None,
        ge=0,
        le=100,
        description="The most that --activations int8 may lose on validation images of what decides, in points: "
        "hundredths of a share, or of a standard deviation of numbers. Without it, 0.5.",
    )

    @model_validator(mode="before")
    @classmethod
    def _format_follows_from_the_name(cls, values: Any) -> Any:
        if values.get("format") is None and values.get("bundle") is None:
            output = values.get("output")
            is_page = output is not None and Path(output).suffix == ".html"
            named_as = "web" if is_page else "onnx" if output is None else format_of_name(Path(output))
            values = {**values, "format": named_as}
        return values

    @property
    def number_format(self) -> str | None:
        """Return what --bits asks for."""
        return self.bits and type_of_bits(self.bits)

    @property
    def is_offline(self) -> bool:
        """Return whether the page for a browser holds all that it needs."""
        return self.offline or self.runtime_files is not None

    def target(self) -> tuple[str, Path]:
        """Return the format and what is to be written.

        Raises:
            UserError: if name and format do not go together.
        """
        *endings, last = _ENDINGS
        if self.format is None:
            raise UserError(
                f"expected a name that ends in {', '.join(endings)}, {last} or .html; or give --format as well: "
                "pretrained, web and peft write a folder, history a table",
                file=self.output,
                field="--output",
            )
        ending = EXPORTS[self.format].ending if self.format in EXPORTS else ""
        if self.output is None:
            if self.format == "history":
                raise UserError("is missing, which --format history needs; add it", field="--output")
            ending = ".html" if self.single else ending
            return self.format, self.runs[0] / (f"model{ending}" if ending else self.format)
        if self.single and self.output.suffix != ".html":
            raise UserError("expected a name that ends in .html", file=self.output, field="--output")
        if not ending and (named_as := format_of_name(self.output)):
            raise UserError(
                f"its name is that of {EXPORTS[named_as].title}, and --format is {self.format}; leave --format out, or "
                "give another name",
                file=self.output,
                field="--output",
            )
        return self.format, self.output


@command(ExportRequest)
def export(request: ExportRequest) -> None:
    """Write a trained model as a file that runs elsewhere, or the history of runs for other tools."""
    if request.bundle is not None:
        _export_bundle(request, request.bundle)
        return
    directory, *others = request.runs
    if others:
        raise UserError(f"expected one, got {len(request.runs)}; several go with --bundle", field="RUN")
    format, output = request.target()
    if format == "history":
        from peft_vit.lab.report.result_tables import export_history

        print(f"{export_history(directory, output, overwrite=request.overwrite)} rows: {output}")
    elif format == "peft":
        with progress(f"exporting {directory}", sys.stderr):
            from peft_vit.deploy.export import export_run_to_peft

            card = export_run_to_peft(directory, output, overwrite=request.overwrite)
        print("This is the adapter alone. To load it, you need the base model that its peft_vit.json names.")
        _print_next(output, " --weights FILE" if card.weights_name.startswith("file ") else "")
    else:
        page = None
        with progress(f"opening {directory}", sys.stderr) as on_progress:
            if format == "web":
                done, page = _write_page(request, output, on_progress)
            else:
                done = _write_file(request, format, output, on_progress)
        _print_export(done, request.number_format, output)
        if (format, request.runtime, request.number_format) == ("onnx", None, "nf4"):
            print("nf4 weights stay packed in memory, which is slower than float32; --runtime fast is as fast.")
        stored = done.source.run.record.bytes
        if page is not None and request.bits is None and stored is not None and (size := stored.in_4_bits_bytes):
            from peft_vit.deploy.page.formatting import megabytes

            print(f"Smaller: about {megabytes(size)} with --bits 4")
        if page is not None and not request.is_offline:
            print("When it is opened, it fetches onnxruntime-web from cdn.jsdelivr.net. --offline puts that into it.")
        _print_next(output, page=page)


def _export_bundle(request: ExportRequest, folder: Path) -> None:
    with progress(f"exporting to {folder}", sys.stderr) as on_progress:
        from peft_vit.deploy.bundle import export_bundle

        bits: Any = request.adapter_bits and int(request.adapter_bits)
        done = export_bundle(request.runs, folder, bits=bits, overwrite=request.overwrite, on_progress=on_progress)
    for adapter in done:
        compared = adapter.comparison
        said = "not compared with the run's model, since its images have changed"
        if compared is not None:
            said = (
                f"{100 * compared.same_predictions:.2f} % of predictions as the run's on {compared.images} "
                f"{compared.split} images, {compared.values_text()}"
            )
        print(f"{adapter.name}: {adapter.file_bytes / 1e3:.1f} kB; {said}")
    _print_next(folder, f" --adapter {quoted(done[0].name)}")


def _write_file(request: ExportRequest, format: str, output: Path, on_progress: OnProgress) -> Exported:
    from peft_vit.deploy.export import OnnxOptions, export_run_to_file

    return export_run_to_file(
        request.runs[0],
        output,
        format,
        OnnxOptions(request.runtime, request.activations, request.accept_loss),
        bits=request.number_format,
        rounding=request.rounding,
        overwrite=request.overwrite,
        on_progress=on_progress,
    )


def _write_page(request: ExportRequest, output: Path, on_progress: OnProgress) -> tuple[Exported, Path]:
    for extra in ("onnx", "report"):
        require_extra(extra, "--format web")
    from peft_vit.deploy import open_exported
    from peft_vit.deploy.page.web_page import MODEL_FILE, runtime_files, write_web_page

    is_folder = output.suffix != ".html"
    refuse_existing(output, is_folder=is_folder, overwrite=request.overwrite, marks=(MODEL_FILE,))
    runtime = runtime_files(request.runtime_files) if request.is_offline else None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        done = _write_file(request, "onnx", file, on_progress)
        return done, write_web_page(output, file.read_bytes(), open_exported(file).card, runtime)


def _print_export(done: Exported, bits: str | None, file: Path) -> None:
    source, compared = done.source, done.comparison
    print(_MERGED[source.merged.how])
    if errors := source.merged.errors:
        worst = max(errors, key=errors.__getitem__)
        print(f"  relative error of the weights at most {errors[worst]:.1e} ({worst})")
    if source.float_bytes is not None:
        sizes = f"{source.float_bytes / 1e6:.1f} MB before, {exported_bytes(file) / 1e6:.1f} MB after"
        print(f"Then the weights of the blocks' matrices were rounded to {bits}: {sizes}.")
    if done.activations == "int8":
        print("Then weights were rounded to 7 bits a row; inputs are rounded to 8 bits a token. See what it loses:")
    for note in () if source.data is None else source.data.notes:
        print(printable(note))
    if compared is None:
        print(f"Not compared with the run's model, since its images have changed: {source.missing}")
        return
    changed = done.activations == "int8" or source.float_bytes is not None or compared.same_predictions < 1
    learned = changed and compared.split == "training" and done.activations != "int8"  # by heart: they hide a loss
    print(
        f"The file against the run's model, {compared.images} {compared.split} images, {done.activations}: "
        f"{100 * compared.same_predictions:.2f} % of predictions equal, logits within {compared.logit_error:.1e} "
        f"relative{'' if learned else f', {compared.values_text()}'}"
    )
    if done.on_folds is not None:
        print(f"Trainings like it on folds of the images: {done.on_folds.values_text()}")
        print(f"It {done.on_folds.loss_text()}.")
    elif learned:
        print("The loss isn't measured: there are no validation images, and on training images it would not show.")
    elif changed:
        print(f"It {compared.loss_text()}.")
    if bits == "int2":
        print("Training on 2 bits loses less, as a rule: peft-vit train IMAGES --method qa_lora --bits 2")


def _print_next(model: Path, options: str = "", page: Path | None = None) -> None:
    print(f"{model}: {exported_bytes(model) / 1e6:.1f} MB")
    predict = f"peft-vit predict {quoted(model)} IMAGES{options}"
    print(f"Next: {predict if page is None else f'open {quoted(page)} in a browser'}")


# --- predict ----------------------------------------------------------------------------------------------------------


class ModelRequest(Request):
    """A trained model."""

    model: Annotated[Path, Option(is_argument=True)] = Field(
        description=f"The model: what export wrote ({', '.join(_ENDINGS)}, a folder, a bundle), or the folder of a "
        "run, such as peft-vit-runs/latest, or the output of tune."
    )
    weights: Annotated[str | None, Option(keys=("file", "sha256"))] = Field(
        default=None,
        description=f"Only for an adapter in the PEFT library's format. {WEIGHTS} Without it, as the adapter says.",
    )
    adapter: str | None = Field(
        default=None, description="Use this adapter of a folder that export --bundle wrote. Without it, the only one."
    )


class PredictRequest(ModelRequest):
    """A model, images, and what is to be said of them."""

    images: Annotated[list[Path], Option(is_argument=True)] = Field(description=GIVEN_IMAGES)
    top: int = Field(default=1, ge=1, description="Print this many of the most probable classes.")
    coverage: float | None = Field(
        default=None,
        description="List every class an image may be, so that the true one is among them in about 90 of 100 images "
        "(90, 90 % or 0.9). Of several labels: so that the list has 90 of 100 of them. Of numbers: the interval that "
        "holds 90 of 100, which is printed without this, too.",
    )
    format: Literal["table", "csv", "json"] | None = Field(
        default=None,
        description="How to print. table, the default: columns on a terminal, else separated by tabs, probabilities in "
        "four digits. csv, json: unrounded.",
    )
    output: Path | None = Field(default=None, description="Write to this .csv or .json file instead of printing.")
    overwrite: Annotated[bool, OnlyWith(output=...)] = Field(default=False, description=OVERWRITE)
    explain: Path | None = Field(
        default=None,
        description="Write into this folder a picture of each image in which the parts are clear that made the model "
        "say its class, and a grey veil lies over the others. The folder must be empty.",
    )

    @field_validator("coverage")
    @classmethod
    def _percent(cls, coverage: float | None) -> float | None:
        return coverage / 100 if coverage is not None and 1 < coverage <= 100 else coverage

    def chosen_format(self) -> str:
        """Return the format, by the file's name if there is one; raises UserError if it can't be taken."""
        from peft_vit.deploy.page.printed import check_rows_file

        if self.output is None:
            return self.format or "table"
        check_rows_file(self.output, overwrite=self.overwrite)
        ending = self.output.suffix.lower().removeprefix(".")
        if self.format not in (None, ending):
            raise UserError(
                f"is {self.format}, and {self.output} is {ending}; leave one of the two out", field="--format"
            )
        return ending


@command(PredictRequest)
def predict(request: PredictRequest) -> None:
    """Print the class of each image and how probable it is.

    A column `unlike` says yes where an image is unlike all that the model was trained on, if the model can tell. If all
    images lie in folders that are named as classes, a last line on standard error says how many are right. Exit codes:
    0 done, 1 an image can't be read and is named, 2 bad input.
    """
    format = request.chosen_format()
    images, classifier = _opened(request)
    from peft_vit.core.records import FEWEST_HELD_OUT
    from peft_vit.deploy import check_coverage, predict_files
    from peft_vit.deploy.predicting import columns_of
    from peft_vit.deploy.presentation import PRESENTED

    card, classes = classifier.card, classifier.card.class_names
    if request.coverage is not None:
        with named(request.model):
            check_coverage(card, request.coverage)
    files = [image for image in images if not isinstance(image, UserError)]
    shown, with_sets, meaning = PRESENTED[card.task], request.coverage is not None, card.meaning
    is_labelled = (
        shown.task.one_class and len(files) > 1 and {image.file.parent.name for image in files} <= set(classes)
    )
    columns = ["file", *columns_of(card, request.coverage, request.top), *([] if card.unlike is None else ["unlike"])]
    if card.unlike is None and meaning is not None and meaning.images < FEWEST_HELD_OUT:
        reason = f"that takes {FEWEST_HELD_OUT} images that trained or validated the model, and their features"
        print(f"images unlike those of training are not marked: {reason}", file=sys.stderr)
    if request.explain is not None:
        _write_pictures(request.explain, files, classifier)
    counts = Counter[str]()
    rows_show_it = request.output is None and sys.stdout.isatty() and sys.stderr.isatty()
    with nullcontext(no_progress) if rows_show_it else progress("predicting", sys.stderr) as on_progress:
        predictions = predict_files(classifier, images, request.coverage, request.top)
        outcomes = _counted(predictions, len(images), counts, on_progress)
        cells = (
            [str(one.file), *shown.cells(one, with_sets).values(), *([] if one.unlike is None else [one.unlike])]
            for one in outcomes
        )
        rows = (dict(zip(columns, map(_printable, values), strict=True)) for values in cells)
        if request.output is not None:
            kept = [row if format == "json" else _flat(row) for row in rows]
        else:
            longest = {
                "file": max((len(printable(str(image.file))) for image in files), default=0),
                "class": max((len(printable(name)) for name in classes), default=0),
            }
            print_rows(format, columns, rows, longest)
    predicted = counts["predicted"]
    if request.output is not None:
        from peft_vit.deploy.page.printed import write_rows

        write_rows(kept, request.output, dict.fromkeys(columns))
        print(f"{predicted:,} images: {request.output}")
    if is_labelled and predicted:
        print(f"right on {counts['right']:,} of {predicted:,}, by the names of their folders", file=sys.stderr)
    if request.coverage is not None and predicted:
        print(f"{shown.holds.format(100 * request.coverage)}, if they are like those of training", file=sys.stderr)
    if unlike := counts["unlike"]:
        print(f"{unlike:,} of {predicted:,} are unlike all images that the model was trained on", file=sys.stderr)
    if predicted < len(images):
        raise typer.Exit(1)


def _counted(
    outcomes: Iterable[Prediction | UserError], images: int, counts: Counter[str], on_progress: OnProgress
) -> Iterator[Prediction]:
    """Yield the predictions among outcomes, and count them; the others are told."""
    for done, outcome in enumerate(outcomes, start=1):
        on_progress(done, images)
        if isinstance(outcome, UserError):
            print(f"error: {outcome}", file=sys.stderr, flush=True)
            continue
        assert outcome.file is not None
        counts["predicted"] += 1
        counts["right"] += outcome.class_name == outcome.file.parent.name
        counts["unlike"] += bool(outcome.unlike)
        yield outcome


def _write_pictures(folder: Path, images: Sequence[ImageFile], classifier: Classifier) -> None:
    """Write a picture of each image that can be read, with its place among them, so that names differ."""
    from peft_vit.deploy.explain import check_explainable, explain

    check_explainable(classifier.card)
    if classifier.module is None:
        print("This file has no gradients: the pictures are by occlusion, up to 65 passes each", file=sys.stderr)
    with into_empty(folder, "--explain"), progress("explaining", sys.stderr) as on_progress:
        for done, image in enumerate(images, start=1):
            with suppress(UserError):  # which the predictions tell
                picture = explain(classifier, image).picture
                picture.save(folder / f"{done:04d}-{printable(image.file.stem)}.png")
            on_progress(done, len(images))


def _opened(request: PredictRequest) -> tuple[list[ImageFile | UserError], Classifier]:
    started = time.monotonic()
    with progress(f"opening {request.model}", sys.stderr):
        from peft_vit.api import open_classifier
        from peft_vit.deploy import image_files

        refuse_swapped(request.model, request.images[0], "predict")
        images = image_files(request.images)
        classifier = open_classifier(request.model, request.weights, request.adapter)
    seconds = time.monotonic() - started
    if seconds > 2 * console.FIRST_S and classifier.module is not None and exported_format(request.model) is None:
        faster = f"peft-vit export {quoted(request.model)}"
        print(f"Opening took {seconds:.0f} s, since it loads PyTorch. A file opens faster: {faster}", file=sys.stderr)
    return images, classifier


def refuse_swapped(model: Path, images: Path, command: str) -> None:
    """Raise UserError if images and model of a command are named in the wrong order."""
    from peft_vit.runs.records.storage import RECORD_FILE, single_run

    def is_model(path: Path) -> bool:
        return exported_format(path) is not None or is_bundle(path) or os.path.isfile(single_run(path) / RECORD_FILE)

    if not is_model(model) and is_model(images):
        places = f"{quoted(images)} {quoted(model)}"
        raise UserError(f"is not a model, and the model comes first: peft-vit {command} {places}", file=model)


def _printable(cell: Any) -> Any:
    """Return a cell. A file's name may be any bytes, and a class anything that a foreign model says."""
    if isinstance(cell, list):
        return [printable(label) for label in cell]
    return printable(cell) if isinstance(cell, str) else cell


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose set is one text, and whose truth is a word."""
    words = {True: "yes", False: "no"}
    return {
        name: "; ".join(cell) if isinstance(cell, list) else words[cell] if isinstance(cell, bool) else cell
        for name, cell in row.items()
    }


def print_rows(
    format: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], longest: Mapping[str, int]
) -> None:
    """Print rows as they come.

    Args:
        format: csv; json, a list of objects, one a line; or table, columns on a terminal, in a pipe what `cut` takes.
        columns: of the rows.
        rows: plain values by column.
        longest: letters of the longest cell of a table's columns, by the first word of their names.
    """
    if format == "json":
        lead = "[\n "
        for row in rows:
            print(lead + json.dumps(row, ensure_ascii=False), end="", flush=True)
            lead = ",\n "
        print("\n]" if lead.startswith(",") else "[]")
    elif format == "csv":
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(_flat(row))
            sys.stdout.flush()
    else:
        is_terminal = sys.stdout.isatty()
        widths = {name: max(len(name), longest.get(name.partition("_")[0], 0)) for name in columns}
        for row in chain([dict(zip(columns, columns, strict=True))], rows):
            texts = {name: f"{cell:.4f}" if isinstance(cell, float) else cell for name, cell in _flat(row).items()}
            cells = [text.ljust(widths[name]) if is_terminal else text for name, text in texts.items()]
            print(("  " if is_terminal else "\t").join(cells).rstrip(" "), flush=True)
