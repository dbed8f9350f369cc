"""Executors at work: what they tell, how they end, and drivers that are killed while they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from small_methods import study_mapping

from peft_vit.runs.executors import Executor, RunProgress
from peft_vit.runs.planned import PlannedRun

PATIENCE_S = 600  # for what takes seconds on an idle machine

_LONG = study_mapping(
    [{"name": "whole", "method": "full", "training": {"epochs": 100_000, "learning_rate": 1e-3}}], name="long"
)
_DRIVER = """
import sys
from pathlib import Path
from peft_vit.core.config import load_study
from peft_vit.runs.scheduling.plan import plan_study
from peft_vit.runs.executors import RunStarted

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    {executor}
    for run in plan_study(load_study(folder / "long.yaml"), folder, file=folder / "long.yaml").runs:
        executor.submit(run)
    while True:
        event = executor.next_event(1)
        if isinstance(event, RunStarted):
            print(event.worker, flush=True)
"""


@contextmanager
def at_work(executor: Any, *runs: PlannedRun) -> Iterator[Any]:
    """Hand an executor its runs, and close it in the end."""
    try:
        for run in runs:
            executor.submit(run)
        yield executor
    finally:
        executor.close()


def events_of(executor: Executor, until: Callable[[list[Any]], object]) -> list[Any]:
    """Return what happens until the condition holds of all that has happened."""
    events: list[Any] = []
    deadline = time.monotonic() + PATIENCE_S
    while not until(events):
        assert time.monotonic() < deadline, [event for event in events if not isinstance(event, RunProgress)]
        event = executor.next_event(0.2)
        events += [] if event is None else [event]
    return events


def of(events: list[Any], kind: type[Any], name: str | None = None) -> list[Any]:
    """Return the events of a kind, of one experiment or of all."""
    return [event for event in events if isinstance(event, kind) and name in (None, event.run.spec.experiment.name)]


def alive(pid: int) -> bool:
    """Tell whether a process is there, and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def left_by_killed_driver(folder: Path, executor: str) -> tuple[int, list[int]]:
    """Kill a process while its run is under way; return how many processes it had started, and those that stay.

    Args:
        folder: to work in.
        executor: code that makes one, on one line.
    """
    (folder / "long.yaml").write_text(json.dumps(_LONG))  # which is YAML too
    (folder / "driver.py").write_text(_DRIVER.replace("{executor}", executor))
    folders = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, str(folder / "driver.py"), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": folders},
    ) as driver:
        assert driver.stdout is not None
        worker = int(driver.stdout.readline().split()[1])
        assert alive(worker)
        children = [process.pid for process in psutil.Process(driver.pid).children(recursive=True)]
        driver.kill()
    deadline = time.monotonic() + PATIENCE_S
    while any(map(alive, [worker, *children])) and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(children), [pid for pid in (worker, *children) if alive(pid)]
