"""What an executor does for the driver of a study, and what it reports back.

An executor carries out attempts at runs and knows no retries and no files of a study. The driver alone
decides what is attempted, and alone writes what came out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from peft_vit.records import Failure, RunRecord
from peft_vit.records.progress import now

if TYPE_CHECKING:  # a driver needs no torch
    from peft_vit.studies.plan import PlannedRun
    from peft_vit.training import Progress


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
    """An attempt came to an end, in success or failure; nothing of it is written yet.

    Attributes:
        run: what was attempted.
        record: what happened, also where the worker died.
        adapter: content of the adapter file; None if the run failed.
    """

    run: PlannedRun
    record: RunRecord
    adapter: bytes | None


@dataclass(frozen=True)
class RunInterrupted:
    """An attempt was stopped on request; its checkpoint holds what it had reached."""

    run: PlannedRun
    step: int


Event = RunStarted | RunProgress | RunEnded | RunInterrupted


def lost(
    run: PlannedRun, reason: str, seconds: float = 0.0, failure: Failure = "killed", traceback: str | None = None
) -> RunEnded:
    """Return the end of an attempt that can't tell it itself, since its process is gone.

    Args:
        run: what was attempted.
        reason: one line.
        seconds: for how long.
        failure: its kind.
        traceback: of what ended it, if it is known.
    """
    record = RunRecord(
        spec=run.spec,
        spec_digest=run.spec.digest(),
        status="failed",
        seconds=seconds,
        error=reason,
        failure=failure,
        traceback=traceback,
        started_at=now(),
    )
    return RunEnded(run, record, None)


@dataclass(frozen=True)
class RunRetried:
    """An attempt failed for a reason that may pass, and the run is attempted again; said by the driver."""

    run: PlannedRun
    record: RunRecord


@dataclass(frozen=True)
class Notice:
    """A line for the person who watches; said by the driver."""

    text: str


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
