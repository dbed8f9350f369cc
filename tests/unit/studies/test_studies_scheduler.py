"""The driver attempts what is pending, retries what may pass, writes every result once, and stops when it is asked."""

import errno
import functools
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_study import (
    FakeExecutor,
    check_complete,
    done_record,
    failed_record,
    fake_adapter,
    fake_config,
    fake_drive,
    fake_plan,
)

from peft_vit.base.errors import UserError
from peft_vit.runs.executors import Notice, RunEnded, RunInterrupted, RunRetried, RunStarted
from peft_vit.runs.records.progress import LOCK_FILE, owner_of, read_run_files, study_status
from peft_vit.runs.records.storage import read_record, write_result

pytestmark = pytest.mark.part("runner")

STUDY = fake_config(("a", "b"), (0, 1))


def attempts_of(out, run):
    return read_record(out / "fake" / run / "record.json").attempts


def signalled(number=signal.SIGTERM, at=""):
    """Return a watcher that sends this process a signal when a run of this name starts."""

    def watch(event) -> None:
        if isinstance(event, RunStarted) and event.run.spec.run_id.endswith(at):
            os.kill(os.getpid(), number)

    return watch


def states(out) -> list[str]:
    return [run.state for run in study_status(out / "fake").runs]


def test_every_run_is_done_once_and_nothing_is_done_again(tmp_path) -> None:
    events, executor = [], FakeExecutor(checkpoints_in=tmp_path)
    assert fake_drive(STUDY, tmp_path, executor, events.append) == {}
    assert executor.closed
    assert [type(event) for event in events] == 4 * [RunStarted, RunEnded]
    assert [event.run.spec.name for event in events[1::2]] == ["a/seed_0", "a/seed_1", "b/seed_0", "b/seed_1"]
    check_complete(STUDY, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    unused = FakeExecutor()
    assert fake_drive(STUDY, tmp_path, unused, events.append) == {}
    assert (unused.submitted, unused.closed, len(events)) == ([], False, 8)
    assert all(file.read_bytes() == content for file, content in before.items())
    assert owner_of(tmp_path / "fake") is None


@pytest.mark.parametrize("failure", [BrokenPipeError(), OSError(errno.ENOSPC, "full"), SystemExit(1)])
def test_a_watcher_that_cannot_write_does_not_stop_the_study(tmp_path, failure) -> None:
    told = []

    def tell(event) -> None:
        told.append(event)
        raise failure

    assert fake_drive(STUDY, tmp_path, on_event=tell) == {}
    assert len(told) == 8
    check_complete(STUDY, tmp_path)


def test_the_records_of_ended_runs_are_not_held(tmp_path) -> None:
    """A thousand of them, with all their steps, would take gigabytes."""
    held, alive = [], []

    def watch(event) -> None:
        alive.append(sum(reference() is not None for reference in held))
        if isinstance(event, RunEnded):
            held.append(weakref.ref(event.record))

    fake_drive(STUDY, tmp_path, on_event=watch)
    assert len(held) == 4
    assert max(alive) <= 1  # the one that has just ended


@pytest.mark.parametrize(
    ("failure", "tries"), [("killed", 3), ("out_of_memory", 3), ("io", 3), ("diverged", 1), ("error", 1)]
)
def test_what_may_pass_is_retried_as_configured_and_stops_no_other(tmp_path, failure, tries) -> None:
    study = fake_config(("a", "b"), (0,), execution={"retries": 2})
    events = []
    failures = {"a/seed_0": 2 * [failure], "b/seed_0": 3 * [failure]}
    outcome = fake_drive(study, tmp_path, FakeExecutor(failures), events.append)
    assert outcome == {f"fake/{name}/seed_0": f"it was {failure}" for name in ("b" if tries == 3 else "ab")}
    ends = [(type(event), event.run.spec.name, event.record.attempts) for event in events if hasattr(event, "record")]
    retried = [(RunRetried, f"{name}/seed_0", attempt) for attempt in range(1, tries) for name in "ab"]
    assert ends == [*retried, (RunEnded, "a/seed_0", tries), (RunEnded, "b/seed_0", tries)]
    record = read_record(tmp_path / "fake/b/seed_0/record.json")
    end = (record.status, record.failure, record.error, record.traceback, record.attempts)
    assert end == ("failed", failure, f"it was {failure}", "Traceback ...", tries)


def test_what_an_attempt_came_to_is_known_before_it_is_told(tmp_path) -> None:
    seen = []

    def look(event) -> None:
        known = read_run_files(tmp_path / "fake", "a/seed_0")
        attempt = known.attempt
        state = None if attempt is None else (attempt.number, attempt.state, attempt.error)
        seen.append((state, known.is_done, known.failure))

    study = fake_config(("a",), (0,))
    fake_drive(study, tmp_path, FakeExecutor({"a/seed_0": ["io", "diverged"]}), look)
    fake_drive(study, tmp_path, FakeExecutor(), look)
    assert seen == [
        ((1, "running", None), False, None),
        ((1, "failed", "it was io"), False, None),
        ((2, "running", None), False, None),
        (None, False, "it was diverged"),
        ((3, "running", None), False, None),
        (None, True, None),
    ]


def test_a_later_call_tries_failed_runs_again_or_leaves_them(tmp_path) -> None:
    fake_drive(STUDY, tmp_path, FakeExecutor({"a/seed_0": ["diverged"], "b/seed_1": ["error"]}))
    kept = FakeExecutor()
    outcome = fake_drive(STUDY, tmp_path, kept, skip_failed=True)
    assert kept.submitted == []
    assert outcome == {"fake/a/seed_0": "it was diverged", "fake/b/seed_1": "it was error"}
    again = FakeExecutor()
    assert fake_drive(STUDY, tmp_path, again) == {}
    assert again.submitted == ["a/seed_0", "b/seed_1"]
    check_complete(STUDY, tmp_path)
    assert [attempts_of(tmp_path, run) for run in ("a/seed_0", "a/seed_1")] == [2, 1]


def test_without_its_lock_file_a_study_still_has_one_writer(tmp_path) -> None:
    seen = []

    class Robbed(FakeExecutor):
        def next_event(self, timeout_s):
            if not seen:
                (tmp_path / "fake" / LOCK_FILE).unlink()
                second = FakeExecutor()
                with pytest.raises(UserError, match=r"fake: another command works on this study, whose lock was rem"):
                    fake_drive(STUDY, tmp_path, second)
                assert not (tmp_path / "fake" / LOCK_FILE).exists()
                seen.append(second.submitted)
            return super().next_event(timeout_s)

    fake_drive(STUDY, tmp_path, Robbed())
    assert seen == [[]]
    check_complete(STUDY, tmp_path)


def test_odd_characters_of_an_error_can_be_written(tmp_path) -> None:
    def odd(event: RunEnded) -> RunEnded:
        record = failed_record(event.run.spec, "error").model_copy(update={"error": "no file \udcff\n"})
        return RunEnded(event.run, record, None)

    outcome = fake_drive(fake_config(("a",), (0,)), tmp_path, FakeExecutor(ending=odd))
    assert outcome == {"fake/a/seed_0": "no file \\udcff\n"}


def test_records_of_an_earlier_version_are_taken_over(tmp_path) -> None:
    done, failed, *_ = (run.spec for run in fake_plan(STUDY, tmp_path).runs)
    write_result(tmp_path, done_record(done), fake_adapter(done))
    write_result(tmp_path, failed_record(failed, "error"), None)
    assert states(tmp_path) == ["done", "failed"]
    executor = FakeExecutor()
    fake_drive(STUDY, tmp_path, executor)
    assert executor.submitted == ["a/seed_1", "b/seed_0", "b/seed_1"]
    assert [attempts_of(tmp_path, run) for run in ("a/seed_0", "a/seed_1", "b/seed_0")] == [1, 2, 1]
    check_complete(STUDY, tmp_path)


@pytest.mark.parametrize(
    ("name", "notices", "attempt"),
    [
        ("record.json", [], 1),
        ("adapter.safetensors", ["a/seed_1: its record is here, its adapter.safetensors is not"], 2),
    ],
)
def test_a_result_that_is_gone_is_made_again(tmp_path, name, notices, attempt) -> None:
    fake_drive(STUDY, tmp_path)
    (tmp_path / "fake/a/seed_1" / name).unlink()
    assert states(tmp_path) == ["done", "pending", "done", "done"]
    events, executor = [], FakeExecutor()
    fake_drive(STUDY, tmp_path, executor, events.append)
    assert executor.submitted == ["a/seed_1"]
    assert [event.text for event in events if isinstance(event, Notice)] == notices
    assert attempts_of(tmp_path, "a/seed_1") == attempt
    assert set(states(tmp_path)) == {"done"}


def test_late_words_of_a_run_that_has_ended_change_nothing(tmp_path) -> None:
    """A node that was thought dead may still report what was done elsewhere meanwhile."""

    class Echo(FakeExecutor):
        def next_event(self, timeout_s):
            if echoes:
                return echoes.pop(0)
            event = super().next_event(timeout_s)
            if isinstance(event, RunEnded):
                echoes.extend([RunStarted(event.run, "late"), event, RunInterrupted(event.run, 1)])
            return event

    echoes = []
    assert fake_drive(STUDY, tmp_path, Echo()) == {}
    check_complete(STUDY, tmp_path)


@pytest.mark.parametrize(
    ("steps", "attempts", "failed"),
    [([5], 2, False), ([0, 0, 0], 2, True), ([3, 3, 3], 3, True), ([3, 3, 4, 5], 5, False)],
)
def test_interruptions_are_carried_on_but_few_without_a_step(tmp_path, steps, attempts, failed) -> None:
    left = list(steps)
    executor = FakeExecutor(ending=lambda event: RunInterrupted(event.run, left.pop(0)) if left else event)
    study = fake_config(("a",), (0,), execution={"retries": 1})
    outcome = fake_drive(study, tmp_path, executor)
    assert len(executor.submitted) == attempts_of(tmp_path, "a/seed_0") == attempts
    reason = f"it was interrupted at step {steps[0]} without a step since the last time"
    assert outcome == ({"fake/a/seed_0": reason} if failed else {})
    if not failed:
        check_complete(study, tmp_path)


def alone(test: Callable[..., None]) -> Callable[..., None]:
    """Do a test of signals in a process of its own, whose handlers are Python's: a library may leave others here."""

    @functools.wraps(test)
    def do(tmp_path: Path, **numbers: int) -> None:
        code = "import sys; from pathlib import Path; import test_studies_scheduler as here; "
        code += f"here.{test.__name__}.__wrapped__(Path(sys.argv[1]), *map(int, sys.argv[2:])); print('done')"
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), *(str(int(number)) for number in numbers.values())],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "done\n"

    return do


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@alone
def test_a_signal_stops_cleanly_and_the_next_call_goes_on(tmp_path: Path, number: int) -> None:
    events, interrupt = [], signalled(number, "fake/a/seed_1")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner in the background may ignore it
    before = signal.getsignal(number)
    executor = FakeExecutor(steps=5, checkpoints_in=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fake_drive(STUDY, tmp_path, executor, lambda event: (events.append(event), interrupt(event)))
    assert executor.closed
    assert signal.getsignal(number) == before
    assert [type(event) for event in events] == [RunStarted, RunEnded, RunStarted, Notice, RunInterrupted]
    attempt = read_run_files(tmp_path / "fake", "a/seed_1").attempt
    assert attempt is not None
    assert (attempt.number, attempt.state) == (1, "interrupted")
    assert states(tmp_path) == ["done", "pending", "pending", "pending"]
    fake_drive(STUDY, tmp_path)
    assert attempts_of(tmp_path, "a/seed_1") == 2
    check_complete(STUDY, tmp_path)


@alone
def test_what_dies_while_a_study_stops_has_not_failed(tmp_path: Path) -> None:
    """Ctrl-C in a terminal may reach a worker too, whose end is then no reason to give its run up."""

    class Dying(FakeExecutor):
        def next_event(self, timeout_s):
            event = super().next_event(timeout_s)
            if isinstance(event, RunInterrupted):
                return RunEnded(event.run, failed_record(event.run.spec, "killed"), None)
            return event

    study = fake_config(("a",), (0,), execution={"retries": 0})
    with pytest.raises(KeyboardInterrupt):
        fake_drive(study, tmp_path, Dying(steps=5), signalled())
    (run,) = study_status(tmp_path / "fake").runs
    assert (run.state, run.note) == ("pending", "to be tried again after: it was killed")
    fake_drive(study, tmp_path)
    check_complete(study, tmp_path)


@alone
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    class Deaf(FakeExecutor):
        def stop(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    executor, started = Deaf(steps=5), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fake_drive(STUDY, tmp_path, executor, signalled())
    assert time.monotonic() - started < 30
    assert executor.closed
    fake_drive(STUDY, tmp_path)
    check_complete(STUDY, tmp_path)


def test_what_an_executor_refuses_is_passed_on_and_it_is_closed(tmp_path) -> None:
    class Refusing(FakeExecutor):
        def submit(self, run) -> None:
            raise UserError("no node has 99 CPUs")

    executor = Refusing()
    with pytest.raises(UserError, match="99 CPUs"):
        fake_drive(STUDY, tmp_path, executor)
    assert executor.closed
    assert states(tmp_path) == ["pending"] * 4


def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(event) -> None:
        if isinstance(event, RunStarted) and event.run.spec.run_id == "fake/b/seed_0":
            monkeypatch.setattr(os, "replace", full)

    with pytest.raises(UserError) as caught:
        fake_drive(STUDY, tmp_path, FakeExecutor(checkpoints_in=tmp_path), fill)
    assert caught.value.file == str(tmp_path / "fake/b/seed_0/adapter.safetensors")
    assert "(No space left on device)" in caught.value.message
    assert (tmp_path / "fake/b/seed_0/checkpoint-1").is_dir()
    monkeypatch.undo()
    executor = FakeExecutor()
    fake_drive(STUDY, tmp_path, executor)
    assert executor.submitted == ["b/seed_0", "b/seed_1"]
    check_complete(STUDY, tmp_path)


def test_no_room_for_a_checkpoint_ends_the_study_and_fails_no_run(tmp_path) -> None:
    """Every other run would meet the same full disk."""
    executor = FakeExecutor({"a/seed_1": ["disk_full"]})
    with pytest.raises(UserError, match=r"no room for what it writes \(it was disk_full\)") as caught:
        fake_drive(STUDY, tmp_path, executor)
    assert caught.value.file == str(tmp_path / "fake/a/seed_1")
    assert executor.closed
    assert states(tmp_path) == ["done", "pending", "pending", "pending"]
    fake_drive(STUDY, tmp_path, FakeExecutor(), skip_failed=True)
    check_complete(STUDY, tmp_path)
