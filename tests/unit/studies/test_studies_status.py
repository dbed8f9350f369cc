"""Every planned run is in one state, whatever files say; reading needs no torch and changes nothing."""

import os
import re
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
from golden import check_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_vit.base.errors import UserError
from peft_vit.runs.executors import Notice
from peft_vit.runs.records.progress import (
    PROGRESS_FILE,
    Attempt,
    find_studies,
    status_lines,
    study_lock,
    study_status,
    utc_now,
)
from peft_vit.runs.records.storage import read_record, write_result, write_study_file
from peft_vit.runs.scheduling.scheduler import StudyStore, study_file

pytestmark = pytest.mark.part("runner")

STUDY = fake_config(("a", "b"), (0, 1))
RUNS = ("a/seed_0", "a/seed_1", "b/seed_0", "b/seed_1")


def begin(out, asked=RUNS):
    folder = out / "fake"
    folder.mkdir(exist_ok=True)
    write_study_file(folder, study_file(STUDY, asked, smoke=False, data_sha256=64 * "d"))
    return folder


def lay(folder, run, number, state, **more) -> None:
    (folder / run).mkdir(parents=True, exist_ok=True)
    attempt = Attempt(number=number, state=state, **{"started_at": utc_now(), **more})
    (folder / run / PROGRESS_FILE).write_text(attempt.model_dump_json())


def said(folder: Path) -> list[str]:
    """Return what `status` prints, without what differs from call to call."""
    lines = "\n".join(status_lines(study_status(folder))).replace(str(folder), "DIR")
    lines = re.sub(r"process \d+ on \S+ since .*", "PROCESS", lines)
    return re.sub(r"since 20[-0-9T:.+]+", "since TIME", lines).split("\n")


def test_what_is_said_of_a_study_from_its_beginning_to_its_end(tmp_path) -> None:
    folder = begin(tmp_path, RUNS[:3])
    document = ["# begun", *said(folder)]
    with study_lock(folder) as lock:
        store = StudyStore(lock, RUNS)
        store.started("a/seed_0", "process 7 of a node", 90)
        store.started("a/seed_1", "process 8 of a node", 90)
        (folder / "a/seed_0/checkpoint-20").mkdir(parents=True)
        (folder / "a/seed_0/checkpoint-30").mkdir()
        (folder / "a/seed_0/checkpoint-40.part").mkdir()
        store.interrupted("a/seed_1")
        (folder / "a/seed_1/checkpoint-12").mkdir(parents=True)
        document += ["# at work", *said(folder)]
    document += ["# the owner is gone: what it left under way is pending", *said(folder)]
    fake_drive(STUDY, tmp_path, FakeExecutor({"b/seed_1": ["killed", "diverged"]}))
    document += ["# ended, a run has failed", *said(folder)]
    (folder / "a/seed_0/adapter.safetensors").unlink()
    document += ["# a record has lost its adapter", *said(folder)]
    lay(folder, "b/seed_1", 3, "failed", error="\x1b]0;x\x07\nb/seed_0: \u202eenod")
    document += ["# an error that would do something to a terminal", *said(folder)]
    (folder / "a/seed_0" / PROGRESS_FILE).write_bytes(b"[" * 100_000)
    (folder / "a/seed_1/record.json").write_text('{"status": "fine", "seconds": 1}')
    (folder / "b/seed_0/record.json").unlink()
    (folder / "b/seed_0" / PROGRESS_FILE).mkdir()
    document += ["# spoiled files", *said(folder)]
    fake_drive(fake_config(("c",), (5,)), tmp_path / "other")
    (tmp_path / "other/fake/c").rename(folder / "c")
    document += ["# a record of another study", *said(folder)]
    (folder / "study.json").unlink()
    (folder / "a/seed_1/record.json").unlink()
    document += ["# without study.json, as an earlier version made it", *said(folder)]
    check_golden("status.txt", "\n".join(document) + "\n")


# What a run's folder may hold: a record with its attempts, an adapter, and what is known of an attempt.
held = st.tuples(
    st.none() | st.tuples(st.sampled_from(["done", "failed"]), st.integers(1, 3)),
    st.booleans(),
    st.none()
    | st.just("spoiled")
    | st.tuples(st.integers(1, 4), st.sampled_from(["running", "interrupted", "failed"])),
)


@settings(max_examples=100)
@given(st.lists(held, min_size=4, max_size=4), st.sets(st.sampled_from(RUNS)))
def test_planned_is_the_sum_whatever_the_files_say(tmp_path_factory, holdings, asked) -> None:
    out = tmp_path_factory.mktemp("out")
    folder = begin(out, asked)
    done, failed, begun = set(), set(), {}
    for run, (end, has_adapter, attempt) in zip(fake_plan(STUDY, out).runs, holdings, strict=True):
        name = run.spec.name
        (folder / name).mkdir(parents=True)
        if has_adapter:
            (folder / name / "adapter.safetensors").write_bytes(fake_adapter(run.spec))
        if end is not None:
            record = done_record(run.spec) if end[0] == "done" else failed_record(run.spec, "error")
            write_result(out, record.model_copy(update={"attempts": end[1]}), None)
        if attempt == "spoiled":
            (folder / name / PROGRESS_FILE).write_bytes(b"\xff{")
        elif attempt is not None:
            lay(folder, name, *attempt)
        begun[name] = max(0 if end is None else end[1], attempt[0] if isinstance(attempt, tuple) else 0)
        if end is not None and end[0] == "done" and has_adapter:
            done.add(name)
        elif end is not None and end[0] == "failed" and begun[name] == end[1]:
            failed.add(name)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    status = study_status(folder)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert tuple(run.run for run in status.runs) == RUNS
    for run in status.runs:
        assert (run.state == "done") == (run.run in done)
        assert (run.state == "failed") == (run.run in failed)
        assert run.attempts == begun[run.run] or run.state == "done"
        assert run.state != "running"
        assert run.run not in asked or run.state != "skipped"
    line = next(status_lines(status))
    planned, _, parts = line.partition(" planned = ")
    assert int(planned.split()[-1]) == sum(int(part.split()[0]) for part in parts.split(" + ")) == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # slow, and of no account here
        executor = FakeExecutor()
        fake_drive(STUDY, out, executor)  # from any of these states a study gets done
    assert set(executor.submitted) == set(RUNS) - done
    check_complete(STUDY, out)
    for run in executor.submitted:
        assert read_record(folder / run / "record.json").attempts == begun[run] + 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", "holds no study"),
        ("nowhere", "does not exist"),
        ("file", "file: is not a folder"),
        ("n" * 300, "does not exist"),
        ("a\0b", "does not exist"),
    ],
)
def test_where_there_is_no_study(tmp_path, name, words) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        find_studies(tmp_path / name)
    spec = fake_plan(STUDY, tmp_path).runs[2].spec
    write_result(tmp_path, done_record(spec), fake_adapter(spec))
    assert find_studies(tmp_path) == find_studies(tmp_path / "fake") == [tmp_path / "fake"]


def test_a_progress_file_that_cannot_be_read_or_written_is_told(tmp_path) -> None:
    folder = begin(tmp_path)
    (folder / "a/seed_0").mkdir(parents=True)
    (folder / "a/seed_0" / PROGRESS_FILE).write_bytes(b"[")
    (folder / "a/seed_1" / PROGRESS_FILE).mkdir(parents=True)
    told = []
    with pytest.raises(UserError, match=r"a/seed_1/progress\.json: can't be written \(Is a directory\)"):
        fake_drive(STUDY, tmp_path, on_event=told.append)
    (folder / "a/seed_1" / PROGRESS_FILE).rmdir()
    notices = [event.text.split(":")[0] for event in told if isinstance(event, Notice)]
    assert notices == ["a/seed_0", "a/seed_1"]
    fake_drive(STUDY, tmp_path)
    check_complete(STUDY, tmp_path)


def test_nothing_is_written_or_removed_through_a_link(tmp_path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / "fake").mkdir(parents=True)
    folder = begin(out)
    record = done_record(fake_plan(STUDY, elsewhere).pending[0].spec)
    write_result(elsewhere, record, fake_adapter(record.spec))
    (elsewhere / "fake/a/seed_0/checkpoint-20").mkdir()
    (folder / "a").symlink_to(elsewhere / "fake/a")
    with pytest.raises(UserError, match="fake/a: is a link, and results go into real folders only"):
        fake_drive(STUDY, out)
    assert study_status(folder).runs[0].note.startswith(f"{folder}/a: is a link")
    assert (elsewhere / "fake/a/seed_0/checkpoint-20").is_dir()
