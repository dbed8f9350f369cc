"""Registered or exploratory, own hypotheses, and what `peft-vit findings` prints, writes and refuses."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import planted
import pytest

from peft_vit.analysis import analyze
from peft_vit.analysis.findings import all_findings, conclude
from peft_vit.analysis.hypotheses import Registry, load_registry
from peft_vit.cli import main
from peft_vit.records import Registration, RunRecord
from peft_vit.report import build_report

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
    return {c.hypothesis.id: c.mark for of_study in findings.values() for c in conclude(of_study)}


def own(folder: Path, text: str = OWN) -> Path:
    file = folder / "own.yaml"
    file.write_text(text)
    return file


# --- registered or exploratory ----------------------------------------------------------------------------------------


def test_what_stood_there_before_is_registered(tmp_path) -> None:
    registry = load_registry(own(tmp_path))
    found = marks(records(registry.registration()), registry)
    assert {found[name] for name in ("at-least-linear", "at-least-full", "above-majority")} == {"registered"}
    assert found["attention-over-mlp"] is None, "without data there is nothing to mark"
    assert {mark for mark in marks(records(None), registry).values() if mark} == {"exploratory"}


def test_what_was_added_later_is_exploratory_and_changes_nothing_else(tmp_path) -> None:
    found = marks(records(load_registry().registration()), load_registry(own(tmp_path)))
    assert (found["at-least-linear"], found["above-majority"]) == ("exploratory", "registered")


def test_another_margin_makes_its_own_family_exploratory_alone(tmp_path) -> None:
    apart = OWN.replace("family: own", "family: other", 1)
    for text, of_the_other in ((apart, "registered"), (OWN, "exploratory")):
        before = load_registry(own(tmp_path, text)).registration()
        changed = load_registry(own(tmp_path, text.replace("0.01", "0.02", 1)))
        found = marks(records(before), changed)
        assert (found["at-least-linear"], found["at-least-full"]) == ("exploratory", of_the_other)
        assert found["above-majority"] == "registered"
        assert changed.sha256 != before.sha256


def test_dropping_the_rest_of_a_family_after_the_runs_is_not_registered(tmp_path) -> None:
    before = load_registry(own(tmp_path)).registration()
    (kept, _) = OWN.split("  - id: at-least-full")
    assert marks(records(before), load_registry(own(tmp_path, kept)))["at-least-linear"] == "exploratory"


def test_one_run_without_it_makes_what_uses_it_exploratory(tmp_path) -> None:
    registry = load_registry(own(tmp_path))
    runs = records(registry.registration())
    (place,) = (i for i, r in enumerate(runs) if (r.spec.experiment.name, r.spec.seed) == ("full_finetuning", 2))
    runs[place] = runs[place].model_copy(update={"registration": None})
    found = marks(runs, registry)
    assert (found["at-least-linear"], found["at-least-full"]) == ("registered", "exploratory")


def test_the_reports_analysis_holds_the_same_findings() -> None:
    study = planted.study_of(records(None))
    analysis = analyze(study).findings
    assert {f.hypothesis.id for f in analysis} == {h.id for h in load_registry().hypotheses}
    of_study = all_findings([study], load_registry())[study.label]
    assert [f for f in analysis if not f.hypothesis.is_about_several] == list(of_study)


def findings(capsys, *arguments: object) -> str:
    """Return what the command prints when all is well."""
    with pytest.raises(SystemExit) as ended:
        main(["findings", *map(str, arguments)])
    told = capsys.readouterr()
    assert (ended.value.code, told.err) == (0, "")
    return told.out


# --- the command ------------------------------------------------------------------------------------------------------


def test_it_prints_every_sentence_with_its_verdict(capsys, tmp_path) -> None:
    registry = load_registry(own(tmp_path))
    planted.write(tmp_path / "results", records(registry.registration(), seeds=6))
    printed = findings(capsys, tmp_path / "results", "--hypotheses", own(tmp_path))
    for hypothesis in registry.hypotheses:
        assert hypothesis.id in printed
    lines = {line.split()[0]: line for line in printed.splitlines() if line.split()}
    assert "supported in 2 of 2" in lines["at-least-linear"]
    assert "registered" in lines["at-least-linear"]
    assert "no data can test it" in lines["novel:"]
    assert "+1.7 " in lines["at-least-full"] or "+2." in lines["at-least-full"]
    assert "6 pairs" in lines["at-least-full"]


def test_what_runs_registered_and_no_registry_has_is_named(capsys, tmp_path) -> None:
    planted.write(tmp_path, records(load_registry(own(tmp_path)).registration()))
    told = "Registered by runs, but not in this registry: at-least-full, at-least-linear. Name their file with"
    assert told in findings(capsys, tmp_path)


@pytest.mark.parametrize("ending", [".csv", ".json"])
def test_values_in_full_precision_for_other_programs(capsys, tmp_path, ending) -> None:
    planted.write(tmp_path / "results", records(None))
    to = tmp_path / f"found{ending}"
    printed = findings(capsys, tmp_path / "results", "--hypotheses", own(tmp_path), "--output", to)
    rows = json.loads(to.read_text()) if ending == ".json" else list(csv.DictReader(to.read_text().splitlines()))
    (row,) = (row for row in rows if row["id"] == "at-least-full")
    assert float(row["estimate"]) == pytest.approx((10 + 11 + 12) / 3 / 600, rel=1e-12)
    assert (row["verdict"], row["marked"], int(row["n"])) == ("supported", "exploratory", 3)
    assert f"{len(rows)} rows: {to}" in printed
    assert {row["id"] for row in rows} == {h.id for h in load_registry(own(tmp_path)).hypotheses}


def test_the_same_records_give_the_same_bytes(capsys, tmp_path) -> None:
    runs = records(None)
    planted.write(tmp_path / "a", runs)
    planted.write(tmp_path / "b", runs[::-1])
    assert findings(capsys, tmp_path / "a") == findings(capsys, tmp_path / "b")


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
        main(["findings", *arguments])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert expected in told
    assert told.count("\n") == 1


WITHOUT_TORCH = """
import sys
from peft_vit.cli import main
try:
    main(["findings", sys.argv[1]])
except SystemExit as end:
    assert not end.code
assert not {"torch", "timm"} & set(sys.modules)
"""


def test_it_needs_no_torch(tmp_path) -> None:
    planted.write(tmp_path, records(None)[:2])
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_markup_in_a_sentence_stays_text(capsys, tmp_path) -> None:
    text = OWN.replace("LoRA is at least as accurate as full fine-tuning", "'[red]as good[/red] <b>&amp;'")
    planted.write(tmp_path / "results", records(None))
    assert "[red]as good[/red] <b>&amp;" in findings(capsys, tmp_path / "results", "--hypotheses", own(tmp_path, text))


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_shows_verdicts_findings_and_what_it_can_say_nothing_about(tmp_path) -> None:
    planted.write(tmp_path / "results", records(load_registry(own(tmp_path)).registration()))
    files = build_report(tmp_path / "results", tmp_path / "report")
    page, summary = files.html.read_text(), files.markdown.read_text()
    for text in (page, summary[summary.index("## Insights") :]):
        assert "Every run is more accurate than always naming the most frequent class" in text
        assert "This is the first method of its kind" in text
        assert "not in the registry of this report: at-least-full, at-least-linear." in text
    (table,) = (file for file in files.tables if file.name.endswith("_findings.csv"))
    rows = {(row["id"], row["subject"]): row for row in csv.DictReader(table.read_text().splitlines())}
    row = rows["lora-beats-full", "lora_r8 against full_finetuning"]
    assert float(row["estimate"]) == pytest.approx((10 + 11 + 12) / 3 / 600, rel=1e-12)
    assert (row["verdict"], row["marked"]) == ("not decided", "registered")


def test_own_hypotheses_in_the_report_can_do_nothing_to_it(tmp_path) -> None:
    hostile = "'a | b\\nc <script>alert(1)</script> <b>'".replace("'", '"')
    text = OWN.replace("LoRA is at least as accurate as full fine-tuning", hostile)
    planted.write(tmp_path / "results", records(None))
    files = build_report(tmp_path / "results", tmp_path / "report", hypotheses=own(tmp_path, text))
    page, summary = files.html.read_text(), files.markdown.read_text()
    assert "a | b c &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert" not in page + summary
    (row,) = (line for line in summary.splitlines() if "alert(1)" in line and "lora_r8 against" in line)
    assert row.startswith("|")
    assert row.count("|") - row.count("\\|") == 8, "seven columns"
