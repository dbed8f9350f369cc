"""`run --until-decided`: decided comparisons stop, open ones go on; what reports and commands then allow for it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden import check_golden
from planted_runs import PlantedRuns, study_of_loras

from peft_vit.base.statistics import SequentialResult
from peft_vit.core.config import study_from_mapping
from peft_vit.lab.analysis import read_results
from peft_vit.lab.analysis.stopping import compare_all, sequential_results
from peft_vit.lab.request import RunRequest
from peft_vit.lab.run_studies import run_until_decided
from peft_vit.runs.costs.time_limit import Limit
from peft_vit.runs.records.storage import RECORD_FILE, read_record

pytestmark = pytest.mark.part("analyzer")

SEEDS = 12
NOISE = (0.9, -1.1, 0.3, -0.6, 1.4, -0.8, 0.1, 0.7, -1.3, 0.4, -0.2, 0.6)  # points
LEAD = {"ahead": 6.0, "level": 0.3, "behind": -6.0}  # of the control, points
STOPPING: dict[str, Any] = {"control": "base", "margin": 1.0, "looks": [4, 8, SEEDS]}


def mapping(**changes: Any) -> dict[str, Any]:
    """Return a study whose control has the largest rank; one of its rivals has none."""
    loras = study_of_loras("colours", ("level", "ahead", "base"), SEEDS)
    behind = {"name": "behind", "method": "linear", "training": {}}
    return loras | {"stopping": STOPPING, "experiments": [*loras["experiments"][::-1], behind], **changes}


def write(file: Path, **changes: Any) -> Path:
    file.write_text(json.dumps({key: value for key, value in mapping(**changes).items() if value is not None}))
    return file


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    return lambda **changes: write(tmp_path / "colours.yaml", **changes)


def accuracy(name: str, seed: int) -> float:
    own = LEAD[name] + NOISE[seed % SEEDS] if name in LEAD else 0.0
    return 0.7 + 0.001 * seed + own / 100


def plant(patch: pytest.MonkeyPatch, executor: PlantedRuns) -> PlantedRuns:
    """Let every run end at once with the accuracy that is planted for it."""
    patch.setattr("peft_vit.runs.executors.local.LocalExecutor", lambda *_, **__: executor)
    patch.setattr("peft_vit.runs.executors.decode_images", lambda _: None)
    patch.setenv("COLUMNS", "140")
    return executor


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> PlantedRuns:
    return plant(monkeypatch, PlantedRuns(accuracy))


def lines_of(said: str) -> list[str]:
    return [line for line in said.splitlines() if " minus base, " in line]


def seeds_of(output: Path) -> dict[str, int]:
    return {name: len([*(output / "colours" / name).glob(f"seed_*/{RECORD_FILE}")]) for name in ("base", *LEAD)}


WHOLE = {"base": 12, "ahead": 8, "level": 12, "behind": 8}


def test_what_is_decided_stops_and_what_is_open_goes_on(command, file, runs, tmp_path) -> None:
    out = tmp_path / "out"
    arguments = ("run", file(), "--until-decided", "--output", out)
    shown = command(*arguments, "--dry-run").out
    assert "48 runs: 48 to do" in shown
    assert runs.done == []
    said = command(*arguments).out
    lines = lines_of(said)
    assert "+6.11 points" in lines[3]  # 6 and the mean of eight of NOISE
    assert seeds_of(out) == WHOLE
    assert len(runs.done) == sum(WHOLE.values())
    again = command(*arguments).out
    assert lines_of(again) == [lines[3], lines[6], lines[5]], "nothing is done again"
    assert len(runs.done) == sum(WHOLE.values())
    check_golden("until_decided.txt", "\n".join([*lines, "# again", *lines_of(again), command("status", out).out]))


def test_a_command_that_was_killed_goes_on(command, file, runs, tmp_path) -> None:
    out = tmp_path / "out"
    arguments = ("run", file(), "--until-decided", "--output", out)
    for after in (3, 29):
        runs.left = after - len(runs.done)
        command(*arguments, code=130)
        assert sum(seeds_of(out).values()) == after
    runs.left = 100
    assert lines_of(command(*arguments).out)[-1].startswith("level minus base, 12 pairs")
    assert seeds_of(out) == WHOLE
    assert len(set(runs.done)) == len(runs.done), "what was done was not done again"


def test_a_run_that_fails_leaves_its_comparison_open(command, file, runs, tmp_path) -> None:
    out = tmp_path / "out"
    arguments = ("run", file(), "--until-decided", "--output", out)
    runs.accuracy = lambda name, seed: None if (name, seed) == ("behind", 5) else accuracy(name, seed)
    said = command(*arguments, code=1)
    assert "colours/behind/seed_5: it was planted" in said.err
    assert "Open: behind; the same command continues." in said.out
    assert seeds_of(out)["ahead"] == 8
    runs.accuracy = accuracy
    assert lines_of(command(*arguments).out)[-1].startswith("behind minus base, 8 pairs of at most 12: -5.89 points")
    assert seeds_of(out) == WHOLE
    runs.accuracy = lambda name, seed: None if (name, seed) == ("base", 4) else accuracy(name, seed)
    control_failed = command("run", file(), "--until-decided", "--output", tmp_path / "other", code=1)
    assert "Open: ahead, level, behind;" in control_failed.out


def test_it_is_called_from_python_and_ends_when_the_time_is_over(runs, tmp_path) -> None:
    now = [0.0]

    def takes_a_minute(name: str, seed: int) -> float:
        now[0] += 60
        return accuracy(name, seed)

    runs.accuracy = takes_a_minute
    study = study_from_mapping(mapping(), file=Path("built in memory"))
    request = RunRequest.of(configs=["built in memory"], output=tmp_path)
    told: list[str] = []

    def call(minutes: float) -> list[str]:
        limit = Limit(minutes, now[0], clock=lambda: now[0])
        failed, still_open = run_until_decided(study, request, limit, told.append)
        assert failed == {}
        return still_open

    assert call(10) == [*LEAD]
    assert len(runs.done) == 10
    assert told == []
    assert call(25) == ["level"]
    assert [line.split(":")[0] for line in told[3:]] == [f"{name} minus base, 8 pairs of at most 12" for name in LEAD]
    assert call(1000) == []
    assert seeds_of(tmp_path) == WHOLE


UNTIL = "--until-decided"
REFUSED = [  # options, changes of the study, and what the line says
    ((UNTIL,), {"stopping": None}, "stopping: is missing"),
    ((), {}, "stopping: says when comparisons stop, which needs --until-decided"),
    (("--minutes", 5), {}, "which needs --until-decided"),
    ((UNTIL, "--smoke"), {}, "--until-decided: has no effect with --smoke"),
    ((UNTIL, "--method", "lora"), {}, "--until-decided: has no effect with --method"),
    ((UNTIL, "--seeds", "0,1"), {}, "--until-decided: has no effect with --seeds"),
    ((UNTIL, "--minutes", 0), {}, "--minutes: "),
    ((UNTIL,), {"stopping": {**STOPPING, "control": "none"}}, "'none' is not one of"),
]


@pytest.mark.parametrize(("options", "changes", "said"), REFUSED)
def test_what_makes_no_sense_is_refused_and_nothing_is_run(
    refused, file, runs, tmp_path, options, changes, said
) -> None:
    assert said in refused("run", file(**changes), "--output", tmp_path / "out", *options)
    assert "--until-decided: is of one study" in refused("run", file(), file(), UNTIL, "--output", tmp_path)
    assert runs.done == []
    assert not list(tmp_path.rglob("study.json"))


@pytest.mark.usefixtures("in_this_process")
def test_runs_that_train_are_compared_by_what_they_reach(command, images, weights, tmp_path, monkeypatch) -> None:
    """Colours that are told apart after six steps of all weights, and not by an adapter that hardly moves."""
    monkeypatch.setattr("peft_vit.core.adapters.footprint.give_memory_back", lambda: None)  # which walks all of pytest
    training = {"steps": 6, "validate_every": 6, "batch_size": 12}
    folder = {"dataset": "image-folder", "path": str(images), "image_size": 32, "test_split": "per_seed"}
    study = mapping(
        seeds=list(range(6)),
        backbone={"model": "test_vit", "weights": "file", "file": str(weights)},
        data={**folder, "train_images": 24, "validation_images": 6, "test_images": 18},
        experiments=[
            {"name": "idle", "method": "lora", "lora": {"rank": 1}, "training": {**training, "learning_rate": 1e-6}},
            {"name": "learns", "method": "full", "training": {**training, "learning_rate": 3e-3}},
        ],
        stopping={"control": "idle", "asked": "superiority", "every": 3, "spending": "pocock"},
    )
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps(study))
    (line,) = [
        line
        for line in command("run", file, "--until-decided", "--output", tmp_path).out.splitlines()
        if " minus idle, " in line
    ]
    accuracies = {
        name: [read_record(tmp_path / f"colours/{name}/seed_{seed}" / RECORD_FILE).test.accuracy for seed in range(3)]
        for name in ("idle", "learns")
    }
    lead = sum(accuracies["learns"]) / 3 - sum(accuracies["idle"]) / 3
    assert f"learns minus idle, 3 pairs of at most 6: {100 * lead:+.2f} points" in line
    assert line.endswith("Decided.")
    assert len([*(tmp_path / "colours").glob("*/seed_*")]) == 6


# --- reports and commands on a study of which two comparisons were decided early ---


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, _session_cache: str) -> Path:
    """Return the results of a study of which two comparisons were decided at the second look, and one never."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_VIT_CACHE", _session_cache)
        plant(patch, PlantedRuns(accuracy))
        study = study_from_mapping(mapping(name="stopped"), file=Path("stopped.yaml"))
        run_until_decided(study, RunRequest.of(configs=["stopped.yaml"], output=out), None, print)
    return out


def course_of(directory: Path, name: str) -> SequentialResult:
    (study,) = read_results(directory).studies
    return next(course for course in sequential_results(study) if course.name == name)


def findings_of(command, directory: Path, output: Path) -> list[dict[str, str]]:
    """Write the report without its page; return the table of its findings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_vit.deploy.page.figure._saved", lambda *_, **options: b"")  # only tables and texts are read
        command("report", directory, "--format", "md", "--output", output)
    (file,) = output.glob("tables/*_findings.csv")
    with file.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_findings_decide_by_looks_alone(command, stopped, tmp_path) -> None:
    tested = findings_of(command, stopped, tmp_path)
    told = [finding for finding in tested if "looks at results decided how many seeds ran" in finding["outcome"]]
    assert {finding["verdict"] for finding in told} == {"not decided"}
    assert {finding["p_holm"] for finding in tested} == {""}
    summary = (tmp_path / "analysis_summary.md").read_text().partition("Comparisons with base that stop")[2]
    ahead = course_of(stopped, "ahead").looks[-1]
    assert f"supported (p = {ahead.noninferiority.p_value:.3g})" in summary
    assert f"supported (p = {ahead.superiority.p_value:.3g})" in summary
    check_golden("stopped_study.md", "\n".join(summary.splitlines()[2:7]) + "\n")


def test_the_report_draws_courses_against_their_bounds(command, stopped, tmp_path) -> None:
    command("report", stopped, "--output", tmp_path, "--no-examples")
    with (tmp_path / "figures" / "stopped_courses.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    courses = [course_of(stopped, name) for name in LEAD]
    looks = [look for course in courses for look in course.looks]
    assert [int(row["pairs"]) for row in rows] == [4, 8, 4, 8, 12, 4, 8]
    for name, value in (
        ("difference", lambda look: look.difference),
        ("difference_low", lambda look: look.low),
        ("superiority_upper_bound", lambda look: look.superiority.upper_bound),
        ("noninferiority_lower_bound", lambda look: look.noninferiority.lower_bound),
    ):
        assert [float(row[name]) for row in rows] == pytest.approx([value(look) for look in looks])
    assert "12 pairs: +0.3 [" in (tmp_path / "report.html").read_text()  # what a pointer is told
    summary = (tmp_path / "analysis_summary.md").read_text()
    assert "![How the comparisons went with base](figures/stopped_courses.png)" in summary
    assert "3 of 3 comparisons with base have stopped" in summary
    assert "Incomplete" not in summary, "what was not needed is not missing"
    assert "How far from base" not in summary, "no figure has intervals of a fixed number of seeds beside these"


def test_a_study_that_was_continued_gets_no_verdict(command, runs, tmp_path) -> None:
    file, out = tmp_path / "plain.yaml", tmp_path / "out"

    def run(seeds: int) -> tuple[set[str], str]:
        write(file, name="plain", stopping=None, seeds=list(range(seeds)))
        command("run", file, "--output", out)
        (study,) = read_results(out).studies
        return {comparison.verdict for comparison in compare_all(study, "base")}, " ".join(study.notices)

    verdicts, notices = run(7)
    assert {"supported", "refuted"} <= verdicts
    assert "Not declared" not in notices
    verdicts, notices = run(9)
    assert verdicts == {"not decided"}
    assert "Not declared: seeds 7, 8 of plain were added after results were there" in notices
    reason = "no verdict: seeds 7, 8 of plain were added after results"
    findings = [finding for finding in findings_of(command, out, tmp_path / "analysis") if finding["outcome"] == reason]
    assert findings
    assert {(finding["verdict"], finding["p_holm"]) for finding in findings} == {("not decided", "")}
    assert f"not decided; {reason}" in command("recommend", out, "--smallest", "params").out
    assert f"Nothing is decided: {reason}." in (tmp_path / "analysis" / "analysis_summary.md").read_text()
