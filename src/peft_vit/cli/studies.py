"""Commands that plan, run and watch studies, and those that go from images to a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from peft_vit.cli.app import app, command
from peft_vit.studies.request import PlanRequest, RunRequest, TrainRequest
from peft_vit.tuning.request import TuneRequest


@command(RunRequest)
def run(asked: RunRequest) -> None:
    """Do every run of the studies that is not done yet, then say where to look.

    The same command goes on where an earlier one was interrupted or killed: done runs are skipped, others continue
    from their last checkpoint, failed ones are tried again. Ctrl-C stops cleanly, a second one at once. Exit codes:
    0 every run is done, or --minutes are over, 1 a run failed, 2 bad input, 130 interrupted.
    """
    from peft_vit.studies.commands import plan_studies, run_studies

    if asked.dry_run:
        plan_studies(asked)
    else:
        _sum_up(run_studies(asked), asked.results_dir)


@command(PlanRequest)
def plan(asked: PlanRequest) -> None:
    """Check the studies and print what every run will take: seconds and peak memory.

    Known are runs that are done and what was measured before; of any other kind of run a few steps are done now, and
    what they took is kept for later plans. Smoke studies are never measured.
    """
    from peft_vit.studies.commands import plan_studies

    plan_studies(RunRequest.of(**asked.model_dump(exclude={"profile"})), profile=asked.profile)


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
def train(asked: TrainRequest) -> None:
    """Fine-tune on your own folder of images: one method, one seed; a fifth validates, a fifth tests.

    The head starts as the linear probe of the frozen backbone. Training goes on for as long as validation gains, within
    the minutes; what it returns is never below the probe on validation. An adapter to go on from brings its own head.
    Exit codes: 0 done, 1 training failed, 2 bad input, 130 interrupted.
    """
    from peft_vit.studies.commands import run_on_own_images

    _sum_up(run_on_own_images(asked), asked.output)


@command(TuneRequest)
def tune(asked: TuneRequest) -> None:
    """Find the smallest model that is good enough for your images, within limits and time, and say what shows it.

    A fifth of the images, or the folder's own test split, is sealed and read once, in the end. Choices rest on folds of
    the others: image size and model by linear probes, learning rates by successive halving, then a race against float
    LoRA by comparisons that stop when they know. The same command goes on where an earlier one was stopped. Exit codes:
    0 a model was chosen, 2 bad input, 130 interrupted.
    """
    from peft_vit.extras import require_extra

    require_extra("tune", "tune")  # what is imported below needs some of it
    from peft_vit.tuning.pipeline import tune as run_tune

    run_tune(asked)


def _sum_up(failed: dict[str, str], results_dir: Path) -> None:
    print(f"Records: {results_dir}\nNext: peft-vit report {results_dir}")
    if failed:
        from peft_vit.studies.display import counted

        print(f"{counted(len(failed), 'run')} failed:", file=sys.stderr)
        for run_id, reason in failed.items():
            print(f"  {run_id}: {reason}", file=sys.stderr)
        raise typer.Exit(1)
