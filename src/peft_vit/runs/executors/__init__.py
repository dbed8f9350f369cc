"""What carries out the runs of a study, and what it reports back: one process a run here, or tasks on a Ray cluster.

An executor carries out attempts at runs and knows no retries and no files of a study. The driver alone decides what is
attempted, and alone writes what came out. To add one: a module here with an `open_executor`, and its line in EXECUTORS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from peft_vit.base.extras import require_extra

if TYPE_CHECKING:  # a driver needs no torch, and who asks for help no records
    from peft_vit.core.records import Failure, RunRecord
    from peft_vit.core.training import Progress
    from peft_vit.runs.planned import Plan, PlannedRun

ExecutorName = Literal["local", "ray"]


@dataclass(frozen=True)
class ExecutorKind:
    """An executor.

    Attributes:
        module: of this package.
        extra: packages that it needs.
        is_elastic: as many runs go at a time as there is room for, whatever a study's `workers` are.
    """

    module: str
    extra: str | None = None
    is_elastic: bool = False


EXECUTORS: Mapping[ExecutorName, ExecutorKind] = {
    "local": ExecutorKind("local"),
    "ray": ExecutorKind("ray_cluster", extra="ray", is_elastic=True),
}


# --- what happens to a run --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunStarted:
    """An attempt begins; `worker` names the process and where it lives, for a person to read."""

    run: PlannedRun
    worker: str


@dataclass(frozen=True)
class RunProgress:
    """A run made a step."""

    run: PlannedRun
    progress: Progress


@dataclass(frozen=True)
class RunEnded:
    """An attempt came to an end, in success or failure; nothing of it is written yet."""

    run: PlannedRun
    record: RunRecord  # also where the worker died
    adapter: bytes | None  # content of the adapter file; None if the run failed
    features: bytes | None = None  # content of the file of training features; None: there is none


@dataclass(frozen=True)
class RunInterrupted:
    """An attempt was stopped on request; its checkpoint holds what it had reached."""

    run: PlannedRun
    step: int


@dataclass(frozen=True)
class RunRetried:
    """An attempt failed for a reason that may pass, and the run is attempted again; said by the driver."""

    run: PlannedRun
    record: RunRecord


@dataclass(frozen=True)
class Notice:
    """A line for the person who watches; said by the driver."""

    text: str


Event = RunStarted | RunProgress | RunEnded | RunInterrupted
# What watchers are told; a RunEnded only once a run, when no further attempt follows.
StudyEvent = Event | RunRetried | Notice


class Executor(Protocol):
    """Carries out attempts, several at a time if it can."""

    def submit(self, run: PlannedRun) -> None:
        """Take an attempt on, to be started when there is room for it."""
        ...

    def next_event(self, timeout_s: float) -> Event | None:
        """Return what happened next; None if nothing did within the time."""
        ...

    def stop(self) -> None:
        """Forget what has not started; let what runs write a checkpoint and report `RunInterrupted`."""
        ...

    def close(self) -> None:
        """End at once, whatever runs; leave no process behind."""
        ...


def failed_attempt(
    run: PlannedRun, reason: str, seconds: float = 0.0, failure: Failure = "killed", traceback: str | None = None
) -> RunEnded:
    """Return the end of an attempt that can't tell it itself, since its process is gone.

    Args:
        run: what was attempted.
        reason: one line.
        seconds: that it took.
        failure: its kind.
        traceback: of what ended it, if it is known.
    """
    from peft_vit.core.records import RunRecord
    from peft_vit.runs.records.progress import utc_now

    record = RunRecord(
        spec=run.spec,
        spec_digest=run.spec.digest(),
        status="failed",
        error=reason,
        failure=failure,
        traceback=traceback,
        started_at=utc_now(),
        seconds=seconds,
    )
    return RunEnded(run, record, None)


def runs_at_once(name: ExecutorName, cpus: int, devices: int) -> AbstractContextManager[Callable[[], int]]:
    """Be where runs are carried out, one at a time here; yield a function that returns how many go at a time.

    Args:
        name: of the executor.
        cpus: of each process of a run.
        devices: processes of a run.
    """
    if not EXECUTORS[name].is_elastic:
        return nullcontext(lambda: 1)
    joined: AbstractContextManager[Callable[[], int]] = _module(name).runs_at_once(cpus, devices)
    return joined


def _module(name: ExecutorName) -> Any:
    kind = EXECUTORS[name]
    if kind.extra is not None:
        require_extra(kind.extra, field=f"--executor {name}")
    return import_module(f"{__name__}.{kind.module}")


def open_executor(name: ExecutorName, plan: Plan, results_dir: Path, ray_address: str | None = None) -> Executor:
    """Make what carries out a plan's pending runs; their images are decoded here, so that workers find them.

    Args:
        name: which one.
        plan: says how many workers, and what a run needs.
        results_dir: checkpoints lie below it.
        ray_address: see `RayExecutor`.

    Raises:
        UserError: if an image is broken, what runs need is not there, or an option has no effect.
    """
    executor: Executor = _module(name).open_executor(plan, results_dir, ray_address)
    try:
        decode_images(plan.pending)
    except BaseException:
        executor.close()
        raise
    return executor


def decode_images(runs: Iterable[PlannedRun]) -> None:
    """Bring every image that runs will need into the cache: a broken one should show before training, once.

    Raises:
        UserError: see `load_data`.
    """
    from peft_vit.data import load_data

    for data, seed, smoke in dict.fromkeys((run.spec.data, run.spec.seed, run.spec.smoke) for run in runs):
        load_data(data, seed, smoke=smoke)
