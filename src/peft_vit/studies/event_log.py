"""What watchers are told, as a file of JSON objects for other programs to follow; nothing is ever read back from it."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_vit.errors import UserError
from peft_vit.records import RunRecord
from peft_vit.studies.events import Notice, RunEnded, RunInterrupted, RunProgress, RunRetried, RunStarted, StudyEvent
from peft_vit.studies.ledger import now


@contextmanager
def event_log(file: Path) -> Iterator[Callable[[StudyEvent], None]]:
    """Give a function that appends an event to a file, one JSON object a line, flushed.

    A disk that is full later costs the rest of the log, not the study.

    Args:
        file: made if it is not there.

    Raises:
        UserError: if it can't be written.
    """
    try:
        handle = file.open("a+b")
        if handle.seek(0, os.SEEK_END):
            handle.seek(-1, os.SEEK_END)
            if handle.read(1) != b"\n":  # an earlier call was killed in the middle of a line
                handle.write(b"\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"can't be written ({reason}); choose another file", file=file, field="--log-json") from None
    works = True

    def on_event(event: StudyEvent) -> None:
        nonlocal works
        if not works:
            return
        line = json.dumps({"at": now(), **_content(event)}, allow_nan=False)
        try:
            handle.write(line.encode() + b"\n")
            handle.flush()
        except OSError as failure:
            works = False
            print(f"{file}: can't be written ({failure.strerror}); the study goes on without it", file=sys.stderr)

    try:
        yield on_event
    finally:
        with suppress(OSError):
            handle.close()


def _content(event: StudyEvent) -> dict[str, Any]:
    if isinstance(event, Notice):
        return {"event": "notice", "text": event.text}
    run = {"run": event.run.spec.run_id}
    match event:
        case RunStarted():
            return {"event": "started", **run, "total_steps": event.run.total_steps, "worker": event.worker}
        case RunProgress():
            progress = asdict(event.progress)
            return {"event": "progress", **run, **{name: _finite(value) for name, value in progress.items()}}
        case RunInterrupted():
            return {"event": "interrupted", **run, "step": event.step}
        case RunRetried():
            return {"event": "retried", **run, **_end(event.record)}
        case RunEnded():
            return {"event": event.record.status, **run, **_end(event.record)}


def _end(record: RunRecord) -> dict[str, Any]:
    taken = {"seconds": record.seconds, "attempts": record.attempts}
    if record.status == "failed":
        return {**taken, "failure": record.failure, "error": record.error}
    return {
        **taken,
        "peak_memory_bytes": record.peak_memory_bytes,
        "validation_accuracy": None if record.validation is None else record.validation.accuracy,
        "chosen_step": record.chosen_step,
        "adapter_sha256": record.adapter_sha256,
    }


def _finite(value: float | None) -> float | None:
    """Return None for what JSON has no number for."""
    return value if value is None or math.isfinite(value) else None
