"""Every planned run is in one state, whatever ledger and files say; reading needs no torch and changes nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from fake_study import FakeExecutor, check_complete, done_record, fake_adapter, fake_config, fake_drive, fake_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_vit.errors import UserError
from peft_vit.records import RUN_COLUMNS, outcome_digest, read_record, write_result
from peft_vit.records.ledger import LEDGER_FILE, Row, encode, read_ledger
from peft_vit.studies.ledger import now
from peft_vit.studies.lock import study_lock
from peft_vit.studies.repair import repair
from peft_vit.studies.status import find_studies, status_lines, study_status
from peft_vit.studies.store import StudyStore
from peft_vit.studies.study_file import study_file, write_study_file

pytestmark = pytest.mark.part("runner")

STUDY = fake_config(("a", "b"), (0, 1))
RUNS = ("a/seed_0", "a/seed_1", "b/seed_0", "b/seed_1")


def begin(out, asked=RUNS):
    folder = out / "fake"
    folder.mkdir(exist_ok=True)
    write_study_file(folder, study_file(STUDY, asked, smoke=False, data_sha256=64 * "d"))
    return folder


def lay(folder, *rows: Row) -> None:
    (folder / LEDGER_FILE).write_bytes(b"".join(map(encode, rows)))


def row(run, event, attempt=1, **more) -> Row:
    return Row(at=now(), run=run, event=event, attempt=attempt, **more)


def states(folder) -> list[str]:
    return [run.state for run in study_status(folder).runs]


def test_a_study_that_goes_on_and_its_end(tmp_path) -> None:
    folder = begin(tmp_path, RUNS[:3])
    assert list(status_lines(study_status(folder))) == [
        "fake: 4 planned = 0 done + 0 failed + 3 pending + 0 running + 1 skipped"
    ]
    with study_lock(folder) as lock:
        store = StudyStore(lock, RUNS)
        store.started("a/seed_0", "process 7 on host", 90)
        store.started("a/seed_1", "process 8 on host", 90)
        (folder / "a/seed_0/checkpoint-20").mkdir(parents=True)
        (folder / "a/seed_0/checkpoint-30").mkdir()
        (folder / "a/seed_0/checkpoint-40.part").mkdir()
        store.interrupted("a/seed_1", 12)
        (folder / "a/seed_1/checkpoint-12").mkdir(parents=True)
        said = list(status_lines(study_status(folder)))
        assert said[0] == "fake: 4 planned = 0 done + 0 failed + 2 pending + 1 running + 1 skipped"
        assert said[1].startswith("  worked on by process ")
        assert said[2].startswith("  running  a/seed_0: process 7 on host, since 20")
        assert said[2].endswith(", checkpoint at step 30 of 90")
        assert said[3] == "  pending  a/seed_1: goes on from step 12 of 90"
        store.close()
    # The owner is gone: what it left under way is pending.
    assert list(status_lines(study_status(folder))) == [
        "fake: 4 planned = 0 done + 0 failed + 3 pending + 0 running + 1 skipped",
        "  pending  a/seed_0: goes on from step 30 of 90",
        "  pending  a/seed_1: goes on from step 12 of 90",
    ]
    fake_drive(STUDY, tmp_path, FakeExecutor({"b/seed_1": ["killed", "diverged"]}))
    assert list(status_lines(study_status(folder))) == [
        "fake: 4 planned = 3 done + 1 failed + 0 pending + 0 running + 0 skipped",
        "  failed   b/seed_1, attempt 2: it was diverged",
    ]


def test_what_a_dead_owner_left_is_not_running_under_the_next_one(tmp_path) -> None:
    folder = begin(tmp_path)
    lay(folder, row("a/seed_0", "started").model_copy(update={"at": "2020-01-01T00:00:00.123+00:00"}))
    with study_lock(folder):
        assert states(folder) == 4 * ["pending"]


rows = st.lists(
    st.tuples(
        st.sampled_from(RUNS),
        st.sampled_from(["started", "done", "failed", "interrupted", "lost"]),
        st.integers(1, 3),
        st.booleans(),
    ),
    max_size=12,
)


@settings(max_examples=100)
@given(rows, st.sets(st.sampled_from(RUNS)), st.sets(st.sampled_from(RUNS)), st.sets(st.sampled_from(RUNS)))
def test_planned_is_the_sum_whatever_the_ledger_and_the_files_say(tmp_path_factory, history, done, bare, asked) -> None:
    out = tmp_path_factory.mktemp("out")
    folder = begin(out, asked)
    lay(folder, *(row(run, event, attempt, retried=retried) for run, event, attempt, retried in history))
    for run in fake_plan(STUDY, out).runs:
        name = run.spec.run_id.removeprefix("fake/")
        if name in done | bare:
            write_result(out, done_record(run.spec), fake_adapter(run.spec) if name in done else None)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    found = study_status(folder)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert tuple(run.run for run in found.runs) == RUNS
    for run in found.runs:
        assert (run.state == "done") == (run.run in done)
        assert run.state != "running"
        assert run.run not in asked or run.state != "skipped"
    line = next(status_lines(found))
    planned, _, parts = line.partition(" planned = ")
    assert int(planned.split()[-1]) == sum(int(part.split()[0]) for part in parts.split(" + ")) == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # slow, and of no account here
        fake_drive(STUDY, out)  # from any of these states a study gets done
    assert states(folder) == 4 * ["done"]


def test_results_without_a_plan_are_those_of_an_earlier_version(tmp_path) -> None:
    spec = fake_plan(STUDY, tmp_path).runs[2].spec
    write_result(tmp_path, done_record(spec), fake_adapter(spec))
    (tmp_path / "report").mkdir()
    assert find_studies(tmp_path) == [tmp_path / "fake"]
    assert find_studies(tmp_path / "fake") == [tmp_path / "fake"]
    first, second = status_lines(study_status(tmp_path / "fake"))
    assert first == "fake: 1 planned = 1 done + 0 failed + 0 pending + 0 running + 0 skipped"
    assert "an earlier version" in second


def test_a_record_without_its_adapter_is_not_done_and_says_why(tmp_path) -> None:
    spec = fake_plan(STUDY, tmp_path).runs[2].spec
    write_result(tmp_path, done_record(spec), None)
    assert list(status_lines(study_status(tmp_path / "fake")))[2:] == [
        "  pending  b/seed_0: its record is here, its adapter.safetensors is not"
    ]


def test_records_of_other_runs_are_named(tmp_path) -> None:
    fake_drive(fake_config(("c",), (5,)), tmp_path)
    folder = begin(tmp_path)
    assert "  1 records are of runs that the study does not have, such as c/seed_5" in status_lines(
        study_status(folder)
    )


def test_a_record_that_cannot_be_read_is_no_result(tmp_path) -> None:
    folder = begin(tmp_path)
    for content in (b"", b"{", b"null", b'{"status": "fine", "seconds": 1}', b'{"status": "done"}', b"[" * 100_000):
        (folder / "a/seed_0").mkdir(parents=True, exist_ok=True)
        (folder / "a/seed_0/record.json").write_bytes(content)
        run = study_status(folder).runs[0]
        assert (run.state, run.note[-71:]) == (
            "pending",
            "record.json: is not a readable record; move it away and run the study again"[-71:],
        )


def test_where_there_is_no_study(tmp_path) -> None:
    with pytest.raises(UserError, match="holds no study"):
        find_studies(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        find_studies(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is no directory"):
        find_studies(tmp_path / "file")


def test_lines_that_are_no_rows_are_told_and_repaired(tmp_path) -> None:
    fake_drive(STUDY, tmp_path, FakeExecutor({"b/seed_0": ["diverged"]}))
    folder = tmp_path / "fake"
    file = folder / LEDGER_FILE
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], lines[1].replace(b"done", b"dome"), *lines[2:]]))
    _, notice, failed = status_lines(study_status(folder))
    assert notice.startswith("  ledger.jsonl: line 2 can't be read, so nothing of it counts; `peft-vit repair`")
    assert failed == "  failed   b/seed_0: it was diverged"
    assert states(folder) == ["done", "done", "failed", "done"]  # records decide
    said = list(repair(tmp_path))
    assert said[0] == f"{file}: 1 unreadable lines are gone, 7 stay"
    assert states(folder) == ["done", "done", "failed", "done"]
    (found,) = [entry for entry in read_ledger(file).rows if entry.found]
    assert (found.run, found.event, found.attempt) == ("a/seed_0", "done", 1)
    fake_drive(STUDY, tmp_path)
    check_complete(STUDY, tmp_path)


def test_a_ledger_that_is_gone_is_made_anew_from_records(tmp_path) -> None:
    fake_drive(STUDY, tmp_path, FakeExecutor({"b/seed_0": ["killed", "diverged"]}))
    before = study_status(tmp_path / "fake")
    (tmp_path / "fake" / LEDGER_FILE).unlink()
    list(repair(tmp_path))
    assert study_status(tmp_path / "fake") == before
    assert len(read_ledger(tmp_path / "fake" / LEDGER_FILE).rows) == 4


def test_the_table_of_runs(tmp_path) -> None:
    fake_drive(STUDY, tmp_path, FakeExecutor({"b/seed_0": ["diverged"]}))
    begin(tmp_path)
    (tmp_path / "fake/a/seed_1/adapter.safetensors").unlink()
    assert list(repair(tmp_path))[-1] == f"{tmp_path / 'fake/runs.parquet'}: 4 runs"
    table = pandas.read_parquet(tmp_path / "fake/runs.parquet")
    assert list(table.columns) == list(RUN_COLUMNS)
    assert list(table.state) == ["done", "pending", "failed", "done"]
    assert list(table.experiment + "/" + table.seed.astype(str)) == ["a/0", "a/1", "b/0", "b/1"]
    record = read_record(tmp_path / "fake/a/seed_0/record.json")
    first = table.iloc[0]
    assert (first.adapter_sha256, first.outcome_digest) == (record.adapter_sha256, outcome_digest(record))
    assert table.iloc[2].error == "it was diverged"
    assert table.test_accuracy.isna().all()


def test_the_table_needs_pyarrow_and_the_ledger_does_not(tmp_path, without) -> None:
    fake_drive(STUDY, tmp_path)
    (tmp_path / "fake" / LEDGER_FILE).unlink()

    without("pyarrow")
    with pytest.raises(UserError, match=r"runs\.parquet: needs the package pyarrow"):
        list(repair(tmp_path))
    check_complete(STUDY, tmp_path)


def test_repair_leaves_a_study_alone_that_is_worked_on(tmp_path) -> None:
    fake_drive(STUDY, tmp_path)
    with study_lock(tmp_path / "fake"), pytest.raises(UserError, match="works on this study"):
        list(repair(tmp_path))


def test_no_torch_is_needed(tmp_path) -> None:
    fake_drive(STUDY, tmp_path)
    code = (
        "import sys\nfrom peft_vit.cli import main\n"
        f"try:\n    main(['status', {str(tmp_path)!r}])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "assert not {'torch', 'timm', 'numpy', 'pandas'} & set(sys.modules), 'imported'"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "fake: 4 planned = 4 done + 0 failed + 0 pending + 0 running + 0 skipped\n"


def test_an_error_of_somebody_does_nothing_to_a_terminal(tmp_path) -> None:
    folder = begin(tmp_path)
    lay(folder, row("a/seed_0", "started"), row("a/seed_0", "failed", error="\x1b]0;x\x07\nb/seed_0: \u202eenod"))
    *_, line = status_lines(study_status(folder))
    assert line == r"  failed   a/seed_0: \x1b]0;x\x07\nb/seed_0: \u202eenod"


def test_nothing_is_written_or_removed_through_a_link(tmp_path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / "fake").mkdir(parents=True)
    folder = begin(out)
    record = done_record(fake_plan(STUDY, elsewhere).pending[0].spec)
    write_result(elsewhere, record, fake_adapter(record.spec))
    (elsewhere / "fake/a/seed_0/checkpoint-20").mkdir()
    (folder / "a").symlink_to(elsewhere / "fake/a")
    lay(folder, row("a/seed_0", "started"), row("a/seed_0", "done"))
    with pytest.raises(UserError, match="fake/a: is a link, and results go into real folders only"):
        list(repair(out))
    assert study_status(folder).runs[0].note.startswith(f"{folder}/a: is a link")
    (folder / "a").unlink()
    folder.rename(elsewhere / "whole")
    folder.symlink_to(elsewhere / "whole")
    before = sorted(elsewhere.rglob("*"))
    with pytest.raises(UserError, match="out/fake: is a link, and results go into real folders only"):
        list(repair(out))
    assert sorted(elsewhere.rglob("*")) == before
    assert (elsewhere / "fake/a/seed_0/checkpoint-20").is_dir()


def test_an_impossible_name_is_no_study() -> None:
    for name in ("n" * 300, "a\0b"):
        with pytest.raises(UserError, match="does not exist"):
            find_studies(Path(name))
