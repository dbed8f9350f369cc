"""The pages of the studies and their figures say what results/ holds, and the study ran with what its pilots chose."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest

from experiments.methods.scripts import study_evidence, study_figures, study_tables
from experiments.scripts import evidence
from peft_vit.base.errors import UserError
from peft_vit.core.config import StudyConfig, load_study
from peft_vit.deploy.page.figure import METHOD_COLORS
from peft_vit.deploy.page.formatting import megabytes, points_interval
from peft_vit.lab.analysis import Analysis, load_studies

CONFIGS = study_evidence.CONFIGS
PILOT_OF = {
    "study_elpv": "study_elpv_pilot",
    "study_elpv_published": "study_elpv_pilot",
    "study_digits": "study_digits_pilot",
    "study_fashion": "study_fashion_pilot",
}
ON_FOUR_BITS = "adaptive-ranks-help-on-four-bits"
WENT = {"study_elpv": {"adalora_published"}}  # methods of kept studies and their pilots that this version does not have
RUN = {study: pilot for study, pilot in PILOT_OF.items() if (study_evidence.RESULTS / f"{pilot}.csv").exists()}


def config(name: str) -> StudyConfig:
    return load_study(CONFIGS / f"{name}.yaml")


@pytest.fixture(scope="module")
def blocks() -> dict[str, str]:
    return study_evidence.blocks()


WHAT_WE_FOUND = evidence.ROOT / "docs" / "what_we_found.md"
DOCUMENTS = (study_evidence.FINDINGS, study_evidence.EVERY_TEST)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_documents_say_what_results_hold(document: Path, blocks: dict[str, str]) -> None:
    text = document.read_text()
    assert evidence.filled(text, blocks) == text, "run experiments/methods/scripts/study_evidence.py"


def test_every_generated_part_is_in_a_document(blocks: dict[str, str]) -> None:
    texts = [document.read_text() for document in DOCUMENTS]
    assert [name for name in blocks if not any(f"<!-- {name} -->" in text for text in texts)] == []


def test_a_changed_number_in_a_document_is_noticed(blocks: dict[str, str]) -> None:
    text = study_evidence.FINDINGS.read_text()
    before, mark, after = text.partition("<!-- study_elpv_table -->")
    number = next(character for character in after if character.isdigit() and character != "9")
    changed = before + mark + after.replace(number, "9", 1)
    assert evidence.filled(changed, blocks) != changed


def test_a_mark_that_is_not_closed_is_refused(blocks: dict[str, str]) -> None:
    text = study_evidence.FINDINGS.read_text().replace("<!-- /study_elpv_table -->", "")
    with pytest.raises(ValueError, match="study_elpv_table is opened, but not closed"):
        evidence.filled(text, blocks)


def test_what_we_found_says_what_the_studies_came_to() -> None:
    text = " ".join(WHAT_WE_FOUND.read_text().split())
    analyses = [study_evidence.analysis_of(name) for name in study_tables.KINDS]
    against = [one for analysis in analyses for one in analysis.comparisons if one.reference == "lora_r8"]
    undecided = sum(one.verdict == "not decided" for one in against)
    assert f"{undecided} of {len(against)} comparisons of methods stayed open" in text
    told = [points_interval(one.interval) for one in against if one.name == "qa_lora_nf4"]
    four_bits = [one for analysis in analyses for one in analysis.findings if one.sentence.id == ON_FOUR_BITS]
    assert len(four_bits) == len(analyses)
    told += [points_interval(one.interval) for one in four_bits]
    assert [difference for difference in told if difference not in text] == []
    nf4, lora = (next(m for m in analyses[0].methods if m.experiment.name == n) for n in ("qa_lora_nf4", "lora_r8"))
    assert f"stored in {megabytes(nf4.stored_bytes)} instead of {lora.stored_bytes / 1e6:.1f}" in text


def test_the_figure_follows_a_light_and_a_dark_page() -> None:
    svg = study_figures.IN_DOCS.read_text()
    dark = svg.partition("prefers-color-scheme: dark")[2].partition("</style>")[0]
    used = set(re.findall(r"var\((--\w+)\)", svg))
    assert {"--ink", "--paper"} <= used
    assert used <= set(re.findall(r"(--\w+):", dark))


def test_figures_were_drawn_from_what_results_hold() -> None:
    analyses = {name: study_evidence.analysis_of(name) for name in study_evidence.kept_studies()}
    names = set()
    for file, drawing in study_figures.drawings(analyses):
        assert study_figures.recorded_digest(file) == study_figures.digest(drawing), file
        names.add(file.name)
    shown = (WHAT_WE_FOUND.read_text(), study_evidence.FINDINGS.read_text())
    assert all(any(f"images/{name})" in text for text in shown) for name in names)


def test_a_figure_in_an_older_color_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    analyses = {"study_digits": study_evidence.analysis_of("study_digits")}
    ((_, before),) = study_figures.drawings(analyses)
    assert METHOD_COLORS["adalora"] in before.svg
    monkeypatch.setitem(METHOD_COLORS, "adalora", "#123456")
    ((_, after),) = study_figures.drawings(analyses)
    assert before.data == after.data
    assert study_figures.digest(before) != study_figures.digest(after)


@pytest.mark.parametrize("study", RUN)
def test_the_study_ran_at_the_rates_that_its_pilot_chose(study: str) -> None:
    chosen = study_evidence.chosen_rates(pd.read_csv(study_evidence.RESULTS / f"{RUN[study]}.csv"))
    for experiment in config(study).experiments:
        if experiment.is_probe:  # it takes no steps, so no pilot tries rates for it
            assert experiment.name not in chosen
        else:
            assert experiment.training.learning_rate == chosen[experiment.name], experiment.name


@pytest.mark.parametrize("study", study_evidence.kept_studies())
def test_every_run_of_a_kept_study_is_one_that_its_configuration_asks_for(study: str) -> None:
    asked, kept = config(study), study_evidence.analysis_of(study).study
    records = [run.record for run in kept.runs] + list(kept.failed)
    experiments = {one.name: one for one in asked.experiments}
    specs = {(record.spec.experiment.name, record.spec.seed): record.spec for record in records}
    assert len(records) == len(specs)
    went = WENT.get(study, set())
    assert specs.keys() == {(name, seed) for name in {*experiments, *went} for seed in asked.seeds}
    for (name, _), spec in specs.items():
        assert name in went or spec.experiment == experiments[name]
        assert (spec.data, spec.measures, spec.precision) == (asked.data, asked.measures, asked.precision)
        assert (spec.backbone.model, spec.backbone.weights) == (asked.backbone.model, asked.backbone.weights)


@pytest.mark.parametrize("pilot", sorted(set(RUN.values())))
def test_every_run_of_a_kept_pilot_is_one_that_its_configuration_asks_for(pilot: str) -> None:
    runs = pd.read_csv(study_evidence.RESULTS / f"{pilot}.csv")
    went = WENT.get(pilot.removesuffix("_pilot"), set())
    runs = runs[~runs.method.isin(went)]
    asked = config(pilot)
    rates = {one.name: one.training.learning_rate for one in asked.experiments}
    assert set(zip(runs.experiment, runs.seed, strict=True)) == {(name, seed) for name in rates for seed in asked.seeds}
    assert all(rates[run.experiment] == run.learning_rate for run in runs.itertuples())
    assert (runs.groupby("seed").split.nunique() == 1).all()


@pytest.mark.parametrize("study", [study for study in PILOT_OF if study != "study_elpv_published"])
def test_a_pilot_tries_every_method_of_its_study_at_the_same_rates_and_on_other_seeds(study: str) -> None:
    own, pilot = config(study), config(PILOT_OF[study])
    assert set(own.seeds).isdisjoint(pilot.seeds)
    assert (own.data, own.backbone, own.precision) == (pilot.data, pilot.backbone, pilot.precision)
    rates: dict[str, list[float]] = {}
    for one in pilot.experiments:
        rates.setdefault(study_evidence.method_of(one.name), []).append(one.training.learning_rate)
    stepped = [one for one in own.experiments if not one.is_probe]
    assert list(rates) == [one.name for one in stepped]
    assert all(set(tried) >= {3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2} for tried in rates.values())
    for one in stepped:
        tried = next(p for p in pilot.experiments if study_evidence.method_of(p.name) == one.name)
        rate = {"learning_rate": one.training.learning_rate}
        same = tried.model_copy(update={"name": one.name, "training": tried.training.model_copy(update=rate)})
        assert same == one


def test_the_second_backbone_changes_nothing_else() -> None:
    first, second = config("study_elpv"), config("study_elpv_deit_small")
    own = {"name": first.name, "description": first.description, "backbone": first.backbone, "data": first.data}
    assert second.model_copy(update=own) == first
    assert second.data.model_copy(update={"image_size": first.data.image_size}) == first.data
    assert second.data.image_size // 16 == first.data.image_size // 14  # as many patches


def test_seeds_of_the_study_are_those_of_no_other_configuration() -> None:
    used = {file.stem: set(load_study(file).seeds) for file in evidence.study_files()}
    for study in ("study_elpv", "study_digits", "study_fashion"):
        others = {name: seeds for name, seeds in used.items() if not name.startswith("study_")}
        assert all(used[study].isdisjoint(seeds) for seeds in others.values())


def test_the_rate_is_chosen_by_validation_accuracy_then_loss_and_a_failed_run_is_the_majority_class() -> None:
    rows = [
        ("a", 1e-3, 0, "done", 0.80, 0.5),
        ("a", 1e-3, 1, "done", 0.70, 0.5),  # mean 0.75
        ("a", 1e-2, 0, "done", 0.76, 0.6),
        ("a", 1e-2, 1, "done", 0.76, 0.6),  # mean 0.76: chosen
        ("b", 1e-3, 0, "done", 0.75, 0.7),
        ("b", 1e-3, 1, "done", 0.75, 0.7),
        ("b", 1e-2, 0, "done", 0.80, 0.4),
        ("b", 1e-2, 1, "done", 0.70, 0.4),  # equal mean, lower loss: chosen
        ("c", 1e-3, 0, "done", 0.90, 0.3),
        ("c", 1e-3, 1, "failed", None, None),  # (0.9 + 0.6) / 2 = 0.75
        ("c", 1e-2, 0, "done", 0.76, 0.3),
        ("c", 1e-2, 1, "done", 0.76, 0.3),  # chosen
    ]
    columns = ["method", "learning_rate", "seed", "status", "validation_accuracy", "validation_nll"]
    pilot = pd.DataFrame(rows, columns=columns).assign(majority_accuracy=[0.6] * len(rows))
    pilot.loc[pilot.status == "failed", "majority_accuracy"] = float("nan")
    assert study_evidence.chosen_rates(pilot) == {"a": 1e-2, "b": 1e-2, "c": 1e-2}
    assert study_evidence.chosen_rates(pilot[pilot.learning_rate < 5e-3]) == {"a": 1e-3, "b": 1e-3, "c": 1e-3}


def planted_study(folder: Path, name: str = "study_elpv", seeds: int = 8) -> Path:
    """Write a study in which LoRA r=1 and nf4 are 5 points worse than r=8; full fine-tuning differs by noise alone."""
    rng = np.random.default_rng(0)
    levels = {"linear_probe": -0.1, "full_finetuning": 0.0, "lora_r1": -0.05, "lora_r8": 0.0, "qa_lora_nf4": -0.05}
    experiments = planted.experiments()
    experiments["qa_lora_nf4"] = experiments["qa_lora_4bit_nf4_constant"].model_copy(update={"name": "qa_lora_nf4"})
    records = []
    for method, level in levels.items():
        for seed in range(seeds):
            accuracy = round((0.8 + level) * 600 + float(rng.normal(0, 3))) / 600
            record = planted.record(experiments[method], seed, accuracy)
            takes = {"latency_s": {1: 0.03 if method == "qa_lora_nf4" else 0.02}}
            records.append(record.model_copy(update=takes | {"spec": record.spec.model_copy(update={"study": name})}))
    return planted.write(folder, records)


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    (study,) = load_studies(planted_study(tmp_path_factory.mktemp("planted")))
    return study_evidence.with_hypotheses(study)


def test_the_main_table_names_what_loses_and_what_takes_more(analysis: Analysis) -> None:
    table, words = study_tables.main_table(analysis), " ".join(study_tables.in_words(analysis))
    row = next(line for line in table.splitlines() if line.startswith("| LoRA r=1 |"))
    by_seed = {run.seed: run.test.accuracy for run in analysis.study.runs_of("lora_r1")}
    fixed = {run.seed: run.test.accuracy for run in analysis.study.runs_of("lora_r8")}
    mean = 100 * np.mean([by_seed[seed] - fixed[seed] for seed in by_seed])
    assert f"| \u2212{-mean:.1f} [" in row
    assert row.count("worse") == 2  # below zero, and by more than a point
    assert words.startswith("Less accurate than LoRA r=8 (Holm over 4): linear probe, LoRA r=1, QA-LoRA nf4. More acc")
    assert "Shown to lose more: LoRA r=1, QA-LoRA nf4." in words
    own_family = r"\(Holm over 2\): LoRA r=8 is more accurate than linear probe: supported, \+.*; than full "
    assert re.search(own_family + "fine-tuning: not decided", words)
    assert re.search(r"that lose: QA-LoRA nf4 against LoRA r=8 \u2212\d[^;]*\.", words), "LoRA r=1 is not ours"
    assert words.endswith("A lower mean, decided or not, than full fine-tuning: LoRA r=1, QA-LoRA nf4.")
    assert study_tables.price(analysis) == (
        "Slower than LoRA r=8 by more than a quarter, in means: one image (20 ms): QA-LoRA nf4 (30); a training step "
        "(0.70 s): none."
    )


@pytest.mark.parametrize(
    ("method", "in_all", "said"),
    [
        ("linear_probe", "not decided", "not decided; as a registered hypothesis (Holm over 2): **worse**"),
        ("linear_probe", "refuted", "**worse**"),
        ("lora_r1", "not decided", "not decided; as a registered hypothesis (Holm over 2): **worse**"),
        ("full_finetuning", "supported", "better; as a registered hypothesis (Holm over 2): not decided"),
    ],
)
def test_the_row_says_where_a_registered_hypothesis_is_decided_otherwise(analysis, method, in_all, said) -> None:
    comparisons = tuple(
        replace(one, verdict=in_all) if (one.name, one.reference) == (method, "lora_r8") else one
        for one in analysis.comparisons
    )
    table = study_tables.main_table(replace(analysis, comparisons=comparisons)).splitlines()
    assert "| better or worse? (Holm over 4) | non-inferior by a point? (Holm over 2) |" in table[0]
    (row,) = (line for line in table if line.startswith(f"| {study_tables.titled(method)} |"))
    assert row.split(" | ")[3] == said


def test_a_kept_study_comes_out_as_it_went_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_evidence, "RESULTS", tmp_path / "results")
    results = planted_study(tmp_path / "out", seeds=2)
    study_evidence.keep(results)
    first = (tmp_path / "results" / "study_elpv.tar.xz").read_bytes()
    with study_evidence.unpacked("study_elpv") as folder:
        inside = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    written = {file.relative_to(results): file.read_bytes() for file in results.rglob("record.json")}
    assert inside == written
    study_evidence.keep(results)
    assert (tmp_path / "results" / "study_elpv.tar.xz").read_bytes() == first


def test_a_pilot_is_kept_without_its_test_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_evidence, "RESULTS", tmp_path / "results")
    study_evidence.keep(planted_study(tmp_path / "out", "study_elpv_pilot", seeds=2))
    table = pd.read_csv(tmp_path / "results" / "study_elpv_pilot.csv")
    assert len(table) == 10
    assert not [column for column in table.columns if "test" in column]


def test_a_study_that_is_not_at_its_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_evidence, "RESULTS", tmp_path / "results")
    results = planted_study(tmp_path / "out", seeds=2)
    next(results.rglob("record.json")).unlink()
    with pytest.raises(UserError, match="1 of 10 runs of study_elpv are not done; run it to its end"):
        study_evidence.keep(results)
    assert not (tmp_path / "results").exists()


def test_runs_of_another_study_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected real runs of study_\*, found others"):
        study_evidence.keep(planted_study(tmp_path, "quickstart", seeds=1))
