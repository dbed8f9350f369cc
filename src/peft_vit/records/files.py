"""Records on disk, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from peft_vit.errors import UserError, checked, named
from peft_vit.records.migrations import migrated
from peft_vit.records.run_spec import RunSpec
from peft_vit.records.values import SCHEMA_VERSION, RunRecord
from peft_vit.safe_io import folder_below, read_bytes

RECORD_FILE = "record.json"
ADAPTER_FILE = "adapter.safetensors"
REGISTRATION_FILE = "registration.json"  # of a run that version 0.2.0 has begun, until it is done
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # of JSON; no page and no file could hold it alone
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,12})")


def flush(path: Path) -> None:
    """Flush a file to disk, or a folder's list of names, without which a new file may be lost with the power.

    Windows flushes no folders.
    """
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems flush no folders
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder that may be there, with its parents, and flush them to disk."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        flush(place.parent)


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never half of it; flush it to disk."""
    make_folder(file.parent)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
        flush(file.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_whole(file: Path, content: bytes) -> None:
    """Replace a file as `write_atomically`; what has no room is told in one line."""
    try:
        write_atomically(file, content)
    except OSError as error:
        problem = f"can't be written ({error.strerror}); nothing that was written is lost: make room, or make it "
        raise UserError(f"{problem}writable, and the same command goes on", file=file) from None


def run_folder(results_dir: Path, spec: RunSpec) -> Path:
    """Return the folder that holds a run's files.

    Raises:
        UserError: if a link stands in its way, which would lead out of the results directory.
    """
    return folder_below(results_dir, spec.run_id)


def checkpoint_folders(run_folder: Path) -> dict[int, Path]:
    """Return the folders of the checkpoints that an interrupted run has left, by step; whole ones or not."""
    named = {path: _CHECKPOINT.fullmatch(path.name) for path in run_folder.glob("checkpoint-*")}
    return {int(match[1]): path for path, match in named.items() if match is not None}


def write_record(results_dir: Path, record: RunRecord) -> Path:
    """Write a run's record and return its path."""
    file = run_folder(results_dir, record.spec) / RECORD_FILE
    write_whole(file, (record.model_dump_json(indent=1) + "\n").encode())
    return file


def write_result(results_dir: Path, record: RunRecord, adapter: bytes | None) -> None:
    """Write what came out of a run: the adapter first, so that no record of a finished run stands without it.

    Args:
        results_dir: the run's folder lies below it.
        record: what happened.
        adapter: content of the adapter file; None if the run failed.
    """
    if adapter is not None:
        write_whole(run_folder(results_dir, record.spec) / ADAPTER_FILE, adapter)
    write_record(results_dir, record)


def read_record(file: Path) -> RunRecord:
    """Read one record.

    Raises:
        UserError: if the file is not a record of this schema; names the file and the field.
    """
    try:
        text = read_bytes(file).decode("utf-8")
        data: Any = json.loads(text)
        if _HALF_CHARACTER.search(text):
            json.dumps(data, ensure_ascii=False).encode()  # fails if the other half is not there
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"expected {SCHEMA_VERSION}, got {version!r}; move it away and run the study again",
                file=file,
                field="schema_version",
            )
        if isinstance(data.get("spec"), dict):  # old words become today's; the configuration's models are strict
            with named(file):
                data["spec"] = migrated(_tuples(data["spec"]))
        with checked(file, "move it away and run the study again"):
            record = RunRecord.model_validate(data)
    except (OSError, ValueError, RecursionError) as error:
        problem = f"is not a readable record ({error}); move it away and run the study again"
        raise UserError(problem, file=file) from None
    for name in ("steps", "evaluations", "rank_history", "importance_history", "bits_history"):
        for before, row in pairwise(getattr(record, name)):
            again = before.step >= row.step if name in ("steps", "evaluations") else before == row
            if again:
                problem = f"step {row.step} stands twice or out of order; move it away and run the study again"
                raise UserError(problem, file=file, field=name)
    units = sorted({entry.unit for entry in record.rank_history})
    if len(units) > 1:
        problem = f"budgets in different units ({', '.join(units)}); move it away and run the study again"
        raise UserError(problem, file=file, field="rank_history")
    return record


def _tuples(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _tuples(value) for key, value in data.items()}
    if isinstance(data, list):
        return tuple(_tuples(value) for value in data)
    return data
