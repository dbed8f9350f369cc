"""A deadline is held by what is started, learns from what has ended, and stops what still runs; the clock is a fake."""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from fake_study import done_record, failed_record, fake_adapter, fake_config, fake_plan

from peft_vit.cli.model_commands import EXAMPLES
from peft_vit.core.config import load_study
from peft_vit.runs.costs.estimate import RunCost
from peft_vit.runs.costs.time_limit import Limit
from peft_vit.runs.executors import Event, Notice, RunEnded, RunInterrupted, RunStarted
from peft_vit.runs.records.progress import read_run_files, study_lock, study_status
from peft_vit.runs.scheduling.deadline import Deadline
from peft_vit.runs.scheduling.scheduler import drive as drive_study

pytestmark = pytest.mark.part("runner")


@dataclass
class Timed:
    """Carries runs out on its own clock: each takes the seconds that `seconds` says of its experiment."""

    seconds: dict[str, float]
    workers: int = 1
    now: float = 0.0
    deaf: bool = False  # to a request to stop
    failing: str = ""  # an experiment
    started: list[str] = field(default_factory=list)
    closed: bool = False
    _waiting: deque[Any] = field(default_factory=deque)
    _running: dict[str, tuple[Any, float]] = field(default_factory=dict)
    _stopped: bool = False

    def clock(self) -> float:
        return self.now

    def submit(self, run: Any) -> None:
        self._waiting.append(run)

    def next_event(self, timeout_s: float) -> Event | None:
        if self._stopped and self._running and not self.deaf:
            _, (run, _) = self._running.popitem()
            return RunInterrupted(run, 5)
        if self._waiting and len(self._running) < self.workers:
            run = self._waiting.popleft()
            self._running[run.spec.name] = run, self.now + self.seconds[run.spec.experiment.name]
            self.started.append(run.spec.name)
            return RunStarted(run, "worker")
        name, (run, ends) = min(self._running.items(), key=lambda running: running[1][1], default=("", (None, 0.0)))
        if run is None or ends > self.now + timeout_s:
            self.now += timeout_s
            return None
        self.now = max(self.now, ends)
        del self._running[name]
        if run.spec.experiment.name == self.failing:
            return RunEnded(run, failed_record(run.spec, "error"), None)
        record = done_record(run.spec).model_copy(update={"seconds": self.seconds[run.spec.experiment.name]})
        return RunEnded(run, record, fake_adapter(run.spec))

    def stop(self) -> None:
        self._stopped = True
        self._waiting.clear()

    def close(self) -> None:
        self.closed = True


def drive(out, config, planned_s, executor, over_at, kind="local") -> list[str]:
    """Drive a study, seed by seed, within a time; return what a person was told."""
    events: list[Any] = []
    plan = fake_plan(config, out)
    runs = sorted(plan.runs, key=lambda run: run.spec.seed)
    estimates = [RunCost(planned_s[run.spec.experiment.name], 0, "estimate") for run in runs]
    plan = replace(plan, runs=tuple(replace(run, estimate=own) for run, own in zip(runs, estimates, strict=True)))
    minutes = min(over_at / 57, (over_at + 10) / 60)
    deadline = Deadline(plan, out, Limit(minutes, 0.0, executor.clock), kind)
    with study_lock(out / config.name) as lock:
        drive_study(plan, lock, lambda: executor, events.append, deadline=deadline)
    return [event.text for event in events if isinstance(event, Notice)]


def states(out) -> dict[str, str]:
    return {run.run: run.state for run in study_status(out / "fake").runs}


def of(*experiments: str, workers: int = 1):
    return fake_config(experiments, range(8), execution={"workers": workers})


TWO = of("a", "b")
PROBED = TWO.model_copy(
    update={
        "experiments": (TWO.experiments[0].model_copy(update={"method": "linear", "lora": None}), TWO.experiments[1])
    }
)
AS_PLANNED = {"a": 10.0, "b": 20.0}


@pytest.mark.parametrize(
    ("study", "seconds", "over_at", "started", "options"),
    [
        # 30 s a seed: two seeds, then a third run of a, and no run of 20 s in the last 5
        (TWO, AS_PLANNED, 75, "a0 b0 a1 b1 a2", {}),
        # a shorter run fills what is left
        (TWO, AS_PLANNED, 45, "a0 b0 a1", {}),
        # twice as slow as planned: 35 s are enough for b by the plan, not by the pace
        (TWO, {"a": 20.0, "b": 40.0}, 55, "a0 a1", {}),
        # a probe's first run computes the features of all seeds: it says nothing of those that take steps
        (PROBED, {"a": 40.0, "b": 20.0}, 65, "a0 b0", {}),
        # a0 until 10, b0 until 20, a1 until 20, then two at a time again
        (of("a", "b", workers=2), AS_PLANNED, 35, "a0 b0 a1 a2 a3", {"workers": 2}),
        # on a cluster all that fits is handed over at once
        (TWO, AS_PLANNED, 15, "a0 a1 a2 a3 a4 a5 a6 a7", {"workers": 100, "kind": "ray"}),
    ],
)
def test_runs_start_seed_by_seed_and_none_that_would_not_end_in_time(
    tmp_path, study, seconds, over_at, started, options
) -> None:
    executor = Timed(seconds, workers=options.get("workers", 1))
    assert drive(tmp_path, study, AS_PLANNED, executor, over_at, options.get("kind", "local")) == []
    assert " ".join(run.replace("/seed_", "") for run in executor.started) == started
    assert executor.closed
    assert executor.now <= over_at
    assert {run for run, state in states(tmp_path).items() if state == "done"} == set(executor.started)
    assert set(states(tmp_path).values()) == {"done", "pending"}


def test_what_a_checkpoint_holds_is_not_counted_again(tmp_path) -> None:
    executor = Timed(AS_PLANNED)
    for run, step in (("b/seed_0", 6), ("b/seed_0", 2), ("a/seed_1", 0)):  # of 10
        (tmp_path / "fake" / run / f"checkpoint-{step}").mkdir(parents=True)
    drive(tmp_path, TWO, AS_PLANNED, executor, over_at=9)
    assert executor.started == ["b/seed_0"]  # 8 of 20 s; 10 s for a are too many


def test_a_later_call_goes_on_with_the_rest(tmp_path) -> None:
    drive(tmp_path, TWO, AS_PLANNED, Timed(AS_PLANNED), over_at=75)
    later = Timed(AS_PLANNED)
    drive(tmp_path, TWO, AS_PLANNED, later, over_at=1000)
    assert later.started[:3] == ["b/seed_2", "a/seed_3", "b/seed_3"]
    assert set(states(tmp_path).values()) == {"done"}


@pytest.mark.parametrize("deaf", [False, True])
def test_what_still_runs_at_the_deadline_is_stopped_but_not_waited_for(tmp_path, deaf) -> None:
    executor = Timed({"a": 10.0, "b": 1000.0}, deaf=deaf)
    told = drive(tmp_path, TWO, AS_PLANNED, executor, over_at=57)
    assert told == ["time is up: runs under way write a checkpoint, from which a later call continues"]
    assert executor.closed
    assert executor.now == pytest.approx(60 if deaf else 57, abs=0.5)
    attempt = read_run_files(tmp_path / "fake", "b/seed_0").attempt
    assert attempt is not None
    assert attempt.state == ("running" if deaf else "interrupted")
    assert states(tmp_path)["b/seed_0"] == "pending"


@pytest.mark.parametrize(
    ("study", "seconds", "over_at", "said"),
    [
        # 10 s until a process is there, then three times what was planned
        (TWO, {"a": 1000.0, "b": 20.0}, 57, "a/seed_0 was planned to take 10 s and takes more than 30 s here; all"),
        # those before it end as planned
        (of("a", "b", "c"), {"a": 10.0, "b": 20.0, "c": 1000.0}, 570, "c/seed_0 was planned to take 5 s and takes"),
        (TWO, {"a": 12.0, "b": 25.0}, 75, ""),  # a little slower
        (of("a"), {"a": 100.0}, 10_000, ""),  # ten times slower, and there is time for all
    ],
)
def test_that_runs_are_much_slower_than_planned_is_told_at_once_and_stops_none(
    tmp_path, study, seconds, over_at, said
) -> None:
    executor = Timed(seconds)
    told = drive(tmp_path, study, {**AS_PLANNED, "c": 5.0}, executor, over_at)
    assert sum(line.startswith("slower than planned: ") for line in told) == bool(said)
    if said:
        assert told[0].startswith(f"slower than planned: {said}")
        assert told[0].endswith(" are left")
        assert told[1:] == ["time is up: runs under way write a checkpoint, from which a later call continues"]


def test_what_all_runs_will_take_counts_those_under_way_and_those_that_wait(tmp_path) -> None:
    """At 70 s b0 may take 60 s more, as long as it has taken; 7 of a take 10 s, 7 of b 60 and what that is over 20."""
    (told,) = drive(tmp_path, TWO, AS_PLANNED, Timed({"a": 10.0, "b": 130.0}), over_at=155)
    said = "b/seed_0 was planned to take 20 s and takes more than 1.0 min here; all runs take about"
    assert pytest.approx(13.8, abs=0.05) == (60 + 7 * 10 + 7 * 100) / 60
    assert told == f"slower than planned: {said} 13.8 min more, and 1.4 min are left"


def test_if_no_run_can_end_in_time_the_first_is_begun_all_the_same(tmp_path) -> None:
    """Or calls without end would come no step further."""
    executor = Timed(AS_PLANNED)
    drive(tmp_path, TWO, AS_PLANNED, executor, over_at=5)
    assert executor.started == ["a/seed_0"]
    attempt = read_run_files(tmp_path / "fake", "a/seed_0").attempt
    assert attempt is not None
    assert attempt.state == "interrupted"


def test_failed_runs_teach_nothing_and_end(tmp_path) -> None:
    executor = Timed(AS_PLANNED, failing="a")
    drive(tmp_path, TWO, AS_PLANNED, executor, over_at=75)
    assert executor.started == ["a/seed_0", "b/seed_0", "a/seed_1", "b/seed_1", "a/seed_2"]
    assert states(tmp_path)["a/seed_0"] == "failed"


@pytest.mark.parametrize("planned", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("trained_s", "calls"), [(17.0, [10]), (45.0, [7, 10])], ids=["fast", "slow"])
def test_the_demo_completes_seed_after_seed_within_nine_minutes(tmp_path, trained_s, calls, planned) -> None:
    """With times that are made up, and plans that are wrong: all seeds in one call, or seven and then the others."""
    demo = load_study(EXAMPLES / "demo.yaml")
    names = [experiment.name for experiment in demo.experiments]
    config = fake_config(names, demo.seeds, execution={"workers": demo.execution.workers})
    seconds = {experiment.name: 3.0 if experiment.is_probe else trained_s for experiment in demo.experiments}
    for complete in calls:
        executor = Timed(seconds, workers=demo.execution.workers)
        drive(tmp_path, config, {name: planned * run_s for name, run_s in seconds.items()}, executor, over_at=530)
        assert executor.now <= 540
        done = {run for run, state in states(tmp_path).items() if state == "done"}
        whole = [seed for seed in demo.seeds if done >= {f"{name}/seed_{seed}" for name in names}]
        assert whole == list(demo.seeds[:complete])
