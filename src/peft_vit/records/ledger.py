"""The ledger of a study as it is read: one JSON object a line, each with its checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from peft_vit.errors import UserError, first_fault
from peft_vit.records.owner import Owner
from peft_vit.safe_io import read_bytes

LEDGER_FILE = "ledger.jsonl"
# Experiment and seed, which is also the run's folder below the study's: nothing that leads out of it.
RunName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_\-]{0,63}/seed_[0-9]{1,10}$")]


class Row(BaseModel):
    """Something that happened to a run. `attempt` counts its starts, from 1, over all calls of the command."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer version may say more

    at: str  # ISO 8601, UTC
    run: RunName
    event: Literal["started", "done", "failed", "interrupted", "lost"]  # lost: its files are not there any more
    attempt: int = Field(ge=1)
    worker: str | None = None  # of started
    total_steps: int | None = None  # of started
    step: int | None = None  # of interrupted: what its checkpoint holds
    seconds: float | None = None  # of done and failed
    adapter_sha256: str | None = None  # of done
    failure: str | None = None  # of failed: the kind
    error: str | None = None  # of failed: one line
    traceback: str | None = None
    retried: bool = False  # of failed: the kind passes, and attempts are left
    found: bool = False  # not seen to happen, but read from the run's record


def last_rows(rows: Iterable[Row]) -> dict[str, Row]:
    """Return what happened last to each run."""
    return {row.run: row for row in rows}


def has_failed(last: Row | None) -> bool:
    """Tell whether a run's last row is a failure after which nobody tries again by himself."""
    return last is not None and last.event == "failed" and not last.retried


def unfinished_state(
    last: Row | None, owner: Owner | None, *, skipped: bool
) -> Literal["failed", "running", "pending", "skipped"]:
    """Return what has become of a run without a result.

    Args:
        last: its last row.
        owner: who works on the study; what an earlier one has started is under way no more.
        skipped: whether the call that was made last leaves it out.
    """
    if has_failed(last):
        return "failed"
    if last is not None and last.event == "started" and owner is not None and owner.wrote(last.at):
        return "running"
    return "skipped" if skipped else "pending"


@dataclass(frozen=True)
class LedgerContent:
    """A ledger as it was read.

    Attributes:
        rows: in the order in which they were written.
        sound_bytes: length of the lines of these rows.
        torn: what follows them, cut short; b"" as a rule.
    """

    rows: tuple[Row, ...]
    sound_bytes: int
    torn: bytes


def read_ledger(file: Path) -> LedgerContent:
    """Read a ledger, which may be written to at the same time; without a file there are no rows.

    Raises:
        UserError: with file and line, if a line before the last is damaged, or if the file can't be read.
    """
    lines = _lines(file)
    rows: list[Row] = []
    sound_bytes = 0
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_decode(line))
        except ValueError as error:
            if number == len(lines):
                return LedgerContent(tuple(rows), sound_bytes, line)
            problem = f"this line is damaged ({_reason(error)}); `peft-vit repair {file.parent}` makes the ledger anew"
            raise UserError(f"{problem} from the records", file=f"{file}:{number}") from None
        sound_bytes += len(line)
    return LedgerContent(tuple(rows), sound_bytes, b"")


def sound_rows(file: Path) -> tuple[list[Row], int]:
    """Return the rows of a damaged ledger that are as they were written, and the number of other lines."""
    rows = []
    lines = _lines(file)
    for line in lines:
        try:
            rows.append(_decode(line))
        except ValueError:
            continue
    return rows, len(lines) - len(rows)


def encode(row: Row) -> bytes:
    """Return a row's line."""
    data = row.model_dump(mode="json", exclude_defaults=True)
    return _canonical({"row": data, "sha256": _checksum(data)}) + b"\n"


def _decode(line: bytes) -> Row:
    """Return a line's row.

    Raises:
        ValueError: if it is not exactly what was written.
    """
    if not line.endswith(b"\n"):
        raise ValueError("it does not end")
    try:
        data: Any = json.loads(line)
    except RecursionError:
        raise ValueError("it is no JSON") from None
    if not isinstance(data, dict) or data.keys() != {"row", "sha256"} or data["sha256"] != _checksum(data["row"]):
        raise ValueError("its checksum is another")
    return Row.model_validate(data["row"])


def _reason(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        field, fault = first_fault(error)
        return f"{field}: {fault}"
    return "it is no JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def _checksum(row: Any) -> str:
    return hashlib.sha256(_canonical(row)).hexdigest()[:16]


def _lines(file: Path) -> list[bytes]:
    try:
        content = read_bytes(file)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror}); make it readable", file=file) from None
    *lines, rest = content.split(b"\n")
    return [line + b"\n" for line in lines] + ([rest] if rest else [])
