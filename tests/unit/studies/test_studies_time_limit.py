"""A limited time goes to the most experiments that get enough seeds for a verdict, and then to further seeds.

While a study runs, a deadline is held by what is started, learns from what has ended, and stops what still runs; the
clock is a fake.
"""

import itertools
import random
from collections import deque
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
from fake_study import FakeRun, done_record, failed_record, fake_adapter, fake_config, fake_plan

from peft_vit.records.progress import look_at
from peft_vit.studies.events import Event, Notice, RunEnded, RunInterrupted, RunStarted
from peft_vit.studies.lock import study_lock
from peft_vit.studies.scheduler import drive as drive_study
from peft_vit.studies.status import study_status
from peft_vit.studies.time_limit import Deadline, Limit, can_decide, choose, makespan, seed_by_seed, seeds_for_verdict

pytestmark = pytest.mark.part("runner")

# --- the choice before a study runs -----------------------------------------------------------------------------------


def runs(*seconds: float, seeds: int = 12) -> list[list[float]]:
    """Make a row an experiment whose runs all take the same."""
    return [[one] * seeds for one in seconds]


def test_so_many_seeds_can_decide_and_one_less_can_not() -> None:
    """Against scipy: the most extreme data, and Bonferroni's first step, which is also Holm's."""
    for experiments in range(2, 12):
        needed = seeds_for_verdict(experiments, 100)
        for seeds, decided in ((needed, True), (needed - 1, False)):
            p = scipy.stats.wilcoxon(range(1, seeds + 1), method="exact").pvalue
            assert bool((experiments - 1) * p <= 0.05) is decided, (experiments, seeds)
    assert [seeds_for_verdict(2, seeds) for seeds in (5, 6, 7)] == [None, 6, 6]
    assert seeds_for_verdict(1, 100) is None


def test_a_verdict_takes_two_experiments_and_six_seeds() -> None:
    assert [can_decide(10, seeds) for seeds in (1, 5, 6, 7)] == [False, False, True, True]
    assert not can_decide(1, 10)


def test_runs_come_seed_by_seed() -> None:
    rows = [["a0", "a1", "a2"], ["b0", "b1", "b2"], ["c0", "c1", "c2"]]
    assert seed_by_seed(rows, 2, 3) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_if_all_fits_nothing_is_left_out() -> None:
    found = choose(runs(10, 10, 10), 1, left_s=360)
    assert (found.experiments, found.seeds, found.needed, found.fits) == (3, 12, 7, True)


@pytest.mark.parametrize(
    ("left_s", "experiments", "seeds"),
    [
        (359, 3, 11),  # 3 x 7 x 10 s x 1.3 = 273 s
        (273, 3, 9),
        (272, 2, 12),  # no three any more: what that leaves goes into further seeds of two
        (156, 2, 7),  # 2 x 6 x 10 s x 1.3
    ],
)
def test_the_most_experiments_with_a_verdict_and_then_further_seeds(left_s, experiments, seeds) -> None:
    found = choose(runs(10, 10, 10), 1, left_s)
    assert (found.experiments, found.seeds, found.fits) == (experiments, seeds, True)
    assert found.needed == seeds_for_verdict(experiments, 12)


def test_too_little_for_two_experiments_does_not_fit() -> None:
    found = choose(runs(10, 10, 10), 1, 155)
    assert (found.experiments, found.seeds, found.needed, found.fits) == (2, 7, 6, False)


def test_experiments_that_seeds_cannot_decide_are_not_taken_before_all_fits() -> None:
    """Six seeds decide one comparison: a third experiment would take both verdicts away."""
    assert choose(runs(1, 1, 1, seeds=6), 1, left_s=17).experiments == 2
    assert choose(runs(1, 1, 1, seeds=6), 1, left_s=18).experiments == 3


def test_a_study_that_can_decide_nothing_is_only_bounded() -> None:
    found = choose(runs(10, 10, 10, seeds=3), 1, left_s=65)
    assert (found.experiments, found.seeds, found.needed, found.fits) == (3, 2, None, True)
    found = choose(runs(10, seeds=20), 1, left_s=45)
    assert (found.experiments, found.seeds, found.needed) == (1, 4, None)
    assert not choose(runs(10, seeds=20), 1, left_s=5).fits


def test_what_is_done_costs_nothing_and_what_was_begun_is_not_given_up() -> None:
    done = [[0.0] * 7 + [10.0] * 5] * 3 + [[10.0] * 12]
    assert choose(done, 1, left_s=80, at_least=3, begun=3).experiments == 3
    assert choose(done, 1, left_s=105, at_least=3, begun=3).experiments == 4  # 8 seeds: 3 x 1 + 8, with 30 % to spare
    found = choose(runs(10, 10, 10, 10), 1, left_s=50, at_least=3)
    assert (found.experiments, found.seeds, found.fits) == (3, 1, False)


def test_an_experiment_with_a_done_run_counts_as_a_comparison() -> None:
    """Holm corrects for what stands in the report, whether it goes on or not."""
    rows = [[10.0] * 12, [10.0] * 12, [0.0] + [10.0] * 11]
    assert choose(rows, 1, left_s=185).needed == 6
    assert choose(rows, 1, left_s=185, begun=3).needed == 7


def test_the_choice_is_the_best_of_all_there_are() -> None:
    """Against a search over all pairs of experiments and seeds."""
    draw = random.Random(3)
    for _ in range(200):
        workers, seeds = draw.choice((1, 2, 3)), draw.choice((6, 7, 8, 12))
        rows = [[draw.uniform(1, 20)] * seeds for _ in range(draw.choice((2, 3, 5)))]
        left_s = draw.uniform(10, 900)
        found = choose(rows, workers, left_s)

        def takes(experiments: int, some: int, rows=rows, workers=workers) -> float:
            return makespan([rows[e][0] for _ in range(some) for e in range(experiments)], workers)

        whole = takes(len(rows), seeds) <= left_s
        decided = [
            e
            for e, needed in itertools.product(range(2, len(rows) + 1), range(6, seeds + 1))
            if (e - 1) * 2 / 2**needed <= 0.05 and 1.3 * takes(e, needed) <= left_s
        ]
        assert found.fits is (whole or bool(decided))
        expected = len(rows) if whole else max(decided, default=2)
        assert found.experiments == expected
        assert found.seeds == max((s for s in range(1, seeds + 1) if takes(expected, s) <= left_s), default=0)


# --- the deadline while it does ---------------------------------------------------------------------------------------


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
            self._running[run.spec.name] = run, self.now + self.seconds[run.spec.experiment.name]
            self.started.append(run.spec.name)
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
    minutes = min(over_at / 57, (over_at + 10) / 60)
    deadline = Deadline(rows, executor.workers, Limit(minutes, 0.0, executor.clock), **options)
    with study_lock(out / config.name) as lock:
        drive_study(replace(plan, runs=tuple(runs)), lock, lambda: executor, told.append, deadline=deadline)
    return [one.text for one in told if isinstance(one, Notice)]


def states(out) -> dict[str, str]:
    return {run.run: run.state for run in study_status(out / "fake").runs}


def of(*experiments: str):
    return fake_config(experiments, range(8))


TWO = of("a", "b")
AS_PLANNED = {"a": 10.0, "b": 20.0}
EQUAL = dict.fromkeys("abc", 10.0)
C_WAITS = "runs take longer than planned: c is left for a later call, others get its time"


@pytest.mark.parametrize(
    ("seconds", "over_at", "started"),
    [
        # 30 s a seed: two seeds, then a third run of a, and no run of 20 s in the last 5
        (AS_PLANNED, 75, "a0 b0 a1 b1 a2"),
        # a shorter run fills what is left
        (AS_PLANNED, 45, "a0 b0 a1"),
        # twice as slow as planned: 35 s are enough for b by the plan, not by the pace
        ({"a": 20.0, "b": 40.0}, 55, "a0 a1"),
    ],
)
def test_runs_start_seed_by_seed_and_none_that_would_not_end_in_time(tmp_path, seconds, over_at, started) -> None:
    executor = Timed(seconds)
    assert drive(tmp_path, TWO, AS_PLANNED, executor, over_at) == []
    assert " ".join(run.replace("/seed_", "") for run in executor.started) == started
    assert executor.closed
    assert {run for run, state in states(tmp_path).items() if state == "done"} == set(executor.started)
    assert set(states(tmp_path).values()) == {"done", "pending"}


def test_what_a_checkpoint_holds_is_not_counted_again(tmp_path) -> None:
    executor = Timed(AS_PLANNED)
    drive(tmp_path, TWO, AS_PLANNED, executor, over_at=9, left={"b/seed_0": 0.4, "a/seed_1": 0.95})
    assert executor.started == ["b/seed_0"]  # 8 of 20 s; 10 s for a are too many


def test_a_later_call_goes_on_with_the_rest(tmp_path) -> None:
    drive(tmp_path, TWO, AS_PLANNED, Timed(AS_PLANNED), over_at=75)
    later = Timed(AS_PLANNED)
    drive(tmp_path, TWO, AS_PLANNED, later, over_at=1000)
    assert later.started[:3] == ["b/seed_2", "a/seed_3", "b/seed_3"]
    assert set(states(tmp_path).values()) == {"done"}


def test_as_many_go_at_a_time_as_there_are_workers(tmp_path) -> None:
    executor = Timed(AS_PLANNED, workers=2)
    drive(tmp_path, TWO, AS_PLANNED, executor, over_at=35)
    # a0 until 10, b0 until 20, a1 until 20, then two at a time again
    assert executor.started == ["a/seed_0", "b/seed_0", "a/seed_1", "a/seed_2", "a/seed_3"]


@pytest.mark.parametrize("deaf", [False, True])
def test_what_still_runs_at_the_deadline_is_stopped_but_not_waited_for(tmp_path, deaf) -> None:
    executor = Timed({"a": 10.0, "b": 1000.0}, deaf=deaf)
    told = drive(tmp_path, TWO, AS_PLANNED, executor, over_at=57)
    assert told == ["the time is over: what still runs writes a checkpoint, with which a later call goes on"]
    assert executor.closed
    assert executor.now == pytest.approx(60 if deaf else 57, abs=0.5)
    attempt = look_at(tmp_path / "fake", "b/seed_0").attempt
    assert attempt is not None
    assert attempt.state == ("running" if deaf else "interrupted")
    assert states(tmp_path)["b/seed_0"] == "pending"


def test_if_no_run_can_end_in_time_the_first_is_begun_all_the_same(tmp_path) -> None:
    """Or calls without end would come no step further."""
    executor = Timed(AS_PLANNED)
    drive(tmp_path, TWO, AS_PLANNED, executor, over_at=5)
    assert executor.started == ["a/seed_0"]
    attempt = look_at(tmp_path / "fake", "a/seed_0").attempt
    assert attempt is not None
    assert attempt.state == "interrupted"


def test_too_slow_for_three_experiments_the_last_one_waits(tmp_path) -> None:
    # 3 x 7 x 10 s fit into 240 s, 15 s a run do not; 2 x 6 x 15 s do. One run of c would count as a comparison.
    told = drive(tmp_path, of("a", "b", "c"), EQUAL, Timed(dict.fromkeys("abc", 15.0)), over_at=240)
    assert told == [C_WAITS]
    done = [run for run, state in states(tmp_path).items() if state == "done"]
    assert [sum(run.startswith(name) for run in done) for name in "abc"] == [8, 8, 0]


@pytest.mark.parametrize("begun", [0, 3])
def test_an_experiment_that_was_begun_counts_as_a_comparison(tmp_path, begun) -> None:
    """Six seeds of two fit, seven do not: giving c up makes a verdict only if no run of c stands in the report."""
    told = drive(tmp_path, of("a", "b", "c"), EQUAL, Timed(EQUAL), over_at=125, begun=begun)
    assert [line for line in told if "time is over" not in line] == ([] if begun else [C_WAITS])


def test_three_experiments_that_do_fit_are_all_kept_and_so_are_those_of_which_not_even_two_do(tmp_path) -> None:
    assert drive(tmp_path / "all", of("a", "b", "c"), EQUAL, Timed(EQUAL), over_at=240) == []
    assert set(states(tmp_path / "all").values()) == {"done"}
    executor = Timed(EQUAL)
    assert drive(tmp_path / "few", of("a", "b", "c"), EQUAL, executor, over_at=60) == []
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
    told = drive(tmp_path, of("a", "b", "c"), EQUAL, Timed(EQUAL | {"a": 30.0}), over_at=430)
    assert told[:2] == [C_WAITS, "runs are faster than they looked: there is time for c again"]
    done = [run for run, state in states(tmp_path).items() if state == "done"]
    assert [sum(run.startswith(name) for run in done) >= 7 for name in "abc"] == [True, True, True]


def test_a_probe_s_first_run_says_nothing_of_those_that_take_steps(tmp_path) -> None:
    """It computes the features of all seeds."""
    three = of("a", "b", "c")
    probe = three.experiments[0].model_copy(update={"method": "linear", "lora": None})
    three = three.model_copy(update={"experiments": (probe, *three.experiments[1:])})
    told = drive(tmp_path, three, EQUAL, Timed(EQUAL | {"a": 40.0}), over_at=430)
    assert not any("take longer" in line for line in told)
