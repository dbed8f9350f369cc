"""PEFT's methods, and LoRA that goes on from an adapter, stand under their own names and are no reference for ours."""

from typing import Any

import planted
import pytest

from peft_vit.core.config import ExperimentConfig
from peft_vit.core.records import RankEntry, RunRecord, SiteInfo
from peft_vit.lab.analysis import Analysis, analyze
from peft_vit.lab.analysis.comparison import references
from peft_vit.lab.analysis.layers import Grid
from peft_vit.lab.analysis.studies import Study
from peft_vit.lab.report.build import study_documents

SITES = [  # fused, as PEFT sees them
    SiteInfo(
        name=f"blocks.{block}.{matrix}", block=block, matrix=matrix, role=role, in_features=inward, out_features=outward
    )
    for block in range(planted.BLOCKS)
    for matrix, role, inward, outward in (
        ("qkv", "attention", 384, 1152),
        ("out", "attention", 384, 384),
        ("fc1", "mlp", 384, 1536),
        ("fc2", "mlp", 1536, 384),
    )
]
LOUD = 0.9  # so accurate that it would show wherever it was mixed in


def experiment(**settings: Any) -> ExperimentConfig:
    template = planted.experiments()["lora_r8"]
    return ExperimentConfig.model_validate({"training": template.training, **settings})


def theirs() -> list[RunRecord]:
    """Return records of PEFT's two methods and of LoRA that goes on, two seeds each, all far above ours."""
    moves = {"update_frequency": 6, "warmup_steps": 12}
    uneven = {"qkv": 16, "out": 0, "fc1": 8, "fc2": 8}
    courses = (
        (experiment(name="peft_r8", method="peft_lora", peft_lora={"rank": 8}), [8]),
        (experiment(name="peft_12_8", method="peft_adalora", peft_adalora=moves), [12, 10, uneven]),
        (experiment(name="imported", method="lora", lora={"start": "somewhere"}), [8]),
    )
    records = []
    for seed in (0, 1):
        for own, course in courses:
            history = [
                RankEntry(
                    step=6 * i,
                    budget=None if len(course) == 1 else (12, 10, 8)[i] * 48,
                    ranks={site.name: ranks[site.matrix] if isinstance(ranks, dict) else ranks for site in SITES},
                )
                for i, ranks in enumerate(course)
            ]
            record = planted.record(planted.experiments()["lora_r8"], seed, LOUD)
            changes = {"sites": SITES, "rank_history": history}
            records.append(planted.asking(record, experiment=own).model_copy(update=changes))
    return records


@pytest.fixture(scope="module")
def study() -> Study:
    return planted.study_of([*planted.quickstart(), *theirs()])


@pytest.fixture(scope="module")
def analysis(study: Study) -> Analysis:
    return analyze(study)


def test_references_are_ours_as_without_them(study, analysis) -> None:
    without = planted.study_of(planted.quickstart())
    assert references(study) == references(without) == ("linear_probe", "lora_r8")
    only_theirs = planted.study_of(theirs())
    assert references(only_theirs) == ()
    ours = {a.experiment.name: a.against_fixed.by_seed for a in analysis.allocation}
    alone = analyze(without)
    for allocation in alone.allocation:
        assert ours[allocation.experiment.name] == allocation.against_fixed.by_seed
    quantized = [q.against_unquantized.by_seed for q in analysis.quantization]
    assert quantized == [q.against_unquantized.by_seed for q in alone.quantization]


def test_they_are_compared_under_their_own_names(analysis) -> None:
    rows = {method.experiment.name: method for method in analysis.methods}
    loras = [name for name in rows if name.startswith(("peft", "lora", "imported"))]
    assert loras[:6] == ["imported", "lora_r1", "lora_r2", "lora_r4", "lora_r8", "peft_r8"]
    for name in ("peft_r8", "peft_12_8", "imported"):
        assert rows[name].test_accuracy.estimate == pytest.approx(LOUD)
        (against,) = (c for c in analysis.comparisons if (c.name, c.reference) == (name, "lora_r8"))
        assert against.interval.estimate > 0.05
    above_linear = {f.subject for f in analysis.findings if f.sentence.id == "lora-beats-linear"}
    assert above_linear == {"lora_r8 against linear_probe"}, "neither imported nor peft_r8 is the reference"


def test_ranks_of_fused_matrices(analysis) -> None:
    (allocation,) = (a for a in analysis.allocation if a.experiment.method == "peft_adalora")
    assert allocation.grid.matrices == ("qkv", "out", "fc1", "fc2")
    uneven = {"qkv": 16, "out": 0, "fc1": 8, "fc2": 8}
    assert allocation.ranks == {site.name: uneven[site.matrix] for site in SITES}
    assert Grid.of([*SITES, *planted.sites()]).matrices == ("qkv", "query", "key", "value", "out", "fc1", "fc2")


def test_a_report_draws_them(analysis) -> None:
    (document,) = study_documents([analysis])
    cards = {card.title: card.subtitle for card in document.cards}
    assert (cards["LoRA by PEFT"], cards["AdaLoRA by PEFT"]) == ("peft_r8", "peft_12_8")
    details = [value for run in document.runs for key, value in run.rows if key == "configuration"]
    assert sum("peft_adalora {" in value for value in details) == 2
    assert any(drawing.slug == "rank_maps" for drawing in document.drawings())


def test_adaptive_ranks_on_low_bits_are_analyzed_by_rank_and_by_bits() -> None:
    known = planted.experiments()
    adaptive, quantized = known["adalora_top_k_fisher"], known["qa_lora_4bit_nf4_constant"]
    bits = quantized.qa_lora.model_copy(update={"rank": None})
    both = adaptive.model_copy(update={"name": "both", "method": "qa_adalora", "qa_lora": bits})
    records = []
    for seed in (0, 1):
        low = planted.record(quantized, seed, 0.8)
        taken = {"quantization": low.quantization, "bits_history": low.bits_history}
        records.append(planted.asking(planted.record(adaptive, seed, 0.8, changes=taken), experiment=both))
    floats = [record for record in planted.quickstart() if record.spec.experiment == adaptive]
    analyzed = analyze(planted.study_of([*floats, *records]))
    assert [row.experiment.name for row in analyzed.allocation] == [adaptive.name, "both"]
    (impact,) = analyzed.quantization
    assert (impact.experiment.name, impact.against_unquantized.reference) == ("both", adaptive.name)
