"""What a person reads of a plan and of runs that go on, in lines and in a terminal."""

import io
import re
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_study import done_record, failed_record, fake_config, fake_plan
from golden import check_golden
from rich.console import Console

from peft_vit.base import console
from peft_vit.base.console import duration, progress
from peft_vit.core.records import HeadFit, Metrics, StepRow
from peft_vit.core.training import Progress
from peft_vit.runs.costs.estimate import RunCost
from peft_vit.runs.executors import Notice, RunEnded, RunInterrupted, RunProgress, RunRetried, RunStarted
from peft_vit.runs.planned import PlannedRun
from peft_vit.runs.records.storage import run_folder
from peft_vit.runs.scheduling.display import StudyProgress, _cells, counted, print_plan
from peft_vit.runs.scheduling.plan import plan_study

pytestmark = pytest.mark.part("runner")

SAID = "Images: dog/ is an empty folder, so it is not a class"
METRICS = Metrics(n=20, accuracy=0.75, balanced_accuracy=0.75, auroc=None, nll=0.5, ece=0.1)


def in_memory(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None, legacy_windows=False)


def printed(plan) -> list[str]:
    plain = in_memory()
    print_plan(plan, plain)
    return plain.file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.4, "59 s"), (90, "1.5 min"), (3599, "60.0 min"), (3600, "1.0 h"), (100_000, "27.8 h")],
)
def test_a_time_is_said_as_a_person_says_it(seconds, said) -> None:
    assert duration(seconds) == said
    assert (counted(0, "run"), counted(1, "run"), counted(2, "run")) == ("0 runs", "1 run", "2 runs")


def test_twenty_minutes_in_a_pipe_are_some_forty_lines_a_minute_apart_at_most(monkeypatch) -> None:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: now.s)
    piped = io.StringIO()
    at = []
    with progress("training", piped) as on_progress:
        for done in range(1, 2401):
            now.s += 0.5
            on_progress(done, 2400)
            if piped.getvalue().count("\n") > len(at):
                at.append(now.s)
    gaps = [later - earlier for earlier, later in pairwise(at)]
    assert 30 < len(at) < 45
    assert sorted(gaps) == gaps
    assert (gaps[0], gaps[-1]) == (10, 60)


def test_in_a_notebook_one_line_is_rewritten(monkeypatch) -> None:
    now, shown = SimpleNamespace(s=0.0), []
    monkeypatch.setattr(console.time, "monotonic", lambda: now.s)
    handle = SimpleNamespace(update=lambda data, raw: shown.append(("rewritten", data["text/plain"])))

    def display(data, raw, display_id):
        shown.append(("new", data["text/plain"]))
        return handle

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr(console, "open_console", lambda file=None: in_notebook)
    in_notebook = in_memory()
    in_notebook.is_jupyter = True
    with progress("training", io.StringIO()) as on_progress:
        for done in range(1, 31):
            now.s += 1.0
            on_progress(done, 3000)
    assert [how for how, _ in shown] == ["new", "rewritten", "rewritten"]
    assert shown[-1][1].startswith("training: 22 of 3,000")
    assert in_notebook.file.getvalue() == ""


def test_a_command_of_a_notebook_is_no_terminal(monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as IPython's kernel sets it
    assert console.open_console(io.StringIO()).is_terminal
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert not console.open_console(io.StringIO()).is_terminal


def test_a_count_is_told_soon_then_every_ten_seconds_or_in_a_bar(monkeypatch) -> None:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: now.s)
    piped = io.StringIO()
    with progress("reading images", piped) as on_progress:
        for done in range(1, 31):
            now.s += 1.0
            on_progress(done, 3000)
    said = [f"reading images: {done} of 3,000, about {duration(3000 - done)} left" for done in (2, 12, 22)]
    assert piped.getvalue().splitlines() == said

    parts = io.StringIO()
    with progress("getting ready", parts) as on_progress:
        for size, count in ((64, 3000), (112, 6000)):  # the second takes as long an image, from where the first ended
            for done in range(20, count + 1, 20):
                now.s += 0.2
                on_progress(done, count, f"images at {size} px")
    told = parts.getvalue().splitlines()
    assert told[0] == "images at 64 px: 160 of 3,000, about 28 s left"
    assert told[-1] == "images at 112 px: 5,160 of 6,000, about 8 s left"
    monkeypatch.undo()
    terminal = Terminal()
    with progress("reading images", terminal) as on_progress:
        on_progress(7, 3000)
    assert "reading images: 7 of 3,000" in terminal.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_what_takes_nobody_knows_how_long_is_told_too(monkeypatch, kind) -> None:
    monkeypatch.setattr(console, "FIRST_S", 0.01)
    place = kind()
    with progress("opening [a] model", place):
        until = time.monotonic() + 10
        while "opening [a] model, 0 s" not in place.getvalue() and time.monotonic() < until:
            time.sleep(0.05)
    assert "opening [a] model, 0 s" in place.getvalue()


def test_a_plan_sums_up_what_its_workers_take_and_quotes_no_markup(study, tmp_path) -> None:
    plan = plan_study(study("linear", "lora"), tmp_path, file=tmp_path / "tiny.yaml")
    runs = tuple(
        replace(run, estimate=replace(run.estimate, seconds=seconds, peak_memory_bytes=memory))
        for run, seconds, memory in zip(plan.runs, (20.0, 70.0), (10**9, 3 * 10**9), strict=True)
    )
    notices = ("Images: [red]a.png and \x1b[31mb.png " + "x" * 150, "Images: no test image is of class 'a'")
    alone = printed(replace(plan, runs=runs, notices=notices))
    assert alone[0].endswith("digits at 32 px, fp32, 1 thread")
    place = alone.index("Images: [red]a.png and \\x1b[31mb.png " + "x" * 150)
    assert alone[place + 1] == notices[1]
    assert "linear/seed_0" not in "".join(alone[: place + 2])
    assert "2 runs: 2 to do in about 1.5 min one after the other, 0 already done and skipped." in alone
    assert alone[-1].startswith("At most 3.0 GB of memory a run (")
    two = plan.study.execution.model_copy(update={"workers": 2})
    together = printed(replace(plan, runs=runs, study=plan.study.model_copy(update={"execution": two})))
    assert "2 runs: 2 to do in about 1.2 min with 2 workers, 0 already done and skipped." in together
    assert together[-1].startswith("At most 4.0 GB of memory at a time (")
    last = replace(plan, runs=(runs[0], replace(runs[1], done=True)))
    assert "2 runs: 1 to do in about 20 s, 1 already done and skipped." in printed(last)
    done = replace(plan, runs=(replace(runs[0], done=True),))
    assert printed(done)[-1] == "1 run: 0 to do, 1 already done and skipped."


def planned_runs():
    """Return a plan of three runs of 60 s on two workers."""
    config = fake_config(("adaptive", "quantized", "diverging"), (0,), execution={"workers": 2})
    runs = [
        PlannedRun(run.spec, 200, RunCost(60.0, 10**8, "estimate"), False) for run in fake_plan(config, Path("x")).runs
    ]
    return SimpleNamespace(study=config, pending=tuple(runs), notices=(SAID,))


def ended(run, **update):
    steps = [StepRow(step=200, loss=0.25, learning_rate=1e-3, gradient_norm=1.0, seconds=0.1)]
    record = done_record(run.spec).model_copy(
        update={"steps": steps, "validation": METRICS, "seconds": 90.0, "peak_memory_bytes": 3 * 10**8, **update}
    )
    return RunEnded(run, record, b"")


def events_of(runs):
    """Yield a study's events with the seconds that pass before each."""
    first, second, third = runs
    probe = HeadFit(l2=(1.0,), validation=(METRICS,), chosen_l2=1.0, gradient_norm=0.0, images=9)
    yield 0, Notice("[a notice] without markup")
    yield 0, RunStarted(first, "process 7 on here")
    yield 0, RunStarted(second, "process 8 on here")
    yield (
        90,
        RunProgress(first, Progress(100, 200, 0.5, None, None, None)),
    )  # goes on; its process took so long to start
    yield 20, RunProgress(first, Progress(110, 200, 0.4, 0.75, 3.5, None))
    yield 1, RunProgress(second, Progress(1, 200, 0.625, None, 2.0, 6.0))
    yield 31, RunProgress(second, Progress(20, 200, 0.5, 0.5, 2.0, 6.0))
    yield 9, ended(first, warnings=["nothing was pruned", SAID], head_fit=probe)  # the plan has told the second one
    yield 0, RunStarted(third, "process 7 on here")
    yield 0, RunRetried(third, failed_record(third.spec, "killed"))
    yield 0, RunProgress(third, Progress(7, 200, 0.5, None, None, None))  # a late word
    yield 0, RunStarted(third, "process 9 on here")
    yield 0, RunInterrupted(third, 4)
    yield 0, RunStarted(third, "process 9 on here")
    yield 0, RunInterrupted(third, 0)
    yield 5, RunEnded(third, failed_record(third.spec, "diverged"), None)
    yield 5, ended(second)


def test_what_is_said_of_runs_that_go_on(monkeypatch) -> None:
    """A run that goes on at step 100 and makes 10 steps in 20 s has 90 steps and 180 s left; before, half of it all."""
    monkeypatch.setattr(console, "EVERY_S", 15.0)
    plan, clock = planned_runs(), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    plain = in_memory()
    with StudyProgress(plan, console=plain) as watch:
        for wait_s, event in events_of(plan.pending):
            clock[0] += wait_s
            watch.on_event(event)
    document, clock[0] = ["# lines", plain.file.getvalue(), "# a terminal, after each event"], 1000.0
    terminal = in_memory(terminal=True)
    with StudyProgress(plan, console=terminal, until=1200.0) as watch:
        for wait_s, event in events_of(plan.pending):
            clock[0] += wait_s
            watch.on_event(event)
            if isinstance(event, RunProgress | RunEnded):
                view = in_memory()
                view.print(watch._shown())
                document += [f"## {type(event).__name__} of {event.run.spec.name}", view.file.getvalue()]
    text = "\n".join(line.rstrip() for line in "\n".join(document).splitlines())
    check_golden("watch.txt", text + "\n")


def said_s(text: str) -> float:
    """Return the seconds of a time as a person reads it."""
    number, unit = text.split()
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def course_of(run, real_s: float, ready: float, steps: int, after: float):
    """Yield what happens to a run that takes so many seconds, and when: ready for its first step after a share of it,
    and its last one a share before its end."""
    yield 0.0, RunStarted(run, "process 7")
    for step in range(1, steps + 1):
        at = ready + (1 - ready - after) * step / steps
        yield real_s * at, RunProgress(run, Progress(step, steps, 0.5, None, None, None))
    yield real_s, ended(run, seconds=real_s)


@pytest.mark.parametrize(
    ("planned_s", "real_s", "ready", "steps"),
    [
        (10, 1000, 0.05, 100),
        (10, 1000, 0.6, 100),  # most of it before the first step
        (10, 1000, 0.0, 0),  # a linear probe, which has no steps
        (10, 100, 0.6, 40),
        (1000, 10, 0.05, 100),
        (1000, 1000, 0.3, 20),
    ],
)
def test_what_is_left_is_never_ten_times_wrong_however_wrong_the_plan_is(
    monkeypatch, planned_s, real_s, ready, steps
) -> None:
    """From the first tenth of what it takes on, of one run and of three, one after the other; the clock is made up."""
    config = fake_config(("one", "two", "three"), (0,))
    estimate = RunCost(planned_s, 10**8, "estimate", after_s=0.1 * planned_s if steps else 0.0)
    runs = [PlannedRun(run.spec, steps, estimate, False) for run in fake_plan(config, Path("x")).runs]
    monkeypatch.setattr("peft_vit.runs.scheduling.deadline.PROCESS_S", 0.0)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    plan = SimpleNamespace(study=config, pending=tuple(runs), notices=())
    watch = StudyProgress(plan, console=in_memory())
    events = [
        (place * real_s + at, event)
        for place, run in enumerate(runs)
        for at, event in course_of(run, real_s, ready, steps, 0.1 if steps else 0.0)
    ]
    looked = 0
    for moment in range(1, 300):
        now = moment * real_s / 100
        while events and events[0][0] < now:
            clock[0], event = events.pop(0)
            watch.on_event(event)
        clock[0] = now
        share = (moment - 1) % 100 / 100
        if 0.1 <= share < 0.9:
            own, together = re.search(r"about ([^,]+) left, (.+) for all", watch._of_the_quietest()).groups()
            assert 0.1 <= said_s(own) / (real_s * (1 - moment % 100 / 100)) <= 10, (moment, own)
            if moment >= 30:  # a tenth of all
                assert 0.1 <= said_s(together) / (3 * real_s - now) <= 10, (moment, together)
            looked += 1
    assert looked == 240


def test_no_more_is_said_to_be_left_than_the_limit_leaves(monkeypatch) -> None:
    clock, plan = [0.0], planned_runs()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watch = StudyProgress(plan, console=in_memory(), until=540.0)
    watch.on_event(RunStarted(plan.pending[0], "process 7"))
    for clock[0], own, together in ((20.0, "50 s", "1.8 min"), (400.0, "2.3 min", "2.3 min"), (539.0, "1 s", "1 s")):
        assert watch._of_the_quietest().endswith(f"; about {own} left, {together} for all")


def test_a_checkpoint_shortens_what_is_left_before_the_first_step(monkeypatch, tmp_path) -> None:
    clock, plan = [0.0], planned_runs()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    run = plan.pending[0]
    (run_folder(tmp_path, run.spec) / "checkpoint-150").mkdir(parents=True)  # of 200 steps, and 60 s
    watch = StudyProgress(plan, tmp_path, console=in_memory())
    watch.on_event(RunStarted(run, "process 7"))
    assert "; about 15 s left, " in watch._of_the_quietest()


def test_a_terminal_draws_a_table_and_one_that_can_do_nothing_gets_lines() -> None:
    plan = planned_runs()
    for environment, has_lines in (({}, False), ({"TERM": "dumb"}, True)):
        shown = Console(file=io.StringIO(), force_terminal=True, width=120, _environ=environment)
        with StudyProgress(plan, console=shown) as watch:
            watch.on_event(RunStarted(plan.pending[0], "process 7"))
            time.sleep(0 if has_lines else 0.5)
        assert ("started on process 7" in shown.file.getvalue()) == has_lines
        assert ("of 3 runs ended" in shown.file.getvalue()) != has_lines


@pytest.mark.parametrize(("method", "rank"), [("adalora", "3.5"), ("lora", "–")])
def test_a_rank_is_shown_where_it_changes(method: str, rank: str) -> None:
    run = SimpleNamespace(spec=SimpleNamespace(experiment=SimpleNamespace(method=method)))
    assert _cells(Progress(1, 2, 0.5, None, 3.5, None), run)[3] == rank
