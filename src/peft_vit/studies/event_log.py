"""What watchers are told, as a file of JSON objects for other programs to follow; nothing is ever read back from it."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from peft_vit.errors import UserError
from peft_vit.records import RunRecord
from peft_vit.studies.events import Notice, RunEnded, RunInterrupted, RunProgress, RunRetried, RunStarted, StudyEvent
from peft_vit.studies.ledger import now


class EventLog:
    """Appends one JSON object a line and event, flushed; use as a context manager and hand `on_event` to the driver.

    A disk that is full later costs the rest of the log, not the study.

    Args:
        file: made if it is not there.

    Raises:
        UserError: if it can't be written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._handle = file.open("a+b")
            end = self._handle.seek(0, os.SEEK_END)
            if end:
                self._handle.seek(end - 1)
                if self._handle.read(1) != b"\n":  # an earlier call was killed in the middle of a line
                    self._handle.write(b"\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"can't be written ({reason}); choose another file", file=file, field="--log-json"
            ) from None
        self._works = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._handle.close()
        except OSError as failure:
            self._give_up(failure)

    def on_event(self, event: StudyEvent) -> None:
        """Write an event down."""
        if not self._works:
            return
        line = json.dumps({"at": now(), **_content(event)}, allow_nan=False)
        try:
            self._handle.write(line.encode() + b"\n")
            self._handle.flush()
        except OSError as failure:
            self._give_up(failure)

    def _give_up(self, failure: OSError) -> None:
        if self._works:
            print(f"{self._file}: can't be written ({failure.strerror}); the study goes on without it", file=sys.stderr)
        self._works = False


def _content(event: StudyEvent) -> dict[str, Any]:
    match event:
        case Notice():
            return {"event": "notice", "text": event.text}
        case RunStarted():
            run = {"run": event.run.spec.run_id, "total_steps": event.run.total_steps}
            return {"event": "started", **run, "worker": event.worker}
        case RunProgress():
            progress = {name: _finite(value) for name, value in asdict(event.progress).items()}
            return {"event": "progress", "run": event.run.spec.run_id, **progress}
        case RunInterrupted():
            return {"event": "interrupted", "run": event.run.spec.run_id, "step": event.step}
        case RunRetried():
            return {"event": "retried", "run": event.run.spec.run_id, **_failure(event.record)}
        case RunEnded():
            return {"event": event.record.status, "run": event.run.spec.run_id, **_end(event.record)}


def _end(record: RunRecord) -> dict[str, Any]:
    if record.status == "failed":
        return _failure(record)
    validation = None if record.validation is None else record.validation.accuracy
    return {
        "seconds": record.seconds,
        "attempts": record.attempts,
        "peak_memory_bytes": record.peak_memory_bytes,
        "validation_accuracy": validation,
        "chosen_step": record.chosen_step,
        "adapter_sha256": record.adapter_sha256,
    }


def _failure(record: RunRecord) -> dict[str, Any]:
    return {"seconds": record.seconds, "attempts": record.attempts, "failure": record.failure, "error": record.error}


def _finite(value: float | None) -> float | None:
    """Return None for what JSON has no number for."""
    return value if value is None or math.isfinite(value) else None
