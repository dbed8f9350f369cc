"""The ledger of a study as it is read: what happened to its runs, one JSON object a line.

What is done, records decide. The ledger says what is under way, and how often a run was begun; without it that is lost
and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from peft_vit.errors import UserError
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
    """A ledger as it was read."""

    rows: tuple[Row, ...]  # in the order in which they were written
    # numbers of the lines that are no rows, from 1; a last one that does not end is not among them
    unreadable: tuple[int, ...]
    whole_bytes: int  # length of the lines that end; what follows was cut short, or is being written


def read_ledger(file: Path) -> LedgerContent:
    """Read a ledger, which may be written to at the same time; without a file there are no rows.

    Raises:
        UserError: if the file can't be read.
    """
    try:
        content = read_bytes(file)
    except FileNotFoundError:
        return LedgerContent((), (), 0)
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror}); make it readable", file=file) from None
    *lines, rest = content.split(b"\n")
    rows: list[Row] = []
    unreadable = []
    for number, line in enumerate(lines, start=1):
        try:
            data: Any = json.loads(line)
            rows.append(Row.model_validate(data.get("row", data)))  # below "row", beside a checksum, in older ledgers
        except (ValueError, AttributeError, RecursionError):
            unreadable.append(number)
    return LedgerContent(tuple(rows), tuple(unreadable), len(content) - len(rest))


def unreadable_lines(content: LedgerContent) -> str:
    """Return what to say of a ledger in which not every line is a row."""
    first, *more = content.unreadable
    which = f"line {first}" + (f" and {len(more)} more" if more else "")
    return f"{which} can't be read, so nothing of it counts; `peft-vit repair` makes the ledger anew from the records"


def encode(row: Row) -> bytes:
    """Return a row's line."""
    data = row.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode() + b"\n"
