"""When to kill a study: what an attempt leaves on disk tells how far it is, and where a kill has met it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from commands import Command
from tiny_studies import NAME, STEPS, newest_step

from peft_vit.records.progress import look_at

START, STEP, CHECKPOINT, LAST, RESULTS = "at the start", "in a step", "in a checkpoint", "after the last", "in results"
_FILE_S = 0.004  # about what a small file takes to be written
_UNFINISHED = (".checkpoint-",)
_RESULTS = ("adapter.", ".adapter.", "record.", ".record.")


class Watched:
    """A study's folder from one moment on: only what has changed since then counts.

    Args:
        out: the results directory.
        rng: draws the moments.
        run_s: seconds of a run that nothing happens to.
        attempts: starts of each run, when the moment was.
    """

    def __init__(self, out: Path, rng: random.Random, run_s: float, attempts: Mapping[str, int]) -> None:
        self._out = out
        self._rng = rng
        self._run_s = run_s
        self._attempts = attempts
        self._steps = {run: newest_step(out / NAME / run) for run in runs_of(out)}
        self._old = self._files(_UNFINISHED + _RESULTS)

    def wait(self, command: Command, moment: str) -> bool:
        """Wait for a moment while a run is under way, and a random time longer; tell whether the command still runs."""
        sign, longest_s = {
            START: (lambda: True, self._run_s / 2),
            STEP: (self._stepped, self._run_s),
            CHECKPOINT: (self._nth_checkpoint(), _FILE_S),
            LAST: (self._last, self._run_s / 10),
            RESULTS: (lambda: self._has_new(_RESULTS), 4 * _FILE_S),
        }[moment]
        if command.wait(lambda: bool(self.under_way()) and sign()):
            time.sleep(self._rng.uniform(0, longest_s))
        return not command.ended()

    def under_way(self) -> list[str]:
        """Return the runs that have begun since then and have not ended, as their progress.json says."""
        attempts = {run: look_at(self._out / NAME, run).attempt for run in runs_of(self._out)}
        return [
            run
            for run, attempt in attempts.items()
            if attempt is not None and attempt.state == "running" and attempt.number > self._attempts.get(run, 0)
        ]

    def place(self, run: str) -> str:
        """Return where a kill has met a run that is under way."""
        if self._has_new(_RESULTS, run):
            return "while the adapter and the record are written"
        if self._has_new(_UNFINISHED, run):
            return "while a checkpoint is written"
        step = newest_step(self._out / NAME / run)
        if step == STEPS:
            return "between the last step and the record"
        return "between two checkpoints" if step > self._steps.get(run, 0) else "before an attempt's first checkpoint"

    def _files(self, beginnings: tuple[str, ...]) -> set[tuple[str, str, int]]:
        """Return files by run, name and inode: what is written again has another one."""
        found = set()
        for run in runs_of(self._out):
            with os.scandir(self._out / NAME / run) as entries:
                found |= {(run, entry.name, entry.inode()) for entry in entries if entry.name.startswith(beginnings)}
        return found

    def _has_new(self, beginnings: tuple[str, ...], run: str | None = None) -> bool:
        return any(run in (None, name) for name, *_ in self._files(beginnings) - self._old)

    def _stepped(self) -> bool:
        return any(newest_step(self._out / NAME / run) > self._steps.get(run, 0) for run in runs_of(self._out))

    def _nth_checkpoint(self) -> Callable[[], bool]:
        seen: set[tuple[str, str, int]] = set()
        number = self._rng.randint(1, 6)

        def sign() -> bool:
            seen.update(self._files(_UNFINISHED) - self._old)
            return len(seen) >= number

        return sign

    def _last(self) -> bool:
        return any(newest_step(self._out / NAME / run) == STEPS for run in self.under_way())


def runs_of(out: Path) -> list[str]:
    """Return the runs that have a folder."""
    return [path.relative_to(out / NAME).as_posix() for path in (out / NAME).glob("*/seed_*")]
