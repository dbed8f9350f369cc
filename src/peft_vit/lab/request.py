"""What `run` and `plan` are asked for: which studies, and which of their runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from peft_vit.base.settings import Option, Request, refuse
from peft_vit.core.config import MethodName
from peft_vit.fit.request import DEFAULT_OUTPUT, EXECUTOR, SMOKE, SMOKE_OUTPUT
from peft_vit.runs.executors import EXECUTORS, ExecutorName


class StudiesRequest(Request):
    """Studies, and where their records lie."""

    configs: Annotated[tuple[Path, ...], Option("STUDIES", list[Path], is_argument=True)] = Field(
        description="One or more studies, as YAML files. `peft-vit example` prints one."
    )
    output: Path | None = Field(
        default=None, description=f"The folder for results. Without it, {DEFAULT_OUTPUT}; with --smoke, {SMOKE_OUTPUT}."
    )
    smoke: bool = Field(default=False, description=SMOKE)
    workers: int | None = Field(
        default=None,
        ge=1,
        description="Do this many runs at a time, whatever the study says. Results do not depend on it.",
    )

    @property
    def results_dir(self) -> Path:
        """Return the directory below which the studies' folders lie."""
        return self.output or (SMOKE_OUTPUT if self.smoke else DEFAULT_OUTPUT)


class RunRequest(StudiesRequest):
    """Which runs of studies are to be done, and how; the others are skipped, not removed."""

    dry_run: bool = Field(default=False, description="Print the plan and stop.")
    method: MethodName | None = Field(default=None, description="Do only the experiments of this method.")
    seeds: str | None = Field(default=None, description="Do only these of the study's seeds, such as 0,1,2.")
    minutes: float | None = Field(
        default=None,
        gt=0,
        description="Stop after this many minutes, of all studies together. All runs of one seed come before those of "
        "the next. The same command continues later.",
    )
    skip_failed: bool = Field(
        default=False, description="Leave out runs that failed in an earlier call. Without it, they are tried again."
    )
    executor: ExecutorName = Field(default="local", description=EXECUTOR)
    ray_address: str | None = Field(
        default=None,
        description="The Ray cluster to use, as host:port, or local for one that ends with this call. Without it, the "
        "one that runs on this machine, else local.",
    )

    @model_validator(mode="after")
    def _fit_each_other(self) -> Self:
        if self.workers is not None and EXECUTORS[self.executor].is_elastic:
            reason = "where as many runs go at a time as nodes have room for; leave it out"
            refuse(self, {"workers": f"has no effect with {self.spelled('executor', self.executor)}, {reason}"})
        return self
