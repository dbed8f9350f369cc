"""Where results may have decided how many seeds there are, nothing is tested: reports and commands say why."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from planted_runs import PlantedRuns, study_of_loras

from peft_vit.lab.analysis import read_results
from peft_vit.lab.analysis.comparison import compare_all
from peft_vit.runs.records.storage import STUDY_FILE

pytestmark = pytest.mark.part("analyzer")

LEAD = {"ahead": 6.0, "base": 0.0, "behind": -6.0}  # points
NOISE = (0.9, -1.1, 0.3, -0.6, 1.4, -0.8, 0.1, 0.7, -1.3)
STOPPING = {"control": "base", "asked": "superiority", "every": 2}  # of experiments/, nothing here knows what it means


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> PlantedRuns:
    """Let every run end at once with the accuracy that is planted for it."""
    executor = PlantedRuns(lambda name, seed: 0.7 + (LEAD[name] + (name != "base") * NOISE[seed]) / 100)
    monkeypatch.setattr("peft_vit.runs.executors.local.LocalExecutor", lambda *_, **__: executor)
    monkeypatch.setattr("peft_vit.runs.executors.decode_images", lambda _: None)
    return executor


def write(file: Path, seeds: int, **changes: object) -> Path:
    study = study_of_loras("colours", ("ahead", "base"), seeds)
    probe = {"name": "behind", "method": "linear", "training": {}}
    file.write_text(json.dumps(study | {"experiments": [*study["experiments"], probe], **changes}))
    return file


def verdicts(out: Path) -> set[str]:
    (study,) = read_results(out).studies
    return {comparison.verdict for comparison in compare_all(study, "base")}


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    "reason",
    [
        "no verdict: seeds 7, 8 of colours were added after results",
        "no verdict: looks at results decided how many seeds ran",
    ],
)
def test_findings_comparisons_and_recommendation_say_why(command, tmp_path, monkeypatch, reason) -> None:
    file, out, page = tmp_path / "colours.yaml", tmp_path / "out", tmp_path / "page"
    command("run", write(file, 7), "--output", out)
    assert "supported" in verdicts(out)
    if "added" in reason:
        command("run", write(file, 9), "--output", out)
        (study,) = read_results(out).studies
        assert "Not declared: seeds 7, 8 of colours were added after results were there" in " ".join(study.notices)
    else:
        kept = out / "colours" / STUDY_FILE
        content = json.loads(kept.read_text())
        content["configuration"]["stopping"] = STOPPING
        kept.write_text(json.dumps(content))
    assert verdicts(out) == {"not decided"}
    monkeypatch.setattr("peft_vit.deploy.page.figure._saved", lambda *_, **__: b"")  # only texts are read
    command("report", out, "--format", "md", "--output", page)
    (findings,) = page.glob("tables/*_findings.csv")
    with findings.open(newline="", encoding="utf-8") as handle:
        told = [finding for finding in csv.DictReader(handle) if finding["outcome"] == reason]
    assert told
    assert {(finding["verdict"], finding["p_holm"]) for finding in told} == {("not decided", "")}
    assert f"not decided; {reason}" in command("recommend", out, "--smallest", "params").out
    assert f"Nothing is decided: {reason}." in (page / "analysis_summary.md").read_text()


def test_a_study_that_declares_looks_is_not_run_here(command, refused, runs, tmp_path) -> None:
    file, out = write(tmp_path / "colours.yaml", 7, stopping=STOPPING), tmp_path / "out"
    assert "21 runs: 21 to do" in command("run", file, "--output", out, "--dry-run").out
    said = refused("run", file, "--output", out)
    assert said.startswith(f"error: {file}: stopping: is read by scripts of experiments/ alone; delete it")
    assert runs.done == []
    assert not out.exists()
