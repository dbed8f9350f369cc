"""Calls of `peft-vit train`: each is a study of one run in a numbered folder, and a file says what was asked for."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from peft_vit.base.console import quoted
from peft_vit.base.errors import os_fault
from peft_vit.base.files import checkpoint_folders, make_folder, read_bytes, write_whole
from peft_vit.core.records import RunRecord
from peft_vit.fit.request import TrainRequest
from peft_vit.runs.records.progress import (
    RunStatus,
    StudyLock,
    owner_of,
    read_run_files,
    remove_empty,
    run_status,
    study_lock,
)
from peft_vit.runs.records.storage import RECORD_FILE, read_record, read_study_file, single_run

if TYPE_CHECKING:
    from peft_vit.data import ImageIndex

REQUEST_FILE = "request.json"
_NUMBERED = re.compile(r"([0-9]{4,8})-[a-z0-9-]+")


class RequestFile(BaseModel):
    """Content of request.json.

    Attributes:
        request: as it was given.
        data_sha256: of the images.
        images: by name, the beginning of a digest of the file's class and content.
        files: SHA-256 of weights and of an adapter that were named by a path, by how they were.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer version may say more

    request: TrainRequest
    data_sha256: str
    images: dict[str, str]
    files: dict[str, str] = {}

    @classmethod
    def of(cls, request: TrainRequest, index: ImageIndex, files: dict[str, str]) -> Self:
        """Return what a call's file says of the images that are used, and of files that were named."""
        images = {
            name: hashlib.sha256(f"{index.label(i)}\0{digest}".encode()).hexdigest()[:16]
            for i, (name, digest) in enumerate(zip(index.names or (), index.digests or (), strict=True))
        }
        place = Path(os.path.abspath(request.images))  # also of a call from another directory
        request = request.model_copy(update={"images": place})
        return cls(request=request, data_sha256=index.sha256, images=images, files=files)

    def asks_for_the_same(self, other: RequestFile) -> bool:
        """Tell whether both name the same folder of images, and everything else alike, but for where it goes."""
        ours, theirs = (
            (
                file.request.model_dump(exclude={"images", "output", "strict", "devices", "executor"}),
                os.path.realpath(file.request.images),
            )
            for file in (self, other)
        )
        return ours == theirs

    def changes_since(self, before: RequestFile) -> str:
        """Return what is not as in an earlier call that asked for the same; empty: nothing."""
        changed = [typed for typed, digest in self.files.items() if before.files.get(typed) != digest]
        if self.data_sha256 == before.data_sha256:
            return ", ".join(changed)
        counts = {
            "added": len(self.images.keys() - before.images.keys()),
            "removed": len(before.images.keys() - self.images.keys()),
            "changed": sum(before.images.get(name, mark) != mark for name, mark in self.images.items()),
        }
        how = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return ", ".join([f"the images ({how or 'their order or layout'})", *changed])


class FitSummary(BaseModel):
    """Of fit.json what says how far a call is, see `fit.FitFile`; it needs no torch."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    seconds: dict[str, float]
    decisions: dict[str, Any]


@dataclass(frozen=True)
class TrainRun:
    """A call of `train`, and where its run lies."""

    folder: Path
    asked: RequestFile

    @property
    def command(self) -> str:
        """Return it as it is typed."""
        asked = self.asked.request
        return f"peft-vit train {quoted(asked.images)} --method {asked.method} {asked.settings}".rstrip()

    @property
    def run(self) -> str:
        """Return the name of the call's first run in the folder."""
        study, asked = read_study_file(self.folder), self.asked.request
        return study.runs[0] if study is not None and study.runs else f"{asked.experiment}/seed_{asked.seed}"

    @property
    def date(self) -> str:
        """Return when it was given, in local time."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(os.path.getmtime(self.folder / REQUEST_FILE)))

    @property
    def step(self) -> int:
        """Return the step from which it continues."""
        return max(checkpoint_folders(self.folder / self.run), default=0)

    def status(self) -> RunStatus:
        """Return what has become of it."""
        return run_status(self.folder, self.run, owner_of(self.folder), skipped=False)

    def status_text(self) -> str:
        """Return what has become of it in words: done, interrupted at step 40 of 100, failed: why."""
        status = self.status()
        if status.state == "failed":
            return f"failed: {status.note}"
        if status.state == "done" and not self.is_done:
            return "trained, but not known yet how good it is"
        if status.state != "pending":
            return status.state
        attempt = read_run_files(self.folder, self.run).attempt
        total = "" if attempt is None or attempt.total_steps is None else f" of {attempt.total_steps}"
        return f"interrupted at step {self.step}{total}" if self.step else "interrupted before the first checkpoint"

    def record(self) -> RunRecord | None:
        """Return what happened to what it delivers; None before its end."""
        file = single_run(self.folder) / RECORD_FILE
        return read_record(file) if file.exists() else None

    @cached_property
    def _fit(self) -> FitSummary | None:
        """Return what fit.json says; None: an earlier version has written none."""
        with suppress(OSError, ValidationError):
            return FitSummary.model_validate_json(read_bytes(self.folder / TrainRequest.fit_file))
        return None

    @property
    def is_done(self) -> bool:
        """Return whether its model is delivered."""
        delivered = self._fit is None or self._fit.decisions.get("delivered") is not None
        return self.status().state == "done" and delivered

    def seconds(self) -> float:
        """Return what all of its stages took."""
        return 0.0 if self._fit is None else sum(self._fit.seconds.values())


def train_runs(output: Path) -> list[TrainRun]:
    """Return the calls whose folders lie in a directory, in their order; what is none of them is passed over."""
    runs = {}
    for folder in output.iterdir() if output.is_dir() else ():
        if (match := _NUMBERED.fullmatch(folder.name)) is not None and not folder.is_symlink():
            with suppress(OSError, ValidationError):
                asked = RequestFile.model_validate_json(read_bytes(folder / REQUEST_FILE))
                runs[int(match[1]), folder.name] = TrainRun(folder, asked)
    return [runs[key] for key in sorted(runs)]


def called(folder: Path) -> dict[str, Any]:
    """Return the command of `train` that made a folder, and its seconds; nothing if none did."""
    calls = (call for call in train_runs(folder.parent) if call.folder.resolve() == folder.resolve())  # or `latest`
    return next(({"call": call.command, "seconds": call.seconds()} for call in calls), {})


def earlier_call(asked: RequestFile) -> tuple[TrainRun | None, str]:
    """Return the latest call that asked for the same with the same content, to be continued.

    Returns:
        The call, or None: this is another one; and then, where only images, weights or the adapter differ from an
        earlier call's, a line that says how.
    """
    alike = [run for run in train_runs(asked.request.output) if run.asked.asks_for_the_same(asked)]
    for run in reversed(alike):
        if not asked.changes_since(run.asked):
            return run, ""
    if not alike:
        return None, ""
    changes = asked.changes_since(alike[-1].asked)
    return None, f"Changed since {alike[-1].folder}: {changes}. So this is a new run."


@contextmanager
def call_folder(output: Path, label: str, folder: Path | None) -> Iterator[StudyLock]:
    """Hold the lock of a call's folder, made if it is a new one; if nothing is in it at the end, it goes away again.

    Raises:
        UserError: if it can't be made, or another process works in it.
    """
    missing = [place for place in (output, *output.parents) if not place.exists()]
    try:
        if folder is None:
            with os_fault("can't be written to", output, remedy="make it writable or choose another --output"):
                make_folder(output)
                folder = _claimed(output, label)
        with study_lock(folder) as lock:
            yield lock
    finally:
        remove_empty([*([] if folder is None else [folder]), *missing])


def _claimed(output: Path, label: str) -> Path:
    """Make the folder of the next number, which no other call takes: each first makes a hidden folder of that name."""

    def numbers() -> set[int]:
        return {int(match[1]) for place in output.iterdir() if (match := _NUMBERED.fullmatch(place.name))}

    number = max(numbers(), default=0) + 1
    while True:
        claim = output / f".{number:04d}"
        with suppress(FileExistsError):
            claim.mkdir()
            try:
                if number not in numbers():
                    folder = output / f"{number:04d}-{label}"
                    folder.mkdir()
                    return folder
            finally:
                claim.rmdir()
        number += 1


def write_request(folder: Path, asked: RequestFile) -> None:
    """Write what was asked for; raises UserError if there is no room for it."""
    write_whole(folder / REQUEST_FILE, (asked.model_dump_json(indent=1) + "\n").encode())
