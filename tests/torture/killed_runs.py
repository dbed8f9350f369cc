"""SIGKILL studies at random moments, let the same command go on, and compare with undisturbed ones, bit for bit.

    .venv/bin/python tests/torture/killed_runs.py --kills 200      as `make torture` does

A study is of one method and one seed, or of two seeds with two workers, and writes checkpoints after every step or
after every twentieth of a second. `peft-vit run` is started one to four times and killed while a run is under way, as
its progress.json says: its whole process group, its driver alone (whose workers must end with it), or a worker alone,
which the driver replaces. It has passed if the study then ends with each run done, and with the metrics, histories,
adapter bytes and optimiser hash of an undisturbed study, and if no run that was done was done again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import harness
from tiny_studies import METHODS, NAME, difference, done_records, ends_of, write_study

from peft_vit.runs.records.progress import read_run_files
from peft_vit.runs.records.scan import read_records

SEEDS = (0, 1, 2)
VICTIMS = ("whole process group", "driver alone", "worker alone")
PATIENCE_S = 1800.0  # for what takes seconds on an idle machine


def start(config: Path, workers: int) -> subprocess.Popen[bytes]:
    """Start the command, as a leader of its own session; it writes `out` and `log.txt` beside the file."""
    command = [str(Path(sys.executable).with_name("peft-vit")), "run", str(config), "--workers", str(workers)]
    with (config.parent / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [*command, "--output", str(config.parent / "out")], stdout=log, stderr=log, start_new_session=True
        )


def workers_under_way(out: Path, pids: set[int]) -> list[int]:
    """Return the processes that do a run now, as its progress.json says, but for those that are known."""
    found = []
    for folder in (out / NAME).glob("*/seed_*"):
        attempt = read_run_files(out / NAME, folder.relative_to(out / NAME).as_posix()).attempt
        if attempt is not None and attempt.state == "running" and attempt.worker is not None:
            found.append(int(attempt.worker.split()[1]))
    return [pid for pid in found if pid not in pids]


def disturb(config: Path, victim: str, workers: int, kills: int, run_s: float, rng: random.Random) -> tuple[int, str]:
    """Kill a study so often, let it finish; return how many kills have met a run under way, and what is wrong then."""
    out, met, known = config.parent / "out", 0, set[int]()
    runs = [f"{method}/seed_{seed}" for method in METHODS for seed in SEEDS]
    for life in range(kills + 1):
        done = done_records(out, runs) if out.exists() else {}
        command = start(config, workers)
        deadline, found = time.monotonic() + PATIENCE_S, list[int]()
        while life < kills and not found and command.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
            found = workers_under_way(out, known)
        time.sleep(rng.uniform(0, run_s) if found else 0)
        known |= set(found)
        if found and command.poll() is None:
            met += 1
            with suppress(ProcessLookupError):  # a worker whose run has just ended
                if victim == VICTIMS[0]:
                    os.killpg(command.pid, signal.SIGKILL)
                else:
                    os.kill(command.pid if victim == VICTIMS[1] else found[0], signal.SIGKILL)
        code = command.wait(PATIENCE_S)
        now = done_records(out, runs)
        if changed := sorted(run for run, record in done.items() if now.get(run) != record):
            return met, f"life {life}: {changed} were done, and their results are others now"
    return met, "" if code == 0 else f"the command ended with {code}: {(config.parent / 'log.txt').read_text()[-1500:]}"


def torture(folder: Path, options: argparse.Namespace, tally: harness.Tally) -> None:
    """Kill studies until so many kills have met a run under way."""
    undisturbed = {}
    for method in options.methods:
        config = write_study(folder / method, {method: METHODS[method]}, SEEDS, checkpoint_every_s=3600)
        if code := start(config, 1).wait():
            raise RuntimeError(f"the undisturbed study ended with {code}: {(folder / method / 'log.txt').read_text()}")
        undisturbed[method] = ends_of(config.parent / "out")
    run_s = max(record.seconds for method in options.methods for record in read_records(folder / method / "out"))
    left = options.kills
    for number in itertools.count():
        if left <= 0:
            break
        rng = random.Random(f"{options.seed}:{number}")
        victim, method = rng.choice(VICTIMS), rng.choice(options.methods)
        seeds, every_s = sorted(rng.sample(SEEDS, rng.choice((1, 2)))), rng.choice((0, 0.05))
        place = folder / str(number)
        config = write_study(place, {method: METHODS[method]}, seeds, retries=100, checkpoint_every_s=every_s)
        met, fault = disturb(config, victim, len(seeds), rng.randint(1, 4), run_s, rng)
        expected = {f"{method}/seed_{seed}": undisturbed[method][f"{method}/seed_{seed}"] for seed in seeds}
        fault = fault or difference(place / "out", expected) or ""
        trial = f"{victim}, {method}, seeds {seeds}, every {every_s} s, --seed {options.seed}, {number}, {met} kills"
        print(f"{trial}: {fault or 'equal'}", flush=True)
        for _ in range(met):
            tally.add(victim, trial, fault or None, quiet=True)
        left -= met
        if not fault:
            shutil.rmtree(place)


if __name__ == "__main__":
    options = {
        "--kills": {"type": int, "default": 20},
        "--methods": {"nargs": "+", "default": list(METHODS), "choices": METHODS},
    }
    harness.main(__doc__, torture, options)
