"""Fill a small disk while a study runs: it says so and stops, loses nothing, and with room again ends as undisturbed.

    .venv/bin/python tests/torture/full_disks.py --trials 60        as `make torture` does; mounts, so it takes root

The disk is a tmpfs with a ballast that leaves room for a number of pages. That room is drawn so that it gives out
where the study begins (its lock, its study.json, a run's progress), in a checkpoint, or in a run's adapter or record.
A trial is a command that did not fit. It has passed if it ended with exit code 2 and one line that names what could
not be written, if every checkpoint that it left can be read, and if after the ballast is gone the same command ends
with all runs done and as undisturbed ones. Commands are forked, see `commands`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import harness
from commands import Command, run_forked
from tiny_studies import METHODS, NAME, End, difference, ends_of, write_study

from peft_vit.base.errors import UserError
from peft_vit.base.files import checkpoint_folders
from peft_vit.runs.records.progress import PROGRESS_FILE
from peft_vit.runs.records.storage import ADAPTER_FILE, RECORD_FILE, STUDY_FILE

PAGE = 4096
_DISK = 16 << 20
_FIRST = 3  # pages of lock, study.json and progress.json
SCENARIOS = ("begin", "checkpoints", "results")
_PLACES = {  # what could not be written, by what an error says
    ".checkpoint-": "a checkpoint",
    PROGRESS_FILE: "a run's progress",
    STUDY_FILE: "study.json",
    ADAPTER_FILE: "the adapter",
    RECORD_FILE: "the record",
}


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a small file system.

    Raises:
        PermissionError: if this process may not.
    """
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise PermissionError("no file system may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def free_pages(disk: Path) -> int:
    """Return the room on a disk."""
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize // PAGE


def fill(disk: Path, room: int) -> Path:
    """Leave room for so many pages; return the file that takes the rest."""
    ballast = disk / "ballast"
    with ballast.open("wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, (free_pages(disk) - room) * PAGE)
    return ballast


class Study:
    """A study of one run, with and without checkpoints."""

    def __init__(self, folder: Path, method: str, seed: int) -> None:
        self.folder = folder
        self.run = f"{method}/seed_{seed}"
        self._configs = {
            every_s: write_study(
                folder / f"every-{every_s}", {method: METHODS[method]}, (seed,), checkpoint_every_s=every_s
            )
            for every_s in (0, 3600)
        }

    def start(self, out: Path, log: str, *, checkpoints: bool) -> Command:
        """Start the command."""
        config = self._configs[0 if checkpoints else 3600]
        return run_forked([str(config), "--output", str(out)], self.folder / log)

    def errors(self, log: str) -> list[str]:
        """Return the errors that the command printed, and anything of a traceback."""
        lines = (self.folder / log).read_text().splitlines()
        return [line for line in lines if line.startswith(("error: ", "Traceback", '  File "'))]

    def measure(self) -> tuple[Mapping[str, End], dict[bool, int]]:
        """Return what the run comes to undisturbed, and the most pages that it takes, without and with checkpoints."""
        most = {}
        for checkpoints in (False, True):
            with small_disk(self.folder / f"measured-{checkpoints}") as disk:
                before = least = free_pages(disk)
                command = self.start(disk / "out", "measured.txt", checkpoints=checkpoints)
                while not command.ended():
                    least = min(least, free_pages(disk))
                    time.sleep(0.001)
                if command.code:
                    raise RuntimeError((self.folder / "measured.txt").read_text()[-3000:])
                most[checkpoints] = before - least
                ends = ends_of(disk / "out")
        return ends, most


def trial(
    study: Study, disk: Path, scenario: str, expected: Mapping[str, End], most: Mapping[bool, int], rng: random.Random
) -> tuple[str | None, str | None]:
    """Let one command run out of room; return what could not be written (None: it all fitted), and what is wrong."""
    out = disk / "out"
    checkpoints = scenario == "checkpoints" or (scenario == "begin" and rng.random() < 0.5)
    log = f"{disk.name}.txt"
    room = rng.randrange(_FIRST, most[checkpoints])  # lock, study.json and progress take a page each
    if scenario == "begin":
        room = rng.randrange(_FIRST + 1)
    elif scenario == "results":
        room = most[checkpoints] - (
            rng.randint(1, 4) if rng.random() < 0.5 else rng.randint(5, most[checkpoints] - _FIRST)
        )
    ballast = fill(disk, room)
    code = study.start(out, log, checkpoints=checkpoints).finish()
    if code == 0:
        return None, difference(out, expected)
    errors, fault = study.errors(log), None
    place = next(
        (place for sign, place in _PLACES.items() if errors and sign in errors[-1]), "the study's folder or lock"
    )
    if code != 2 or len(errors) != 1 or "error: " not in errors[0] or "No space left on device" not in errors[0]:
        fault = f"it ended with {code} and said {errors}"
    fault = fault or unreadable(out / NAME / study.run)
    ballast.unlink()
    again = study.start(out, f"again-{log}", checkpoints=checkpoints).finish()
    if again != 0:
        return place, fault or f"with room again it ended with {again} and said {study.errors(f'again-{log}')}"
    return place, fault or difference(out, expected)


def unreadable(run: Path) -> str | None:
    """Return why a checkpoint can't be read; None if all can."""
    from peft_vit.core.training.checkpoint import read_checkpoint

    for folder in checkpoint_folders(run).values():
        try:
            read_checkpoint(folder)
        except UserError as error:
            return f"a checkpoint can't be read: {error}"
    return None


def torture(folder: Path, options: argparse.Namespace, tally: harness.Tally) -> None:
    """Fill disks so often; what could not be written is the kind of a trial."""
    methods = options.methods
    studies = {method: Study(folder / method, method, seed=options.seed % 3) for method in methods}
    known = {method: study.measure() for method, study in studies.items()}
    for number in itertools.count():
        if tally.trials.total() >= options.trials:
            return
        rng = random.Random(f"{options.seed}:{number}")
        method, scenario = methods[number % len(methods)], SCENARIOS[number % len(SCENARIOS)]
        with small_disk(folder / f"disk-{number}") as disk:
            unwritten, fault = trial(studies[method], disk, scenario, *known[method], rng)
        if fault or unwritten:
            kind = unwritten or "everything fitted"
            tally.add(kind, f"{method}, {scenario}, --seed {options.seed}, {number}: {kind}", fault)


if __name__ == "__main__":
    options = {
        "--trials": {"type": int, "default": 60, "help": "commands that ran out of room"},
        "--methods": {"nargs": "+", "default": ["lora", "adalora", "qa_lora"], "choices": METHODS},
    }
    harness.main("disk full: stopped in one line, identical with room again", __doc__, torture, options)
