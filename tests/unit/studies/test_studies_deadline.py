"""A deadline is held by what is started, learns from what has ended, and stops what still runs; the clock is a fake."""

from collections import deque
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from fake_study import FakeRun, done_record, failed_record, fake_adapter, fake_config, fake_plan, ledger_rows

from peft_vit.studies.deadline import Deadline
from peft_vit.studies.events import Event, Notice, RunEnded, RunInterrupted, RunStarted
from peft_vit.studies.ledger import run_name
from peft_vit.studies.lock import study_lock
from peft_vit.studies.scheduler import drive as drive_study
from peft_vit.studies.status import study_status

pytestmark = pytest.mark.part("runner")


@dataclass
class Timed:
    """Carries runs out on its own clock: each takes the seconds that `seconds` says of its experiment."""

    seconds: dict[str, float]
    workers: int = 1
    now: float = 0.0
    deaf: bool = False  # to a request to stop
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
            self._running[run_name(run.spec)] = run, self.now + self.seconds[run.spec.experiment.name]
            self.started.append(run_name(run.spec))
            return RunStarted(run, "worker")
        name, (run, ends) = min(self._running.items(), key=lambda one: one[1][1], default=("", (None, 0.0)))
        if run is None or ends > self.now + timeout_s:
            self.now += timeout_s
            return None
        self.now = max(self.now, ends)
        del self._running[name]
        record = done_record(run.spec).model_copy(update={"seconds": self.seconds[run.spec.experiment.name]})
        return RunEnded(run, record, fake_adapter(run.spec))

    def stop(self) -> None:
        self._stopped = True
        self._waiting.clear()

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class Estimated(FakeRun):
    """A run whose plan says how long it takes."""

    estimate: Any = None


def drive(out, config, planned_s, executor, over_at, **options) -> list[str]:
    """Drive a study within a time; return what a person was told."""
    told: list[Any] = []
    plan = fake_plan(config, out)
    runs = [
        Estimated(run.spec, run.done, run.total_steps, SimpleNamespace(seconds=planned_s[run.spec.experiment.name]))
        for run in plan.runs
    ]
    rows = [[run for run in runs if run.spec.experiment.name == one.name] for one in config.experiments]
    deadline = Deadline(rows, executor.workers, over_at, over_at + 10, clock=executor.clock, **options)
    with study_lock(out / config.name) as lock:
        drive_study(replace(plan, runs=tuple(runs)), lock, lambda: executor, told.append, deadline=deadline)
    return [one.text for one in told if isinstance(one, Notice)]


def states(out) -> dict[str, str]:
    return {run.run: run.state for run in study_status(out / "fake").runs}


TWO = fake_config(("a", "b"), range(8))
AS_PLANNED = {"a": 10.0, "b": 20.0}


def test_runs_start_seed_by_seed_and_none_that_would_not_end_in_time(tmp_path) -> None:
    executor = Timed(AS_PLANNED)
    told = drive(tmp_path, TWO, AS_PLANNED, executor, over_at=75)
    # 30 s a seed: two seeds, then a third run of a, and no run of 20 s in the last 5
    assert executor.started == ["a/seed_0", "b/seed_0", "a/seed_1", "b/seed_1", "a/seed_2"]
    assert told == []
    assert executor.closed
    assert {state for run, state in states(tmp_path).items() if run in executor.started} == {"done"}
    assert list(states(tmp_path).values()).count("pending") == 11


def test_a_later_call_goes_on_with_the_rest(tmp_path) -> None:
    drive(tmp_path, TWO, AS_PLANNED, Timed(AS_PLANNED), over_at=75)
    later = Timed(AS_PLANNED)
    drive(tmp_path, TWO, AS_PLANNED, later, over_at=1000)
    assert later.started[:3] == ["b/seed_2", "a/seed_3", "b/seed_3"]
    assert set(states(tmp_path).values()) == {"done"}


def test_a_shorter_run_fills_what_is_left(tmp_path) -> None:
    executor = Timed(AS_PLANNED)
    drive(tmp_path, TWO, AS_PLANNED, executor, over_at=45)
    assert executor.started == ["a/seed_0", "b/seed_0", "a/seed_1"]


def test_what_has_ended_corrects_what_is_expected(tmp_path) -> None:
    """Twice as slow as planned: after the first run of a, b is expected to take twice what was planned too."""
    slow = {"a": 20.0, "b": 40.0}
    executor = Timed(slow)
    told = drive(tmp_path, TWO, AS_PLANNED, executor, over_at=55)
    assert executor.started == ["a/seed_0", "a/seed_1"]  # 35 s were enough for b by the plan, not by the pace
    assert told == []


def test_as_many_go_at_a_time_as_there_are_workers(tmp_path) -> None:
    executor = Timed(AS_PLANNED, workers=2)
    drive(tmp_path, TWO, AS_PLANNED, executor, over_at=35)
    # a0 until 10, b0 until 20, a1 until 20, then two at a time again
    assert executor.started == ["a/seed_0", "b/seed_0", "a/seed_1", "a/seed_2", "a/seed_3"]


def test_what_still_runs_at_the_deadline_is_stopped_with_its_checkpoint(tmp_path) -> None:
    executor = Timed({"a": 10.0, "b": 100.0})
    told = drive(tmp_path, TWO, AS_PLANNED, executor, over_at=50)
    assert told == ["the time is over: what still runs writes a checkpoint, with which a later call goes on"]
    rows = [(row.run, row.event, row.step) for row in ledger_rows(tmp_path)]
    assert rows[-1] == ("b/seed_0", "interrupted", 5)
    assert executor.now == pytest.approx(50, abs=0.5)
    assert executor.closed


def test_what_does_not_stop_is_not_waited_for(tmp_path) -> None:
    executor = Timed({"a": 10.0, "b": 1000.0}, deaf=True)
    drive(tmp_path, TWO, AS_PLANNED, executor, over_at=50)
    assert executor.now == pytest.approx(60, abs=0.5)
    assert executor.closed
    assert states(tmp_path)["b/seed_0"] == "pending"


def test_if_no_run_can_end_in_time_the_first_is_begun_all_the_same(tmp_path) -> None:
    """Or calls without end would come no step further."""
    executor = Timed(AS_PLANNED)
    drive(tmp_path, TWO, AS_PLANNED, executor, over_at=5)
    assert executor.started == ["a/seed_0"]
    assert ledger_rows(tmp_path)[-1].event == "interrupted"


def test_what_a_checkpoint_holds_is_not_counted_again(tmp_path) -> None:
    executor = Timed(AS_PLANNED)
    drive(tmp_path, TWO, AS_PLANNED, executor, over_at=9, left={"b/seed_0": 0.4, "a/seed_1": 0.95})
    assert executor.started == ["b/seed_0"]  # 8 of 20 s; 10 s for a are too many


def test_too_slow_for_three_experiments_the_last_one_waits(tmp_path) -> None:
    three = fake_config(("a", "b", "c"), range(8))
    planned = dict.fromkeys("abc", 10.0)
    executor = Timed(dict.fromkeys("abc", 15.0))
    # 3 x 7 x 10 s fit into 240 s, 15 s a run do not; 2 x 6 x 15 s do. One run of c would count as a comparison.
    told = drive(tmp_path, three, planned, executor, over_at=240)
    assert told == ["runs take longer than planned: c is left for a later call, others get its time"]
    done = [run for run, state in states(tmp_path).items() if state == "done"]
    assert [sum(run.startswith(name) for run in done) for name in "abc"] == [8, 8, 0]


@pytest.mark.parametrize("begun", [0, 3])
def test_an_experiment_that_was_begun_counts_as_a_comparison(tmp_path, begun) -> None:
    """Six seeds of two fit, seven do not: giving c up makes a verdict only if no run of c stands in the report."""
    three = fake_config(("a", "b", "c"), range(8))
    same = dict.fromkeys("abc", 10.0)
    told = drive(tmp_path, three, same, Timed(same), over_at=125, begun=begun)
    c_waits = ["runs take longer than planned: c is left for a later call, others get its time"]
    assert [line for line in told if "time is over" not in line] == ([] if begun else c_waits)


def test_three_experiments_that_do_fit_are_all_kept(tmp_path) -> None:
    three = fake_config(("a", "b", "c"), range(8))
    same = dict.fromkeys("abc", 10.0)
    told = drive(tmp_path, three, same, Timed(same), over_at=240)
    assert told == []
    assert set(states(tmp_path).values()) == {"done"}


def test_if_not_even_two_get_enough_seeds_none_is_given_up(tmp_path) -> None:
    three = fake_config(("a", "b", "c"), range(8))
    same = dict.fromkeys("abc", 10.0)
    executor = Timed(same)
    assert drive(tmp_path, three, same, executor, over_at=60) == []
    assert executor.started == [f"{name}/seed_{seed}" for seed in (0, 1) for name in "abc"]


def test_failed_runs_teach_nothing_and_end(tmp_path) -> None:
    class Failing(Timed):
        def next_event(self, timeout_s):
            event = super().next_event(timeout_s)
            if isinstance(event, RunEnded) and event.run.spec.experiment.name == "a":
                return RunEnded(event.run, failed_record(event.run.spec, "error"), None)
            return event

    executor = Failing(AS_PLANNED)
    drive(tmp_path, TWO, AS_PLANNED, executor, over_at=75)
    assert executor.started == ["a/seed_0", "b/seed_0", "a/seed_1", "b/seed_1", "a/seed_2"]
    assert states(tmp_path)["a/seed_0"] == "failed"


def test_an_experiment_that_was_left_comes_back_when_there_is_time_again(tmp_path) -> None:
    """After the first run of a, three times as slow as planned, c seems too long; b takes what was planned."""
    three = fake_config(("a", "b", "c"), range(8))
    executor = Timed({"a": 30.0, "b": 10.0, "c": 10.0})
    told = drive(tmp_path, three, dict.fromkeys("abc", 10.0), executor, over_at=430)
    assert told[:2] == [
        "runs take longer than planned: c is left for a later call, others get its time",
        "runs are faster than they looked: there is time for c again",
    ]
    done = [run for run, state in states(tmp_path).items() if state == "done"]
    assert [sum(run.startswith(name) for run in done) >= 7 for name in "abc"] == [True, True, True]


def test_a_probe_s_first_run_says_nothing_of_those_that_take_steps(tmp_path) -> None:
    """It computes the features of all seeds."""
    three = fake_config(("a", "b", "c"), range(8))
    probe = three.experiments[0].model_copy(update={"method": "linear", "lora": None})
    three = three.model_copy(update={"experiments": (probe, *three.experiments[1:])})
    slow_first = Timed({"a": 40.0, "b": 10.0, "c": 10.0})
    told = drive(tmp_path, three, dict.fromkeys("abc", 10.0), slow_first, over_at=430)
    assert not any("take longer" in line for line in told)
