"""What has become of a run, as its folder says: its record decides, and progress.json tells of attempts after it.

A progress.json that can't be read counts as not there: the run goes on from its checkpoints, or begins again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from peft_vit.errors import UserError
from peft_vit.records.files import ADAPTER_FILE, RECORD_FILE, checkpoint_folders
from peft_vit.records.owner import Owner
from peft_vit.safe_io import folder_below, read_bytes

PROGRESS_FILE = "progress.json"
State = Literal["done", "failed", "pending", "running", "skipped"]


class Attempt(BaseModel):
    """Content of progress.json: the latest attempt at a run. What came of it, a record may say better."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer version may say more

    number: int = Field(ge=1)  # starts so far, over all calls of the command
    state: Literal["running", "interrupted", "failed"]  # failed: for a reason that may pass; it is tried again
    started_at: str  # ISO 8601, UTC
    worker: str | None = None
    total_steps: int | None = None
    error: str | None = None  # of failed: one line


class End(BaseModel):
    """What a record says of its end. Of a thousand records, reading all of each takes too long for a look."""

    status: Literal["done", "failed"]
    seconds: float
    attempts: int = 1
    error: str | None = None


@dataclass(frozen=True)
class Known:
    """What is known of a run.

    Attributes:
        attempt: the latest one, unless a record tells how it ended.
        end: what the record says; None without one.
        has_adapter: without it no run is done, whatever its record says.
        fault: what in its folder does not count, though it is there.
    """

    attempt: Attempt | None
    end: End | None
    has_adapter: bool
    fault: str

    @property
    def is_done(self) -> bool:
        """Tell whether the run has its result."""
        return self.end is not None and self.end.status == "done" and self.has_adapter

    @property
    def failure(self) -> str | None:
        """Return why the run failed, if it is not tried again within a call."""
        if self.attempt is not None or self.end is None or self.end.status == "done":
            return None
        return self.end.error or "no error was recorded"

    @property
    def attempts(self) -> int:
        """Return how often the run was begun."""
        if self.attempt is not None:
            return self.attempt.number
        return 0 if self.end is None else self.end.attempts


@dataclass(frozen=True)
class RunStatus:
    """What has become of a planned run; `note` says why, or how far it is."""

    run: str
    state: State
    attempts: int
    note: str = ""


def now() -> str:
    """Return the time, for what begins."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def look_at(study: Path, run: str) -> Known:
    """Return what is known of a run.

    Args:
        study: its study's folder.
        run: its name within the study.

    Raises:
        UserError: if its record can't be read, or if a link leads out of the study's folder.
    """
    folder = folder_below(study, run)
    faults = []
    attempt = None
    try:  # before the record: of a run that ends meanwhile, both are there
        attempt = Attempt.model_validate_json(read_bytes(folder / PROGRESS_FILE))
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        faults.append(f"its {PROGRESS_FILE} can't be read and counts as not there")
    end = _end(folder / RECORD_FILE)
    if attempt is not None and end is not None and attempt.number <= end.attempts:
        attempt = None
    has_adapter = (folder / ADAPTER_FILE).exists()
    if attempt is None and end is not None and end.status == "done" and not has_adapter:
        faults.append(f"its record is here, its {ADAPTER_FILE} is not")
    return Known(attempt, end, has_adapter, "; ".join(faults))


def _end(record: Path) -> End | None:
    try:
        return End.model_validate_json(read_bytes(record))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        problem = "is not a readable record; move it away and run the study again"
        raise UserError(problem, file=record) from None


def run_status(study: Path, run: str, owner: Owner | None, *, skipped: bool) -> RunStatus:
    """Return the one state that a planned run is in.

    Args:
        study: its study's folder.
        run: its name within the study.
        owner: who works on the study; what an earlier one has started is under way no more.
        skipped: whether the call that was made last leaves the run out.
    """
    try:
        known = look_at(study, run)
    except UserError as error:
        return RunStatus(run, "pending", 0, str(error))
    if known.is_done:
        return RunStatus(run, "done", known.attempts)
    if known.failure is not None:
        return RunStatus(run, "failed", known.attempts, known.failure)
    attempt, newest = known.attempt, max(checkpoint_folders(study / run), default=None)
    total = "" if attempt is None or attempt.total_steps is None else f" of {attempt.total_steps}"
    if attempt is not None and attempt.state == "running" and owner is not None and owner.began(attempt.started_at):
        reached = "" if newest is None else f", checkpoint at step {newest}{total}"
        return RunStatus(run, "running", known.attempts, f"{attempt.worker}, since {attempt.started_at}{reached}")
    goes_on = "" if newest is None else f"goes on from step {newest}{total}"
    if skipped:
        return RunStatus(run, "skipped", known.attempts, goes_on)
    again = f"to be tried again after: {attempt.error}" if attempt is not None and attempt.state == "failed" else ""
    return RunStatus(run, "pending", known.attempts, "; ".join(filter(None, (known.fault, again, goes_on))))
