"""Commands on a study whose comparisons stopped, and on one that was continued: verdicts allow for it or fail."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from golden import check_golden
from planted_runs import PlantedRuns, study_of_loras

from peft_vit.analysis import read_results
from peft_vit.analysis.stopping import compare_all, study_courses
from peft_vit.config import study_from_mapping
from peft_vit.statistics import Course
from peft_vit.studies.commands import run_until_decided
from peft_vit.studies.request import Execution

pytestmark = pytest.mark.part("analyzer")

NOISE = (0.9, -1.1, 0.3, -0.6, 1.4, -0.8, 0.1, 0.7, -1.3, 0.4)  # points
LEAD = {"ahead": 6.0, "level": 0.2, "behind": -6.0}  # of the control, points


def mapping(**changes: Any) -> dict[str, Any]:
    whole = study_of_loras("stopped", ("level", "ahead", "base"), 10)  # the control has the largest rank
    whole["experiments"] = [*whole["experiments"][::-1], {"name": "behind", "method": "linear", "training": {}}]
    return whole | changes


def accuracy(name: str, seed: int) -> float:
    return 0.7 + 0.001 * seed + (LEAD[name] + NOISE[seed % 10] if name in LEAD else 0.0) / 100


LOOKS = {"control": "base", "margin": 1.0, "looks": [4, 7, 10], "futility": 0}


def plant(patch: pytest.MonkeyPatch) -> None:
    """Let every run end at once with the accuracy that is planted for it."""
    patch.setattr("peft_vit.studies.executors.local.LocalExecutor", lambda *_, **__: PlantedRuns(accuracy))
    patch.setattr("peft_vit.studies.executors.decode_images", lambda _: None)
    patch.setenv("COLUMNS", "140")


@pytest.fixture
def planted_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, _session_cache: str) -> Path:
    """Return the results of a study of which two comparisons were decided at the second look, and one never."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_VIT_CACHE", _session_cache)
        plant(patch)
        study = study_from_mapping(mapping(stopping=LOOKS), file=Path("stopped.yaml"))
        run_until_decided(study, out, file=Path("stopped.yaml"), execution=Execution(), tell=print)
    return out


def course_of(directory: Path, name: str) -> Course:
    (study,) = read_results(directory).studies
    return next(course for course in study_courses(study) if course.name == name)


def findings_of(command, directory: Path, output: Path) -> list[dict[str, str]]:
    """Write the report without its page; return the table of its findings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_vit.report.figure._saved", lambda *_: b"")  # only tables and texts are read
        command("report", directory, "--format", "md", "--output", output)
    (file,) = output.glob("tables/*_findings.csv")
    with file.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_findings_decide_by_looks_alone(command, stopped, tmp_path) -> None:
    tested = findings_of(command, stopped, tmp_path)
    lines = (tmp_path / "analysis_summary.md").read_text().partition("Comparisons with base that stop")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    rows = {name: " ".join(values) for name, *values in cells[2:5]}
    ahead, level = course_of(stopped, "ahead").looks[-1], course_of(stopped, "level").looks[-1]
    assert rows["ahead"] == (
        f"7 +6.0 [+4.8, +7.2] supported (p = {ahead.noninferiority.p_value:.3g}) "
        f"supported (p = {ahead.superiority.p_value:.3g}) decided"
    )
    assert rows["level"].startswith(f"10 +0.2 [−{-100 * level.low:.1f}, +{100 * level.high:.1f}] supported")
    assert rows["level"].endswith("at the last look")
    assert rows["behind"].startswith("7 −6.0 [−7.2, −4.8] refuted")
    told = [one for one in tested if "looks at results decided how many seeds ran" in one["outcome"]]
    assert {one["verdict"] for one in told} == {"not decided"}
    assert {one["p_holm"] for one in tested} == {""}


def test_recommendation_and_comparison_rest_on_looks(command, refused, stopped, planted_runs, tmp_path) -> None:
    said = command("recommend", stopped, "--smallest", "params").out
    level = course_of(stopped, "level").looks[-1]
    assert f"rejected with p = {level.noninferiority.p_value:.2g} (over all looks and comparisons)" in said
    wrong = refused("recommend", stopped, "--smallest", "params", "--margin", 2)
    assert "asked for a margin of 1, not 2 points; give --margin 1" in wrong
    file = tmp_path / "plain.yaml"
    file.write_text(json.dumps(mapping(name="plain", seeds=list(range(20, 27)))))
    command("run", file, "--output", tmp_path / "plain")
    compared = command("compare", stopped, tmp_path / "plain", "--reference", "base", "--allow-mismatch", "splits").out
    # 0.047 of the plain study: 3 x 2 / 2^7, the exact test of seven pairs over three comparisons
    p_value = course_of(stopped, "ahead").looks[-1].superiority.p_value
    rows = [line for line in compared.splitlines() if line.startswith(" ahead")]
    assert any(" stopped " in row and f"supported (p = {p_value:.2g})" in row for row in rows)
    assert any(" plain " in row and "supported (p = 0.047)" in row for row in rows)
    assert "supported" not in compared[compared.index("Over studies") :]
    text = f"$ recommend\n{said}\n$ compare\n{compared}".replace(str(stopped), "STOPPED").replace(str(tmp_path), "HERE")
    check_golden("stopped_study.txt", "\n".join(map(str.rstrip, text.splitlines())) + "\n")


def test_the_report_draws_courses_against_their_bounds(command, stopped, tmp_path) -> None:
    command("report", stopped, "--output", tmp_path, "--no-examples")
    with (tmp_path / "figures" / "stopped_courses.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    courses = [course_of(stopped, name) for name in LEAD]
    looks = [look for course in courses for look in course.looks]
    assert [int(row["pairs"]) for row in rows] == [4, 7, 4, 7, 10, 4, 7]
    for name, value in (
        ("difference", lambda look: look.difference),
        ("difference_low", lambda look: look.low),
        ("superiority_upper_bound", lambda look: look.superiority.upper_bound),
        ("noninferiority_lower_bound", lambda look: look.noninferiority.lower_bound),
        ("superiority_p", lambda look: look.superiority.p_value),
    ):
        assert [float(row[name]) for row in rows] == pytest.approx([value(look) for look in looks])
    assert "10 pairs: +0.2 [" in (tmp_path / "report.html").read_text()  # what a pointer is told
    summary = (tmp_path / "analysis_summary.md").read_text()
    assert "![Courses of the comparisons with base](figures/stopped_courses.png)" in summary
    assert "3 of 3 comparisons with base have stopped" in summary
    assert "Incomplete" not in summary, "what was not needed is not missing"
    assert "How far from base" not in summary, "no figure has intervals of a fixed number of seeds beside these"


def test_a_study_that_was_continued_gets_no_verdict(command, planted_runs, tmp_path) -> None:
    file, out = tmp_path / "plain.yaml", tmp_path / "out"

    def run(seeds: int) -> tuple[set[str], str]:
        file.write_text(json.dumps(mapping(name="plain", seeds=list(range(seeds)))))
        command("run", file, "--output", out)
        (study,) = read_results(out).studies
        return {one.verdict for one in compare_all(study, "base")}, " ".join(study.notices)

    verdicts, notices = run(7)
    assert {"supported", "refuted"} <= verdicts
    assert "Continued" not in notices
    verdicts, notices = run(9)
    assert verdicts == {"not decided"}
    assert "Continued: seeds 7, 8 of plain were added when results were there" in notices
    reason = "no verdict: seeds 7, 8 of plain were added after results"
    found = [one for one in findings_of(command, out, tmp_path / "analysis") if one["outcome"] == reason]
    assert found
    assert {(one["verdict"], one["p_holm"]) for one in found} == {("not decided", "")}
    assert f"not decided ({reason})" in command("recommend", out, "--smallest", "params").out
    assert f"Nothing is decided: {reason}." in (tmp_path / "analysis" / "analysis_summary.md").read_text()
