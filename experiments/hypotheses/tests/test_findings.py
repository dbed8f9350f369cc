"""Registered or exploratory, own hypotheses, and what the command prints, writes and refuses."""

import csv
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import planted
import pytest

from experiments.hypotheses import registry as registry_module
from experiments.hypotheses.conclusions import conclude
from experiments.hypotheses.measures import Evidence
from experiments.hypotheses.registry import TEXTS, Registry, all_findings, find, load_registry, mark_of
from peft_vit.core.records import Registration, RunRecord

pytestmark = pytest.mark.part("analyzer")

EXPERIMENTS = planted.experiments()
OWN = """\
hypotheses:
  - id: at-least-linear
    sentence: LoRA is at least as accurate as a linear probe
    measure: difference
    parameters: {of: {names: [lora_r*]}, against: {methods: [linear]}, quantity: test_accuracy, better: higher}
    unit: share
    margin: 0.01
    test: noninferiority
    family: own
    refuted_by: a loss of more than one point
    source: me
  - id: at-least-full
    sentence: LoRA is at least as accurate as full fine-tuning
    measure: difference
    parameters: {of: {names: [lora_r8]}, against: {methods: [full]}, quantity: test_accuracy, better: higher}
    unit: share
    margin: 0.01
    test: noninferiority
    family: own
    refuted_by: a loss of more than one point
    source: me
"""


def records(registration: Registration | None, seeds: int = 3) -> list[RunRecord]:
    accuracy = {"linear_probe": 450, "full_finetuning": 470, "lora_r4": 465, "lora_r8": 480}
    changes = {} if registration is None else {"registration": registration}
    return [
        planted.record(EXPERIMENTS[name], seed, (images + seed + name.startswith("lora") * seed) / 600, changes=changes)
        for name, images in accuracy.items()
        for seed in range(seeds)
    ]


def marks(runs: list[RunRecord], registry: Registry) -> dict[str, str | None]:
    findings = all_findings(planted.studies_of(runs), registry)
    return {c.sentence.id: mark_of(c) for of_study in findings.values() for c in conclude(of_study)}


def registration(registry: Registry) -> Registration:
    """Return what a record of version 0.2.0 holds."""
    return Registration(sha256="0" * 64, hypotheses=registry.digests)


def own(folder: Path, text: str = OWN) -> Path:
    file = folder / "own.yaml"
    file.write_text(text)
    return file


# --- registered or exploratory ----------------------------------------------------------------------------------------


def test_what_stood_there_before_is_registered(tmp_path) -> None:
    registry = load_registry(own(tmp_path))
    found = marks(records(registration(registry)), registry)
    assert {found[name] for name in ("at-least-linear", "at-least-full", "above-majority")} == {"registered"}
    assert found["attention-over-mlp"] is None, "without data there is nothing to mark"
    assert {mark for mark in marks(records(None), registry).values() if mark} == {"exploratory"}


def test_what_was_added_later_is_exploratory_and_changes_nothing_else(tmp_path) -> None:
    found = marks(records(registration(load_registry())), load_registry(own(tmp_path)))
    assert (found["at-least-linear"], found["above-majority"]) == ("exploratory", "registered")


def test_another_margin_makes_its_own_family_exploratory_alone(tmp_path) -> None:
    apart = OWN.replace("family: own", "family: other", 1)
    for text, of_the_other in ((apart, "registered"), (OWN, "exploratory")):
        before = registration(load_registry(own(tmp_path, text)))
        changed = load_registry(own(tmp_path, text.replace("0.01", "0.02", 1)))
        found = marks(records(before), changed)
        assert (found["at-least-linear"], found["at-least-full"]) == ("exploratory", of_the_other)
        assert found["above-majority"] == "registered"


def test_dropping_the_rest_of_a_family_after_the_runs_is_not_registered(tmp_path) -> None:
    before = registration(load_registry(own(tmp_path)))
    (kept, _) = OWN.split("  - id: at-least-full")
    assert marks(records(before), load_registry(own(tmp_path, kept)))["at-least-linear"] == "exploratory"


def test_one_run_of_a_study_without_it_makes_it_exploratory(tmp_path) -> None:
    registry = load_registry(own(tmp_path))
    runs = records(registration(registry))
    (place,) = (i for i, r in enumerate(runs) if (r.spec.experiment.name, r.spec.seed) == ("full_finetuning", 2))
    runs[place] = runs[place].model_copy(update={"registration": None})
    found = marks(runs, registry)
    assert {found[name] for name in ("at-least-linear", "at-least-full", "above-majority")} == {"exploratory"}


def git(repository: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=repository, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def run_at(commit: str | None, dirty: bool = False) -> list[RunRecord]:
    return [
        record.model_copy(
            update={"provenance": record.provenance.model_copy(update={"git_hash": commit, "git_dirty": dirty})}
        )
        for record in records(None)
    ]


def test_git_knows_what_stood_there_before_runs_whose_records_hold_no_digests(tmp_path, monkeypatch) -> None:
    """A repository in which own.yaml first lay in the former folder, then beside the registry with another margin."""
    git(tmp_path, "init", "-q")
    for folder, text in (("experiments/configs", OWN), ("experiments/hypotheses", OWN.replace("0.01", "0.02", 1))):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "own.yaml").write_text(text)
        (tmp_path / folder / TEXTS.name).write_bytes(TEXTS.read_bytes())
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-qm", folder)
        git(tmp_path, "mv", "-k", "experiments/configs/own.yaml", "experiments/configs/gone.yaml")
    monkeypatch.setattr(registry_module, "ROOT", tmp_path)
    monkeypatch.setattr(registry_module, "TEXTS", tmp_path / "experiments/hypotheses" / TEXTS.name)
    earlier, later = git(tmp_path, "rev-parse", "HEAD~"), git(tmp_path, "rev-parse", "HEAD")
    own_file = tmp_path / "experiments/hypotheses/own.yaml"

    def marked(runs: list[RunRecord]) -> tuple[str | None, ...]:
        found = marks(runs, load_registry(own_file))
        return found["at-least-linear"], found["above-majority"]

    assert marked(run_at(later)) == ("registered", "registered")
    assert marked(run_at(earlier)) == ("exploratory", "registered"), "the margin was another"
    assert marked(run_at(later, dirty=True)) == ("exploratory", "exploratory")
    assert marked(run_at(None)) == ("exploratory", "exploratory")
    assert marked(run_at("f" * 40)) == ("exploratory", "exploratory"), "no commit of this repository"
    own_file.write_text(OWN)
    assert marked(run_at(earlier)) == ("registered", "registered"), "it stood in the former folder"
    own_file.write_text(OWN.replace("0.01", "0.03", 1))
    assert marked(run_at(later)) == ("exploratory", "registered")
    assert marked([*run_at(later)[:-1], run_at(None)[-1]]) == ("exploratory", "exploratory")


def test_a_study_alone_is_asked_about_several_too() -> None:
    study = planted.study_of(records(None))
    found = find([Evidence(study)], load_registry(), study.label)
    assert {f.sentence.id for f in found} == {h.id for h in load_registry().hypotheses}
    of_study = all_findings([study], load_registry())[study.label]
    several = {h.id for h in load_registry().hypotheses if h.is_about_several}
    alone = [(f.sentence.id, f.subject, f.by_seed, f.verdict) for f in found if f.sentence.id not in several]
    assert alone == [(f.sentence.id, f.subject, f.by_seed, f.verdict) for f in of_study]


# --- the command ------------------------------------------------------------------------------------------------------


def command(monkeypatch, *arguments: object) -> None:
    """Run the script in this process."""
    monkeypatch.setattr(sys, "argv", ["findings", *map(str, arguments)])
    runpy.run_module("experiments.hypotheses.findings", run_name="__main__")


@pytest.fixture
def findings(monkeypatch, capsys) -> Callable[..., str]:
    def printed(*arguments: object) -> str:
        command(monkeypatch, *arguments)
        told = capsys.readouterr()
        assert told.err == ""
        return told.out

    return printed


def test_it_prints_every_sentence_with_its_verdict(findings, tmp_path) -> None:
    registry = load_registry(own(tmp_path))
    planted.write(tmp_path / "results", records(registration(registry), seeds=6))
    printed = findings(tmp_path / "results", "--hypotheses", own(tmp_path))
    for hypothesis in registry.hypotheses:
        assert hypothesis.id in printed
    lines = {line.split()[0]: line for line in printed.splitlines() if line.split()}
    assert "supported in 2 of 2" in lines["at-least-linear"]
    assert "registered" in lines["at-least-linear"]
    assert "no data can test it" in lines["novel:"]
    assert "+1.7 " in lines["at-least-full"] or "+2." in lines["at-least-full"]
    assert "6 pairs" in lines["at-least-full"]


def test_what_runs_registered_and_no_registry_has_is_named(findings, tmp_path) -> None:
    planted.write(tmp_path, records(registration(load_registry(own(tmp_path)))))
    told = "Registered by runs, but not in this registry: at-least-full, at-least-linear. Name their file with"
    assert told in findings(tmp_path)


@pytest.mark.parametrize("ending", [".csv", ".json"])
def test_values_in_full_precision_for_other_programs(findings, tmp_path, ending) -> None:
    planted.write(tmp_path / "results", records(None))
    to = tmp_path / f"found{ending}"
    printed = findings(tmp_path / "results", "--hypotheses", own(tmp_path), "--output", to)
    rows = json.loads(to.read_text()) if ending == ".json" else list(csv.DictReader(to.read_text().splitlines()))
    (row,) = (row for row in rows if row["id"] == "at-least-full")
    assert float(row["estimate"]) == pytest.approx((10 + 11 + 12) / 3 / 600, rel=1e-12)
    assert (row["verdict"], row["marked"], int(row["n"])) == ("supported", "exploratory", 3)
    assert f"{len(rows)} rows: {to}" in printed
    assert {row["id"] for row in rows} == {h.id for h in load_registry(own(tmp_path)).hypotheses}


def test_the_same_records_give_the_same_bytes(findings, tmp_path) -> None:
    runs = records(None)
    planted.write(tmp_path / "a", runs)
    planted.write(tmp_path / "b", runs[::-1])
    assert findings(tmp_path / "a") == findings(tmp_path / "b")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "nowhere"),
        (["results", "--hypotheses", "absent.yaml"], "absent.yaml: is no file"),
        (["results", "--hypotheses", "own.yaml"], "own.yaml:1: hypothesis: unknown key here"),
        (["results", "--output", "found.txt"], "found.txt: --output: expected a name that ends in .csv or .json"),
        (["results", "--output", "results"], "--output: "),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, arguments, expected) -> None:
    monkeypatch.chdir(tmp_path)
    own(tmp_path, "hypothesis: []\n")
    planted.write(tmp_path / "results", records(None)[:1])
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *arguments)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert expected in told
    assert told.count("\n") == 1


def test_what_is_left_out_is_named_and_ends_with_1(capsys, tmp_path, monkeypatch) -> None:
    planted.write(tmp_path, records(None))
    first = min(tmp_path.rglob("record.json"))
    first.write_text("{")
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, tmp_path)
    told = capsys.readouterr()
    assert ended.value.code == 1
    assert "Findings of quickstart" in told.out
    assert told.err.startswith(f"left out: {first}: ")


def test_markup_in_a_sentence_stays_text(findings, tmp_path) -> None:
    text = OWN.replace("LoRA is at least as accurate as full fine-tuning", "'[red]as good[/red] <b>&amp;'")
    planted.write(tmp_path / "results", records(None))
    assert "[red]as good[/red] <b>&amp;" in findings(tmp_path / "results", "--hypotheses", own(tmp_path, text))
