"""SIGKILL studies at random moments, let the same command go on, and compare with undisturbed ones, bit for bit.

    .venv/bin/python tests/torture/killed_runs.py --fresh 40 --forked 160      as `make torture` does
    .venv/bin/python tests/torture/killed_runs.py --forked 10 --seed 7         these again, as far as time is the same

What is killed, each counted for itself:

- a fresh command: `peft-vit run` in an interpreter of its own, with its whole process group or its worker alone, which
  the driver then replaces;
- a forked command: the same code in a process forked after torch was imported (see `commands`); its whole group, its
  driver alone (whose worker must end with it), or its worker alone.

A study is of one method, one seed or two (then with two workers), writes checkpoints after every step or after every
twentieth of a second, and is killed one to four times, or three to five if it is fresh. A kill counts if it met a
living process while a run was under way: begun and not ended, as its progress.json says. It has passed if the study
then ends with each run done, and with the metrics, histories, adapter bytes and optimiser hash of an undisturbed study;
if no run that was done was done again; if records count the attempts; and if every attempt went on from the newest
checkpoint that was there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import harness
from commands import Command, run_forked, run_fresh, undisturbed
from tiny_studies import METHODS, NAME, STEPS, End, difference, done_records, newest_step, write_study

from peft_vit.runs.records.progress import read_run_files
from peft_vit.runs.records.scan import read_records

SEEDS = (0, 1, 2)
START, STEP, CHECKPOINT, LAST, RESULTS = "at the start", "in a step", "in a checkpoint", "after the last", "in results"
_FILE_S = 0.004  # about what a small file takes to be written
_UNFINISHED = (".checkpoint-",)
_RESULTS = ("adapter.", ".adapter.", "record.", ".record.")


@dataclass(frozen=True)
class Way:
    """How a command is started, and which of its processes is killed."""

    fresh: bool
    victim: str  # group, driver or worker

    def __str__(self) -> str:
        who = {"group": "whole process group", "driver": "driver alone", "worker": "worker alone"}[self.victim]
        return f"{'fresh' if self.fresh else 'forked'} command, {who}"

    def start(self, config: Path, life: int, workers: int) -> Command:
        """Start the command once more."""
        out, log = config.parent / "out", config.parent / f"life-{life}"
        arguments = [str(config), "--output", str(out), "--workers", str(workers)]
        return (run_fresh if self.fresh else run_forked)(arguments, log.with_suffix(".txt"), log.with_suffix(".events"))


FRESH = (Way(True, "group"), Way(True, "worker"))
FORKED = (Way(False, "group"), Way(False, "driver"), Way(False, "worker"))


def runs_of(out: Path) -> list[str]:
    """Return the runs that have a folder."""
    return [path.relative_to(out / NAME).as_posix() for path in (out / NAME).glob("*/seed_*")]


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
        self._steps = {run: self._step(run) for run in runs_of(out)}
        self._old = self._files(_UNFINISHED + _RESULTS)

    def wait(self, command: Command, moment: str) -> bool:
        """Wait for a moment while a run is under way, and a random time longer; tell whether the command still runs."""
        sign, longest_s = {
            START: (lambda: True, self._run_s / 2),
            STEP: (lambda: any(self._step(run) > self._steps.get(run, 0) for run in runs_of(self._out)), self._run_s),
            CHECKPOINT: (self._nth_checkpoint(), _FILE_S),
            LAST: (lambda: any(self._step(run) == STEPS for run in self.under_way()), self._run_s / 10),
            RESULTS: (lambda: bool(self._files(_RESULTS) - self._old), 4 * _FILE_S),
        }[moment]
        if command.wait(lambda: bool(self.under_way()) and sign()):
            time.sleep(self._rng.uniform(0, longest_s))
        return not command.ended()

    def under_way(self) -> list[str]:
        """Return the runs that have begun since then and have not ended, as their progress.json says."""
        attempts = {run: read_run_files(self._out / NAME, run).attempt for run in runs_of(self._out)}
        return [
            run
            for run, attempt in attempts.items()
            if attempt is not None and attempt.state == "running" and attempt.number > self._attempts.get(run, 0)
        ]

    def _files(self, beginnings: tuple[str, ...]) -> set[tuple[str, str, int]]:
        """Return files by run, name and inode: what is written again has another one."""
        files = set()
        for run in runs_of(self._out):
            with os.scandir(self._out / NAME / run) as entries:
                files |= {(run, entry.name, entry.inode()) for entry in entries if entry.name.startswith(beginnings)}
        return files

    def _step(self, run: str) -> int:
        return newest_step(self._out / NAME / run)

    def _nth_checkpoint(self) -> Callable[[], bool]:
        seen: set[tuple[str, str, int]] = set()
        number = self._rng.randint(1, 6)

        def sign() -> bool:
            seen.update(self._files(_UNFINISHED) - self._old)
            return len(seen) >= number

        return sign


class Study:
    """A study that is killed several times and then let finish."""

    def __init__(
        self,
        folder: Path,
        way: Way,
        method: str,
        seeds: tuple[int, ...],
        undisturbed: dict[str, End],
        rng: random.Random,
    ) -> None:
        self.way = way
        self.method = method
        self.seeds = seeds
        self.every_s = rng.choice((0, 0, 0.05))
        self.config = write_study(
            folder, {method: METHODS[method]}, seeds, retries=100, checkpoint_every_s=self.every_s
        )
        self.out = folder / "out"
        self.kills: list[dict[str, int]] = []  # that met a run under way: the newest checkpoint by run
        self.beside = 0  # kills that met no run under way
        self.moments: list[str] = []
        self.resumed = 0  # attempts that went on from a checkpoint
        self._expected = {f"{method}/seed_{seed}": undisturbed[f"{method}/seed_{seed}"] for seed in seeds}
        self._rng = rng
        self._attempts: dict[str, int] = {}  # starts of each run, when what is killed next started
        self._starts: Counter[str] = Counter()  # starts of each run
        self._strayed: str | None = None  # an attempt that went on from elsewhere than from the newest checkpoint

    def disturb(self, kills: int, run_s: float) -> str | None:
        """Kill it so often, let it finish, and return what is wrong with it then."""
        life = 0
        while True:
            before = {run: newest_step(self.out / NAME / run) for run in runs_of(self.out)}
            self._attempts = {run: read_run_files(self.out / NAME, run).attempts for run in before}
            done = done_records(self.out, before)
            command = self.way.start(self.config, life, len(self.seeds))
            if self.way.victim == "worker":
                self._kill_workers(command, kills, run_s)
            elif (left := kills - len(self.kills) - self.beside) > 0 and self._kill_command(command, left, run_s):
                self._check_steps(life, before, [])
                self._check_done(life, done)
                life += 1
                continue
            code = command.finish()
            self._check_steps(life, before, self.kills if self.way.victim == "worker" else [])
            self._check_done(life, done)
            if code != 0:
                return f"the command ended with {code}: {(self.config.parent / f'life-{life}.txt').read_text()[-1500:]}"
            return self._strayed or difference(self.out, self._expected) or self._miscounted()

    def _moment(self, kills_left: int) -> str:
        moments = [START, STEP, STEP, CHECKPOINT] + ([] if self.kills else [START, START])
        if self.every_s == 0:
            moments += [CHECKPOINT, LAST, LAST]
        if self.way.victim != "worker":
            moments += [RESULTS, RESULTS]
        if self.way.fresh and kills_left > 1:  # its start took seconds: leave something of it
            moments = [START, CHECKPOINT]
        self.moments.append(self._rng.choice(moments))
        return self.moments[-1]

    def _kill_command(self, command: Command, kills_left: int, run_s: float) -> bool:
        """Kill the command at a random moment; tell whether it lived until then."""
        watched = Watched(self.out, self._rng, run_s, self._attempts)
        if not watched.wait(command, self._moment(kills_left)) or not command.kill(group=self.way.victim == "group"):
            return False
        if runs := watched.under_way():
            self.kills.append({run: newest_step(self.out / NAME / run) for run in runs})
        else:
            self.beside += 1
        return True

    def _kill_workers(self, command: Command, kills: int, run_s: float) -> None:
        """Kill one worker after the other, for as long as the command lives."""
        for number in range(1, kills + 1):
            watched = Watched(self.out, self._rng, run_s, self._attempts)
            if not watched.wait(command, self._moment(kills + 1 - number)) or not (runs := watched.under_way()):
                break
            attempt = read_run_files(self.out / NAME, runs[0]).attempt
            if attempt is None:  # it has just ended
                break
            assert attempt.worker is not None
            with suppress(ProcessLookupError):  # the command has just ended
                os.kill(int(attempt.worker.split()[1]), signal.SIGKILL)
            kill = {run: newest_step(self.out / NAME / run) for run in runs}
            if not command.wait(partial(self._has_failed, runs[0], attempt.number)):
                self.beside += 1  # it had nothing to do any more
                break
            self._attempts = {runs[0]: attempt.number}
            self.kills.append(kill)

    def _has_failed(self, run: str, number: int) -> bool:
        """Tell whether an attempt at a run has failed, which is tried again then."""
        attempt = read_run_files(self.out / NAME, run).attempt
        return attempt is not None and (attempt.number > number or attempt.state == "failed")

    def _check_steps(self, life: int, before: dict[str, int], later: list[dict[str, int]]) -> None:
        """Compare the first step that each attempt of a command told with the newest checkpoint at its start."""
        file = self.config.parent / f"life-{life}.events"
        attempts: dict[str, list[int | None]] = {}
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # the last one, cut short
            name = event["run"]
            if event["event"] == "RunStarted":
                attempts.setdefault(name, []).append(None)
                self._starts[name] += 1
            elif event["event"] == "RunProgress" and attempts[name][-1] is None:
                attempts[name][-1] = event["step"]
        for name, firsts in attempts.items():
            starts = [before.get(name, 0), *(left[name] for left in later)]
            for start, first in zip(starts, firsts, strict=False):
                self.resumed += start > 0
                later_one = self.way.victim == "driver"  # its worker may have written one more as it died
                if first is not None and not start + 1 <= first <= start + 1 + later_one:
                    self._strayed = (
                        f"{name}, life {life}: step {first} came first, the newest checkpoint was of {start}"
                    )

    def _check_done(self, life: int, before: Mapping[str, tuple[int, int]]) -> None:
        """See that a command has left alone what was done before it."""
        done = done_records(self.out, before)
        if changed := sorted(run for run, record in before.items() if done.get(run) != record):
            self._strayed = f"life {life}: {changed} were done, and their results are others now"

    def _miscounted(self) -> str | None:
        """Return whose record does not count its attempts; a killed command may not have told of its last one."""
        for record in read_records(self.out):
            starts = self._starts[record.spec.name]
            if not starts <= record.attempts <= starts + len(self.kills) + self.beside:
                return f"{record.spec.name}: {record.attempts} attempts in its record, {starts} were told"
        return None


def torture(folder: Path, options: argparse.Namespace, tally: harness.Tally) -> None:
    """Kill studies, forked ones and then fresh ones, until so many kills have met a run under way."""
    known: dict[str, tuple[dict[str, End], float]] = {}  # of each method, and the seconds of a run
    for method in options.methods:
        config = write_study(folder / method, {method: METHODS[method]}, SEEDS, checkpoint_every_s=3600)
        ends = undisturbed(config)
        seconds = statistics.median(record.seconds for record in read_records(config.parent / "out"))
        known[method] = ends, seconds
    beside = resumed = 0
    for ways, kills in ((FORKED, options.forked), (FRESH, options.fresh)):
        met = 0
        for number in itertools.count():
            if met >= kills:
                break
            rng = random.Random(f"{options.seed}:{number}")
            way, method = rng.choice(ways), rng.choice(options.methods)
            two = way.victim != "worker" and rng.random() < (0.25 if way.fresh else 0.5)
            seeds = tuple(sorted(rng.sample(SEEDS, 1 + two)))
            place = folder / f"{way}-{number}".replace(" ", "-").replace(",", "")
            expected, run_s = known[method]
            study = Study(place, way, method, seeds, expected, rng)
            fault = study.disturb(rng.randint(3, 5) if way.fresh else rng.randint(1, 4), run_s)
            settings = f"{way}, {method}, seeds {seeds}, every {study.every_s} s, {study.moments}"
            trial = f"{settings}, --seed {options.seed}, {number}, {len(study.kills)} kills"
            print(f"{trial}: {fault or 'equal'}", flush=True)
            for _ in study.kills:
                tally.add(str(way), trial, fault, quiet=True)
            met += len(study.kills)
            beside += study.beside
            resumed += study.resumed
            if fault is None:
                shutil.rmtree(place)
    print(f"{resumed} attempts went on from a checkpoint; {beside} more kills met no run under way")


if __name__ == "__main__":
    kills = {"type": int, "default": 0, "metavar": "KILLS"}
    options = {
        "--fresh": kills | {"help": "of fresh commands"},
        "--forked": kills | {"help": "of forked commands"},
        "--methods": {"nargs": "+", "default": list(METHODS), "choices": METHODS},
    }
    harness.main(__doc__, torture, options)
