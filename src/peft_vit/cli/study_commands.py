"""Commands that plan, run and watch studies, go from images to a model, and read records.

None that reads records imports torch, except `report` for pictures of images that are at hand.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from peft_vit.cli.app import app, command
from peft_vit.errors import UserError
from peft_vit.studies.request import DEFAULT_OUTPUT, RunRequest, StudiesRequest, TrainRequest
from peft_vit.tuning.tune_request import TuneRequest

if TYPE_CHECKING:
    from peft_vit.records import RunRecord


@command(RunRequest)
def run(request: RunRequest) -> None:
    """Do every run of the studies that is not done yet, then say where to look.

    The same command goes on where an earlier one was interrupted or killed: done runs are skipped, others continue
    from their last checkpoint, failed ones are tried again. Ctrl-C stops cleanly, a second one at once. Exit codes:
    0 every run is done, or --minutes are over, 1 a run failed, 2 bad input, 130 interrupted.
    """
    from peft_vit.studies.commands import plan_studies, run_studies

    if request.dry_run:
        plan_studies(request)
    else:
        _sum_up(run_studies(request), request.results_dir)


@command(StudiesRequest)
def plan(request: StudiesRequest) -> None:
    """Check the studies and print what every run will take: seconds and peak memory.

    Known are runs that are done and what was measured before; of any other kind of run a few steps are done now, and
    what they took is kept for later plans. Smoke studies are never measured.
    """
    from peft_vit.studies.commands import plan_studies

    plan_studies(RunRequest.of(**request.model_dump()), profile=True)


@app.command()
def status(
    results_dir: Annotated[Path, typer.Argument(help="what --output was, or a study in it", show_default=False)],
) -> None:
    """Say what has become of every planned run, with the reason of each failure; changes nothing."""
    from peft_vit.records.progress import find_studies, status_lines, study_status

    for folder in find_studies(results_dir):
        for line in status_lines(study_status(folder)):
            print(line)


@command(TrainRequest)
def train(request: TrainRequest) -> None:
    """Fine-tune on your own folder of images: one method, one seed; a fifth validates, a fifth tests.

    Each call makes a folder of its own, and `latest` beside it leads to it. The same call goes on where an earlier one
    was interrupted. The head starts as the linear probe of the frozen backbone. Training goes on for as long as
    validation gains, within the minutes; what it returns is never below the probe on validation. An adapter to go on
    from brings its own head. Exit codes: 0 done, 1 training failed, 2 bad input, 130 interrupted.
    """
    from peft_vit.studies.commands import train_on_own_images

    run = train_on_own_images(request)
    record = run.record()
    assert record is not None
    if record.status == "failed":
        again = f"the same command tries again in {run.folder}"
        print(f"error: training failed: {record.error}; {again}", file=sys.stderr)
        raise typer.Exit(1)
    from peft_vit.report.trained import result_lines

    page = _page_of(run.folder)
    print("\n".join(["", *result_lines(record, run.folder, run.seconds(), page)]))


def _page_of(folder: Path) -> Path | None:
    """Return the page of a call's model, written if there is none of it yet; None if it can't be written here."""
    from peft_vit.extras import missing_packages
    from peft_vit.records import DELIVERED_FILE, HTML_FILE

    file, delivered = folder / "report" / HTML_FILE, folder / DELIVERED_FILE
    if file.is_file() and not (delivered.is_file() and delivered.stat().st_mtime_ns > file.stat().st_mtime_ns):
        return file
    if missing_packages("report"):
        return None
    from peft_vit.report import build_report

    try:
        return build_report(folder, file.parent, thumbnails=_thumbnails).html
    except UserError:  # the model is there all the same
        return None


@app.command()
def runs(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="what --output of `train` was", show_default=False)
    ] = DEFAULT_OUTPUT,
    output: Annotated[
        Path | None, typer.Option(help="write unrounded values to this .csv or .json file", show_default=False)
    ] = None,
) -> None:
    """List the calls of `train`, the newest last: settings, test accuracy with its 95 % interval, minutes, state.

    Exit codes: 0 done, 2 bad input.
    """
    from peft_vit.report.printed import check_rows_file, print_with_rows
    from peft_vit.report.trained import train_row, train_runs_table
    from peft_vit.studies.train_runs import train_runs

    check_rows_file(output)
    calls = train_runs(directory) if directory.is_dir() else []
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
        for call in calls
    ]
    print_with_rows([train_runs_table(rows)], rows, output)


@command(TuneRequest)
def tune(request: TuneRequest) -> None:
    """Find the best model for your images that the minutes can buy, within limits, and say how sure that is.

    A fifth of the images, or the folder's own test split, is sealed and read once, in the end. Choices rest on folds of
    the others: image sizes by regressions on frozen features, rates and steps of LoRA by successive halving, then the
    best also with weights of 8 and 4 bits. It takes the smallest that is hardly worse than the best one found. The same
    command goes on where an earlier one was stopped, and with more minutes tries more. Exit codes: 0 a model was
    chosen, 2 bad input, 130 interrupted.
    """
    from peft_vit.extras import require_extra

    require_extra("tune", "tune")  # what is imported below needs some of it
    from peft_vit.tuning.pipeline import tune as run_tune

    run_tune(request)


def _sum_up(failed: dict[str, str], results_dir: Path) -> None:
    print(f"Records: {results_dir}\nNext: peft-vit report {results_dir}")
    if failed:
        from peft_vit.studies.display import counted

        print(f"{counted(len(failed), 'run')} failed:", file=sys.stderr)
        for run_id, reason in failed.items():
            print(f"  {run_id}: {reason}", file=sys.stderr)
        raise typer.Exit(1)


ResultsDir = Annotated[Path, typer.Argument(help="a directory that holds records", show_default=False)]


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
        Path | None, typer.Option(help="a folder; default: RESULTS_DIR/report, without the page RESULTS_DIR/analysis")
    ] = None,
    format: Annotated[
        Literal["html", "md"],
        typer.Option(help="html: the page, and all else; md: only analysis_summary.md, tables, figures"),
    ] = "html",
    publication: Annotated[
        bool,
        typer.Option(
            "--publication",
            help="also every figure for a paper: PDF, SVG, PNG, one and two columns wide, with captions",
        ),
    ] = False,
    examples: Annotated[
        bool, typer.Option(help="pictures of test images on the page, if they are on this machine; takes seconds")
    ] = True,
) -> None:
    """Write the report: one HTML file that needs no network, Markdown, and every figure as PNG and SVG.

    Of one run it is the page of its model.

    Exit codes: 0 done, 1 written, but a file that may be a result was left out and is named, 2 bad input.
    """
    from peft_vit.records import followed
    from peft_vit.report import build_report

    results_dir, page = followed(results_dir), format == "html"
    files = build_report(
        results_dir,
        output or results_dir / ("report" if page else "analysis"),
        page=page,
        publication=publication,
        thumbnails=_thumbnails if page and examples else None,
    )
    if page:
        print(f"Report: {files.html}")
    print(f"Markdown: {files.markdown}")
    for line in files.results.lines():
        print(line, file=sys.stderr)
    if not files.results.is_whole:  # so that scripts notice
        raise typer.Exit(1)


@app.command()
def recommend(
    results_dir: ResultsDir,
    max_bytes: Annotated[str | None, typer.Option(help="to store, base and adapter: as in 20MB")] = None,
    max_params: Annotated[str | None, typer.Option(help="trainable at the end, head included: 300k or 3e5")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="of one training step")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="of one forward pass, where it was measured")] = None,
    bench: Annotated[
        Path | None,
        typer.Option(help="take latency from this .json of `peft-vit bench`, by exported models", show_default=False),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="points of test accuracy whose loss matters; to be chosen before looking")
    ] = 1.0,
    smallest: Annotated[
        Literal["bytes", "params", "latency"], typer.Option(help="by which measure; sizes within one percent are equal")
    ] = "bytes",
    study: Annotated[str | None, typer.Option(help="its name, where RESULTS_DIR holds several")] = None,
    output: Annotated[
        Path | None, typer.Option(help="write the configuration to this file; default: print it", show_default=False)
    ] = None,
) -> None:
    """Name the smallest configuration that is shown to lose less than --margin against the best, and print it.

    Where the data does not decide, nothing is recommended, and it says how many seeds would. Exit codes: 0 done,
    2 bad input.
    """
    from peft_vit.analysis import load_studies
    from peft_vit.analysis.recommendation import check_margin, exported_latency, parse_limits
    from peft_vit.analysis.recommendation import recommend as find
    from peft_vit.analysis.studies import choose_study
    from peft_vit.records import read_bench
    from peft_vit.report.printed_tables import print_recommendation

    limits = parse_limits(max_bytes, max_params, max_seconds, max_latency_ms)
    share = check_margin(margin, "--margin")
    chosen = choose_study(load_studies(results_dir), study, results_dir)
    exported = None if bench is None else exported_latency(chosen, read_bench(bench), bench)
    print_recommendation(find(chosen, limits, margin=share, measure=smallest, exported=exported), output)


@app.command()
def compare(
    results_dirs: Annotated[list[Path], typer.Argument(help="directories that hold records", show_default=False)],
    reference: Annotated[
        str | None,
        typer.Option(help="experiment to compare with; default: the LoRA, or the linear probe, of every study"),
    ] = None,
    allow_mismatch: Annotated[
        str, typer.Option(help="pool although these differ, as in versions,timings; see docs/how_to/compare_studies.md")
    ] = "",
    output: Annotated[
        Path | None, typer.Option(help="write unrounded values to this .csv or .json file", show_default=False)
    ] = None,
) -> None:
    """Compare experiments that occur in several studies, over data sets and backbones.

    Differences are pooled over studies only where nothing else differs; what is refused is named with its reason.
    Exit codes: 0 done, 2 bad input.
    """
    from peft_vit.analysis.across import compare_studies, load_across, parse_pool
    from peft_vit.report.printed_tables import print_comparison

    allowed = parse_pool(allow_mismatch, "--allow-mismatch")
    print_comparison(compare_studies(load_across(results_dirs), reference=reference, pool=allowed), output)
