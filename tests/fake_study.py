"""A study whose runs take milliseconds, so that its driver can be killed hundreds of times. No torch."""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from small_methods import study_mapping

from peft_vit.core.config import StudyConfig, study_from_mapping
from peft_vit.core.records import Failure, RunRecord, RunSpec, StudyFile
from peft_vit.runs.executors import Event, RunEnded, RunInterrupted, RunStarted, StudyEvent
from peft_vit.runs.records.progress import study_lock
from peft_vit.runs.records.storage import (
    ADAPTER_FILE,
    RECORD_FILE,
    STUDY_FILE,
    read_record,
    read_study_file,
    run_folder,
)
from peft_vit.runs.scheduling.scheduler import drive

STARTED_AT = "2030-01-01T00:00:00+00:00"


def fake_config(
    experiments: Iterable[str] = ("a", "b"), seeds: Sequence[int] = (0, 1, 2), **settings: Any
) -> StudyConfig:
    """Make a study; keyword arguments are further settings of it."""
    training = {"epochs": 2, "learning_rate": 1e-3}
    sections = [{"name": name, "method": "lora", "lora": {"rank": 2}, "training": training} for name in experiments]
    data = {"dataset": "digits", "image_size": 32, "validation_images": 20, "test_images": 20}
    mapping = study_mapping(
        sections, seeds, **{"name": "fake", "threads": 2, "device": "auto", "data": data, **settings}
    )
    return study_from_mapping(mapping, file=Path("fake.yaml"))


@dataclass(frozen=True)
class FakeRun:
    """Stands for a PlannedRun."""

    spec: RunSpec
    done: bool
    total_steps: int = 10
    estimate: Any = None


@dataclass(frozen=True)
class FakePlan:
    """Stands for a Plan."""

    study: StudyConfig
    runs: tuple[FakeRun, ...]
    file: Path = Path("fake.yaml")
    data_sha256: str = "d" * 64
    part: bool = False
    existing: StudyFile | None = None

    @property
    def pending(self) -> tuple[FakeRun, ...]:
        return tuple(run for run in self.runs if not run.done)


def fake_plan(study: StudyConfig, results_dir: Path, **settings: Any) -> FakePlan:
    """Plan all runs of a study; those with a record of success and an adapter are done."""
    runs = []
    own = study.model_dump(include={"backbone", "data", "device", "precision", "threads"})
    for experiment in study.experiments:
        for seed in study.seeds:
            spec = RunSpec(study=study.name, seed=seed, experiment=experiment, **own)
            folder = run_folder(results_dir, spec)
            written = (folder / RECORD_FILE).exists() and read_record(folder / RECORD_FILE).status == "done"
            runs.append(FakeRun(spec, done=written and (folder / ADAPTER_FILE).exists()))
    return FakePlan(study, tuple(runs), existing=read_study_file(results_dir / study.name), **settings)


def fake_adapter(spec: RunSpec) -> bytes:
    return f"adapter of {spec.digest()}".encode()


def done_record(spec: RunSpec) -> RunRecord:
    return RunRecord(
        spec=spec,
        spec_digest=spec.digest(),
        status="done",
        started_at=STARTED_AT,
        seconds=1.0,
        adapter_sha256=hashlib.sha256(fake_adapter(spec)).hexdigest(),
    )


def failed_record(spec: RunSpec, failure: Failure) -> RunRecord:
    ended = {"status": "failed", "failure": failure, "error": f"it was {failure}", "traceback": "Traceback ..."}
    return done_record(spec).model_copy(update={**ended, "adapter_sha256": None})


@dataclass
class FakeExecutor:
    """Carries runs out one after the other; `outcomes` are the failures of a run's first attempts, by its name.

    An attempt takes `steps` calls of `next_event` between its start and its end, each of which lasts `step_s` and
    leaves a checkpoint where `checkpoints_in` is given. `ending` may change what is told of an attempt's end.
    """

    outcomes: dict[str, list[Failure]] = field(default_factory=dict)
    ending: Callable[[RunEnded], Event] = lambda event: event
    steps: int = 1
    step_s: float = 0.0
    checkpoints_in: Path | None = None
    submitted: list[str] = field(default_factory=list)
    closed: bool = False
    stopped: bool = False
    _queue: deque[FakeRun] = field(default_factory=deque)
    _running: FakeRun | None = None
    _step: int = 0

    def submit(self, run: Any) -> None:
        self.submitted.append(run.spec.name)
        self._queue.append(run)

    def next_event(self, timeout_s: float) -> Event | None:
        run: Any = self._running
        if run is None:
            if not self._queue:
                return None
            run = self._running = self._queue.popleft()
            self._step = 0
            return RunStarted(run, f"process {os.getpid()}")
        if self.stopped:
            self._running = None
            return RunInterrupted(run, self._step)
        if self._step < self.steps:
            time.sleep(self.step_s)
            self._step += 1
            if self.checkpoints_in is not None:
                (run_folder(self.checkpoints_in, run.spec) / f"checkpoint-{self._step}").mkdir(
                    parents=True, exist_ok=True
                )
            return None
        self._running = None
        if failures := self.outcomes.get(run.spec.name):
            return self.ending(RunEnded(run, failed_record(run.spec, failures.pop(0)), None))
        return self.ending(RunEnded(run, done_record(run.spec), fake_adapter(run.spec)))

    def stop(self) -> None:
        self.stopped = True
        self._queue.clear()

    def close(self) -> None:
        self.closed = True


def fake_drive(
    study: StudyConfig,
    results_dir: Path,
    executor: Any = None,
    on_event: Callable[[StudyEvent], None] = lambda event: None,
    *,
    skip_failed: bool = False,
    **settings: Any,
) -> dict[str, str]:
    """Do what the command does: lock, plan, drive."""
    with study_lock(results_dir / study.name) as lock:
        plan: Any = fake_plan(study, results_dir, **settings)
        return drive(plan, lock, lambda: executor or FakeExecutor(), on_event, skip_failed=skip_failed)


def check_complete(study: StudyConfig, results_dir: Path) -> None:
    """Check that every run is done, and that its files are what they should be, with nothing beside them."""
    runs = fake_plan(study, results_dir).runs
    folder = results_dir / study.name
    # Whoever is killed while it writes study.json may leave a hidden file.
    names = {path.name for path in folder.iterdir() if not path.name.startswith(f".{STUDY_FILE}.")}
    assert names == {STUDY_FILE, *(run.spec.experiment.name for run in runs)}
    assert {path.parent.relative_to(folder).as_posix() for path in folder.glob(f"*/*/{RECORD_FILE}")} == {
        run.spec.name for run in runs
    }
    for run in runs:
        folder = run_folder(results_dir, run.spec)
        record = read_record(folder / RECORD_FILE)
        assert record.model_copy(update={"attempts": 1}) == done_record(run.spec)
        assert (folder / ADAPTER_FILE).read_bytes() == fake_adapter(run.spec)
        assert sorted(path.name for path in folder.iterdir()) == [ADAPTER_FILE, RECORD_FILE]
