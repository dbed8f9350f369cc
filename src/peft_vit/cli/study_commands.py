"""Commands that plan, run and watch studies, go from images to a model, and read records.

None that reads records imports torch, except `report` for pictures of images that are at hand.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import Field

from peft_vit.base.console import ProgressDisplay, bar, duration, progress
from peft_vit.base.errors import NothingDoneError, UserError
from peft_vit.base.settings import Option, Request
from peft_vit.cli.app import INTERRUPTED, OVERWRITE, ROWS_FILE, app, command
from peft_vit.core.config import Number, Size, Time
from peft_vit.fit.request import DEFAULT_OUTPUT, TrainRequest, TuneRequest, check_images
from peft_vit.lab.request import RunRequest, StudiesRequest

if TYPE_CHECKING:
    from peft_vit.core.records import RunRecord
    from peft_vit.fit.request import FitEvent

_RESULTS = "The folder of results, which --output named, or a study in it."
RowsFile = Annotated[Path | None, typer.Option(help=ROWS_FILE, show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)]
ResultsDir = Annotated[Path, typer.Argument(metavar="RESULTS", help=_RESULTS, show_default=False)]


@command(RunRequest, names_keys=True)
def run(request: RunRequest) -> None:
    """Do all runs of a study that are not done yet.

    The same command continues where an earlier one was interrupted or killed: done runs are skipped, others continue
    from their last checkpoint, failed ones are tried again. Ctrl-C stops cleanly, a second one at once. Exit codes: 0
    every run is done, or --minutes are over and some are, 1 a run failed, or --minutes are over and none is done, 2 bad
    input, 130 interrupted.
    """
    from peft_vit.lab.run_studies import plan_studies, run_studies

    if request.dry_run:
        plan_studies(request)
        return
    failed = run_studies(request)
    print(f"Records: {request.results_dir}\nNext: peft-vit report {request.results_dir}")
    if failed:
        from peft_vit.runs.scheduling.display import counted

        print(f"{counted(len(failed), 'run')} failed:", file=sys.stderr)
        for run_id, reason in failed.items():
            print(f"  {run_id}: {reason}", file=sys.stderr)
        raise typer.Exit(1)


@command(StudiesRequest, names_keys=True)
def plan(request: StudiesRequest) -> None:
    """Check a study, and say what each run will take: seconds and memory.

    What is not known from runs that are done or from earlier plans is measured: a few steps of each kind of run are
    done now. Nothing is measured with --smoke.
    """
    from peft_vit.lab.run_studies import plan_studies

    plan_studies(RunRequest.of(**request.model_dump()), profile=True)


@app.command()
def status(results_dir: ResultsDir) -> None:
    """Say which runs of a study are done, failed and why, or left."""
    from peft_vit.runs.records.progress import find_studies, status_lines, study_status

    for folder in find_studies(results_dir):
        for line in status_lines(study_status(folder)):
            print(line)


@command(TrainRequest)
def train(request: TrainRequest) -> None:
    """Fine-tune a model on your own images with one method.

    A fifth of the images is kept for the test. Linear probes, classifiers on the features of the pretrained model, say
    which image size is worth training, and training starts from one. Trainings that leave some images out say how good
    the model is, or a fifth of the images if these are a thousand or more. If the probe is better, you get the probe.
    Each call makes a folder of its own, and `latest` beside it leads to the last one that finished. The same call
    continues where it was interrupted. Exit codes: 0 done, 1 training failed, 2 bad input, 130 interrupted.
    """
    started = time.monotonic()
    with _shown(request, started) as emit:
        from peft_vit.fit.train import train as fit_one

        run = fit_one(request, emit, started=started)
    record = run.record()
    assert record is not None
    if record.status == "failed":
        again = f"the same command tries again in {run.folder}"
        print(f"error: training failed: {record.error}; {again}", file=sys.stderr)
        raise typer.Exit(1)
    from peft_vit.deploy.page.quality import result_lines

    page = _page_of(run.folder)
    print("\n".join(["", *result_lines(record, run.folder, run.seconds(), page)]))


def _page_of(folder: Path) -> Path | None:
    """Return the page of a call's model; None if it can't be written here."""
    from peft_vit.api import TrainedModel
    from peft_vit.base.extras import missing_packages
    from peft_vit.runs.records.storage import HTML_FILE

    if missing_packages("report"):
        page = folder / "report" / HTML_FILE
        return page if page.is_file() else None
    try:
        with progress("writing the page"):
            return TrainedModel(folder).report.path
    except UserError:  # the model is there all the same
        return None


@app.command()
def runs(
    directory: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder that train writes to.")
    ] = DEFAULT_OUTPUT,
    output: RowsFile = None,
    overwrite: Overwrite = False,
) -> None:
    """List what train has done, the newest last: images, settings, test accuracy and its 95 % interval, time, state."""
    from peft_vit.deploy.page.printed import check_rows_file, print_with_rows
    from peft_vit.deploy.page.quality import train_row, train_runs_table
    from peft_vit.fit.calls import train_runs

    check_rows_file(output, overwrite=overwrite)
    calls = train_runs(directory)
    if not calls:
        raise UserError("holds no run of `train`; make one: peft-vit train IMAGES", file=directory)
    several = len({call.asked.request.images for call in calls}) > 1
    rows = [
        train_row(
            call.folder,
            call.asked.request.method,
            f"{call.asked.request.images} {call.asked.request.settings}" if several else call.asked.request.settings,
            call.status_text(),
            call.record(),
            call.seconds(),
        )
        | {"images": len(call.asked.images), "date": call.date}
        for call in calls
    ]
    print_with_rows([train_runs_table(rows)], rows, output)


@command(TuneRequest)
def tune(request: TuneRequest) -> None:
    """Find the best model for your images within your minutes and limits, and say how sure that is.

    A fifth of the images, or the folder's own test split, is set aside for the test. It begins as `train` does:
    image sizes, then one training, and from then on there is a model. As minutes allow it tries other sizes,
    learning rates, numbers of steps and methods on folds of the images, and compares the best with itself on
    weights of 8 and 4 bits. It takes the smallest model that loses at most --margin, 1 point, against the best one
    found. The same command continues where an earlier one was stopped, and with more minutes tries more. Exit
    codes: 0 a model was chosen, 2 bad input, 130 interrupted.
    """
    from peft_vit.base.extras import require_extra

    require_extra("tune", "tune")  # what is imported below needs some of it
    started = time.monotonic()
    with _shown(request, started) as emit:
        from peft_vit.fit.tune import tune as run_tune

        run_tune(request, emit, started=started)


@contextmanager
def _shown(request: TrainRequest | TuneRequest, started: float) -> Iterator[Callable[[FitEvent], None]]:
    """Show what a fit says, and how far it is of the minutes since it started."""
    from peft_vit.fit.request import Advanced, StageBegan

    stage, advanced = "your images", ""

    def left_s() -> float:
        return max(0.0, 60 * request.minutes - (time.monotonic() - started))

    def said() -> str:
        left = f"at most about {duration(left_s())} left" if left_s() else "the minutes are over, it ends with this"
        return f"{stage}{advanced and f', {advanced}'}: {left}"

    def emit(event: FitEvent) -> None:
        nonlocal stage, advanced
        if isinstance(event, Advanced):
            advanced = str(event)
            return
        if isinstance(event, StageBegan):
            stage, advanced = event.title, ""
        shown.say(str(event))

    try:
        with ProgressDisplay(lambda: bar(1 - left_s() / (60 * request.minutes), said()), said) as shown:
            check_images(request, shown.say)  # before torch is loaded, which takes seconds
            yield emit
    except KeyboardInterrupt:
        if "step" not in advanced:
            raise
        print(f"stopped at {advanced}; the same command continues there", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _thumbnails(record: RunRecord, positions: Sequence[int]) -> list[bytes]:
    """Get pictures of a run's images, if they are on this machine; only here does a report need torch."""
    try:
        from peft_vit.data import thumbnails_of
    except ImportError as error:
        raise UserError(f"the images can't be opened here ({error})") from None
    return thumbnails_of(record, positions)


@app.command()
def report(
    results_dir: ResultsDir,
    output: Annotated[
        Path | None,
        typer.Option(help="The folder to write to. Without it, report in RESULTS; with --format md, analysis."),
    ] = None,
    format: Annotated[
        Literal["html", "md"],
        typer.Option(help="What to write. html: everything. md: analysis_summary.md, tables and figures, but no page."),
    ] = "html",
    publication: Annotated[
        bool,
        typer.Option(
            "--publication",
            help="Also write each figure for a paper: PDF, SVG and PNG, one and two columns wide, with captions.",
        ),
    ] = False,
    examples: Annotated[
        bool, typer.Option(help="Show test images on the page of a model, if they are on this machine.")
    ] = True,
) -> None:
    """Write the report of a study, or the page of a model: one HTML file that needs no network.

    Beside it lie a summary in Markdown and every figure as PNG and SVG. Exit codes: 0 done, 1 written, but no
    run is done, or a file that may be a result was left out and is named, 2 bad input.
    """
    with progress("writing the report", sys.stderr):
        from peft_vit.deploy.explain import explained_images
        from peft_vit.fit.calls import REQUEST_FILE, called
        from peft_vit.lab.report import build_report
        from peft_vit.runs.records.storage import resolve_latest

        results_dir, page = resolve_latest(results_dir), format == "html"
        files = build_report(
            results_dir,
            output or results_dir / ("report" if page else "analysis"),
            page=page,
            publication=publication,
            thumbnails=_thumbnails if page and examples else None,
            maps=partial(explained_images, results_dir) if page and examples else None,
            **called(results_dir),
        )
    if page:
        print(f"Report: {files.html}")
    print(f"Markdown: {files.markdown}")
    for line in files.results.lines():
        print(line, file=sys.stderr)
    if not any(study.runs for study in files.results.studies):
        does = "the same `peft-vit train`" if (results_dir / REQUEST_FILE).is_file() else "`peft-vit run STUDY.yaml`"
        reason = (
            f"no run is done, so the report has no result; {does} does what is left, and `peft-vit status` names it"
        )
        raise NothingDoneError(reason, file=results_dir)
    if not files.results.is_complete:  # so that scripts notice
        raise typer.Exit(1)


class RecommendRequest(Request):
    """Results, and what is good enough."""

    results_dir: Annotated[Path, Option("RESULTS", is_argument=True)] = Field(description=_RESULTS)
    max_bytes: Size = Field(
        default=None, gt=0, description="The most bytes to store, frozen weights and adapter together, such as 16MB."
    )
    max_params: Number = Field(
        default=None,
        gt=0,
        description="The most values that are trained in the end, last layer included, such as 300k.",
    )
    max_step_time: Time = Field(
        default=None, gt=0, description="The longest that one training step may take, such as 200ms."
    )
    max_latency: Time = Field(
        default=None,
        gt=0,
        description="The longest that a call of the model may take, such as 50ms: as measured in the runs, or see "
        "--bench.",
    )
    bench: Path | None = Field(
        default=None, description="Use the latency in this .json file, in which `peft-vit bench` timed exported models."
    )
    margin: float = Field(
        default=1.0,
        gt=0,
        lt=100,
        description="The loss of test accuracy that matters, in points, or that of another metric; of an error in % of "
        "the numbers' standard deviation. Choose it before you look at results.",
    )
    smallest: Literal["bytes", "params", "latency"] = Field(
        default="bytes", description="Which size should be small. Sizes within one percent count as equal."
    )
    study: str | None = Field(default=None, description="The study's name, if RESULTS holds several.")
    output: Path | None = Field(
        default=None, description="Write the configuration to this file instead of printing it."
    )


@command(RecommendRequest, names_keys=True)
def recommend(request: RecommendRequest) -> None:
    """Name the smallest configuration of a study that is shown to lose less than --margin against the best.

    It is printed as a study. If the data does not decide, nothing is recommended, and the output says how many seeds
    would. Exit codes: 0 done, 2 bad input.
    """
    from peft_vit.lab.analysis import load_studies
    from peft_vit.lab.analysis.recommendation import MEASURES, exported_latency
    from peft_vit.lab.analysis.recommendation import recommend as find
    from peft_vit.lab.analysis.studies import choose_study
    from peft_vit.lab.report.printed_tables import print_recommendation
    from peft_vit.runs.records.storage import read_bench

    study, file = choose_study(load_studies(request.results_dir), request.study, request.results_dir), request.bench
    given = {cost: getattr(request, f"max_{name}") for name, cost in MEASURES.items()}
    limits = {cost: value for cost, value in given.items() if value is not None}
    exported = None if file is None else exported_latency(study, read_bench(file), file)
    measure = MEASURES[request.smallest]
    print_recommendation(
        find(study, limits, margin=request.margin / 100, measure=measure, exported=exported), request.output
    )


@app.command()
def compare(
    results_dirs: Annotated[
        list[Path], typer.Argument(metavar="RESULTS", help="Folders of results.", show_default=False)
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="The experiment to compare with. Without it, the LoRA of each study, or its linear probe."),
    ] = None,
    allow_mismatch: Annotated[
        str,
        typer.Option(
            help="Pool the differences of studies even if these differ, such as versions,precision.",
            metavar="NAMES",
            show_default=False,
        ),
    ] = "",
    output: RowsFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare experiments that occur in several studies, over data sets and backbones.

    Differences are pooled over studies only where nothing else differs; what is refused is named with its reason.
    """
    from peft_vit.deploy.page.printed import check_rows_file
    from peft_vit.lab.analysis.across import compare_studies, load_across, parse_pool
    from peft_vit.lab.report.printed_tables import print_comparison

    check_rows_file(output, overwrite=overwrite)
    allowed = parse_pool(allow_mismatch, "--allow-mismatch")
    print_comparison(compare_studies(load_across(results_dirs), reference=reference, pool=allowed), output)
