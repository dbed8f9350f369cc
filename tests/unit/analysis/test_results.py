"""Bad input among results: one bad file hides no good one, and nothing is left out without its name."""

import json
import os
import shutil
from collections.abc import Callable

import planted
import pytest
from unfinished import BAD, EXPERIMENTS, GOOD, attempt, planned, results_with

from peft_vit.base.errors import UserError
from peft_vit.lab.analysis import load_studies, read_results
from peft_vit.runs.records.progress import PROGRESS_FILE, study_lock
from peft_vit.runs.records.scan import read_records
from peft_vit.runs.records.storage import RECORD_FILE


def spoiled(change: Callable[[dict], object]) -> bytes:
    data = json.loads(planted.record(EXPERIMENTS["lora_r8"], 1, 0.8).model_dump_json())
    change(data)
    return json.dumps(data).encode()


SPOILED = {
    "torn": (b'{"schema_ver', "is not a readable record"),
    "a row twice": (spoiled(lambda d: d["steps"].insert(5, d["steps"][5])), "steps: step 6 occurs twice"),
    "an epoch twice": (spoiled(lambda d: d["evaluations"].append(d["evaluations"][-1])), "evaluations: step 48"),
    "units mixed": (
        spoiled(lambda d: d["rank_history"].append({**d["rank_history"][0], "step": 9, "unit": "bytes"})),
        "rank_history: budgets in different units (bytes, ranks)",
    ),
}


@pytest.mark.parametrize(("content", "words"), SPOILED.values(), ids=SPOILED)
def test_a_bad_record_is_named_and_the_good_ones_count(content, words, tmp_path) -> None:
    results = read_results(results_with(tmp_path, content))
    (study,) = results.studies
    assert [run.seed for run in study.runs] == [0, 1, 2]
    assert not results.is_complete
    (line,) = results.lines()
    assert line.startswith(f"left out: {tmp_path / BAD}: {words}")
    assert study.notices[0].startswith(f"Left out: {BAD}: {words}")
    assert [(run.experiment, run.seed, run.state) for run in study.unfinished] == [("lora_r8", 1, "left out")]
    assert study.counts() | {"done": 3, "failed": 0, "left out": 1} == study.counts()
    for strict in (load_studies, lambda folder: list(read_records(folder))):
        with pytest.raises(UserError, match=f"{BAD}: "):
            strict(tmp_path)


def test_where_nothing_can_be_read_every_file_is_named_and_those_of_two_schemas_in_one_notice(tmp_path) -> None:
    results_with(tmp_path, b'{"schema_version": 2}')
    stranger = tmp_path / "quickstart/lora_r8/seed_6/record.json"
    stranger.parent.mkdir()
    stranger.write_text('{"schema_version": 2}')
    (study,) = read_results(tmp_path).studies
    assert f"{BAD}, quickstart/lora_r8/seed_6/record.json: schema_version" in study.notices[0]
    for file in tmp_path.rglob(RECORD_FILE):
        file.write_text("[]")
    with pytest.raises(UserError) as caught:
        read_results(tmp_path)
    assert "linear_probe/seed_0/record.json: " in str(caught.value)
    runs = ("linear_probe/seed_1", "linear_probe/seed_2", "lora_r8/seed_1", "lora_r8/seed_6")
    files = [str(tmp_path / "quickstart" / run / RECORD_FILE) for run in runs]
    assert [line.split(":")[1].strip() for line in caught.value.details.splitlines()] == files


@pytest.mark.parametrize(("accuracy", "seeds"), [(0.7, [0, 1, 2]), (0.9, [1, 2])])
def test_the_same_record_in_two_folders_counts_once_and_two_that_differ_not_at_all(tmp_path, accuracy, seeds) -> None:
    planted.write(tmp_path / "b", GOOD)
    planted.write(tmp_path / "a", [planted.record(EXPERIMENTS["linear_probe"], 0, accuracy)])
    results = read_results(tmp_path)
    (study,) = results.studies
    assert [run.seed for run in study.runs] == seeds
    differ = accuracy != 0.7
    assert (results.is_complete, len(results.lines())) == (not differ, 1 + differ)
    assert [(run.seed, run.state) for run in study.unfinished] == [(0, "left out")] * differ
    assert all("quickstart/linear_probe/seed_0/record.json: " in line for line in results.lines())
    if differ:
        with pytest.raises(UserError, match="quickstart/linear_probe/seed_0"):
            load_studies(tmp_path)


def test_a_link_to_a_folder_is_named_and_not_followed(tmp_path) -> None:
    planted.write(tmp_path / "out", GOOD)
    planted.write(tmp_path / "elsewhere", GOOD)
    (tmp_path / "out" / "linked").symlink_to(tmp_path / "elsewhere")
    results = read_results(tmp_path / "out")
    assert [problem.file for problem in results.problems] == ["linked"]
    assert results.is_complete


# --- what was planned -------------------------------------------------------------------------------------------------


def test_every_planned_run_is_in_one_state(tmp_path) -> None:
    broken = planted.failed(EXPERIMENTS["linear_probe"], 2, "out of memory")
    begun = {
        "lora_r8/seed_0": attempt("running", worker="worker 1"),
        "lora_r8/seed_1": attempt("failed", error="killed"),
    }
    folder = planned(tmp_path, [*GOOD[:2], broken], begun, left_out="lora_r8/seed_2")
    with study_lock(folder / "quickstart"):
        (study,) = read_results(folder).studies
    assert [(run.experiment, run.seed, run.state) for run in study.unfinished] == [
        ("lora_r8", 0, "running"),
        ("lora_r8", 1, "pending"),
        ("lora_r8", 2, "skipped"),
    ]
    assert study.unfinished[1].note == "to be tried again after: killed"
    assert list(study.counts().values()) == [2, 1, 0, 1, 1, 1, 0]
    assert sum(study.counts().values()) == 6
    text = "\n".join(study.notices)
    assert f"In progress: process {os.getpid()} on" in text
    assert "Incomplete: 3 of 6 planned runs are not done yet" in text
    assert "Running: lora_r8 seed 0. Pending: lora_r8 seed 1. Skipped: lora_r8 seed 2." in text
    (alone,) = read_results(folder).studies
    assert alone.unfinished[0].state == "pending"
    assert "In progress" not in "\n".join(alone.notices)


def test_a_study_of_which_only_its_file_is_there(tmp_path) -> None:
    (study,) = read_results(planned(tmp_path, [], {})).studies
    assert (study.name, study.runs, study.failed) == ("quickstart", (), ())
    assert [e.name for e in study.experiments] == ["linear_probe", "lora_r8"]
    assert study.counts()["pending"] == 6
    (alone,) = read_results(tmp_path / "quickstart").studies  # the study's folder itself
    assert (alone.unfinished, alone.notices) == (study.unfinished, study.notices)


def test_a_progress_file_that_cannot_be_read_is_told_and_counts_as_not_there(tmp_path) -> None:
    folder = planned(tmp_path, GOOD, {"lora_r8/seed_0": attempt("interrupted")})
    (folder / "quickstart/lora_r8/seed_0" / PROGRESS_FILE).write_bytes(b"{torn")
    results = read_results(folder)
    assert (results.is_complete, results.lines()) == (True, [])
    run = results.studies[0].unfinished[0]
    assert (run.state, run.note) == ("pending", "its progress.json can't be read and counts as not there")


def test_what_an_earlier_version_wrote_beside_records_is_no_file_of_others(tmp_path) -> None:
    folder = planned(tmp_path, GOOD, {})
    before = read_results(folder)
    rows = b'{"at":"2999-01-01T00:00:00+00:00","attempt":1,"event":"failed","run":"lora_r8/seed_0"}\n{torn'
    (folder / "quickstart" / "ledger.jsonl").write_bytes(rows)
    (folder / "quickstart" / "runs.parquet").write_bytes(b"PAR1")
    assert read_results(folder) == before


def test_a_damaged_study_file_does_not_hide_its_records(tmp_path) -> None:
    folder = planned(tmp_path, GOOD, {})
    (folder / "quickstart" / "study.json").write_text('{"schema_version": 2}')
    results = read_results(folder)
    assert len(results.studies[0].runs) == 3
    assert results.lines()[0].startswith(f"left out: {folder}/quickstart/study.json: schema_version: ")


def test_results_of_two_machines_are_one_plan(tmp_path) -> None:
    planned(tmp_path / "one", GOOD[:1], {})
    planned(tmp_path / "two", GOOD[1:2], {})
    (study,) = read_results(tmp_path).studies
    assert (study.counts()["done"], study.counts()["pending"]) == (2, 4)


def test_records_that_were_not_planned_count_and_are_named(tmp_path) -> None:
    strangers = [planted.record(EXPERIMENTS["lora_r4"], seed, 0.8) for seed in (0, 1, 2, 5)]
    (study,) = read_results(planned(tmp_path, strangers, {})).studies
    assert len(study.runs) == 4
    assert any(n.startswith("Not planned: study.json does not name lora_r4 seeds 0–2, 5") for n in study.notices)


def test_the_order_in_which_folders_were_made_changes_nothing(tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    results_with(one, b"[]")
    for file in sorted(one.rglob(RECORD_FILE), reverse=True):
        (two / file.relative_to(one)).parent.mkdir(parents=True)
        shutil.copy(file, two / file.relative_to(one))
    assert read_results(one).studies == read_results(two).studies


def test_budgets_in_different_units_are_named() -> None:
    adaptive = EXPERIMENTS["adalora_top_k_fisher"]
    other = planted.record(adaptive.model_copy(update={"name": "by_bytes"}), 0, 0.8)
    in_bytes = [entry.model_copy(update={"unit": "bytes"}) for entry in other.rank_history]

    records = [planted.record(adaptive, 0, 0.8), other.model_copy(update={"rank_history": in_bytes})]
    study = planted.study_of(records)
    assert any("(bytes: by_bytes; ranks: adalora_top_k_fisher)" in notice for notice in study.notices)
