"""Fill a small disk while a study runs: it says so and stops, loses nothing, and with room again ends as undisturbed.

    .venv/bin/python tests/torture/full_disks.py --trials 60        as `make torture` does; mounts, so it takes root

The disk is a tmpfs with a ballast that leaves room for a number of pages. That room is drawn so that it gives out
where the study begins (its lock, its study.json, a run's progress), in a checkpoint, or in a run's adapter or record.
A trial is a command that did not fit. It has passed if it ended with exit code 2 and one line that names what could
not be written, if every checkpoint that it left can be read, and if after the ballast is gone the same command ends
with all runs done and as undisturbed ones. Commands are forked, see `commands`.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import harness
from commands import Command, run_forked
from harness import Tally
from tiny_studies import METHODS, NAME, End, difference, ends_of, write_study

from peft_vit.errors import UserError
from peft_vit.records import ADAPTER_FILE, RECORD_FILE, STUDY_FILE, checkpoint_folders
from peft_vit.records.progress import PROGRESS_FILE

PROMISE = "disk full: stopped in one line, identical with room again"
PAGE = 4096
_DISK = 16 << 20
_FIRST = 3  # pages of lock, study.json and progress.json
SCENARIOS = ("begin", "checkpoints", "results")


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

    def said(self, log: str) -> list[str]:
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
    ballast = fill(disk, _room(scenario, most[checkpoints], rng))
    code = study.start(out, log, checkpoints=checkpoints).finish()
    if code == 0:
        return None, difference(out, expected)
    said = study.said(log)
    what = _what(said)
    fault = None
    if code != 2 or len(said) != 1 or not said[0].startswith("error: ") or "No space left on device" not in said[0]:
        fault = f"it ended with {code} and said {said}"
    fault = fault or unreadable(out / NAME / study.run)
    ballast.unlink()
    again = study.start(out, f"again-{log}", checkpoints=checkpoints).finish()
    if again != 0:
        return what, fault or f"with room again it ended with {again} and said {study.said(f'again-{log}')}"
    return what, fault or difference(out, expected)


def _room(scenario: str, most: int, rng: random.Random) -> int:
    """Return for how many pages there is room: lock, study.json and progress take one each, what follows the rest."""
    if scenario == "begin":
        return rng.randrange(_FIRST + 1)
    if scenario == "results":
        return most - (rng.randint(1, 4) if rng.random() < 0.5 else rng.randint(5, most - _FIRST))
    return rng.randrange(_FIRST, most)


def _what(said: list[str]) -> str:
    """Return what could not be written, as the error says it."""
    line = said[-1] if said else ""
    for sign, what in (
        (".checkpoint-", "a checkpoint"),
        (PROGRESS_FILE, "a run's progress"),
        (STUDY_FILE, "study.json"),
        (ADAPTER_FILE, "the adapter"),
        (RECORD_FILE, "the record"),
    ):
        if sign in line:
            return what
    return "the study's folder or lock"


def unreadable(run: Path) -> str | None:
    """Return why a checkpoint can't be read; None if all can."""
    from peft_vit.training.checkpoint import read_checkpoint

    for folder in checkpoint_folders(run).values():
        try:
            read_checkpoint(folder)
        except UserError as error:
            return f"a checkpoint can't be read: {error}"
    return None


def torture(folder: Path, trials: int, seed: int, methods: Sequence[str], tally: Tally) -> None:
    """Fill disks so often; what could not be written is the kind of a trial."""
    studies = {method: Study(folder / method, method, seed=seed % 3) for method in methods}
    known = {method: study.measure() for method, study in studies.items()}
    for number in itertools.count():
        if tally.trials.total() >= trials:
            return
        rng = random.Random(f"{seed}:{number}")
        method, scenario = methods[number % len(methods)], SCENARIOS[number % len(SCENARIOS)]
        with small_disk(folder / f"disk-{number}") as disk:
            what, fault = trial(studies[method], disk, scenario, *known[method], rng)
        what = what or "everything fitted"
        said = f"{method}, {scenario}, --seed {seed}, {number}: {what}; {fault or 'sound'}"
        print(said, flush=True)
        if fault or what != "everything fitted":
            tally.add(what, said if fault else None)


def main() -> None:
    """Run the command line."""
    parser = harness.options(__doc__)
    parser.add_argument("--trials", type=int, default=60, help="commands that ran out of room")
    parser.add_argument("--methods", nargs="+", default=["lora", "adalora", "qa_lora"], choices=METHODS)
    asked = parser.parse_args()
    with harness.torture(PROMISE, dry=asked.dry) as (folder, tally):
        torture(folder, asked.trials, asked.seed, asked.methods, tally)


if __name__ == "__main__":
    main()
