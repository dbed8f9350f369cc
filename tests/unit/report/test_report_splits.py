"""What a report says of splits, intervals and the majority class, where seeds share test images and where not."""

from __future__ import annotations

import planted
import pytest
from golden import check_golden

from peft_vit.analysis import Analysis, analyze
from peft_vit.records import RunRecord
from peft_vit.report import summary
from peft_vit.report.accuracy_figures import accuracy_by_method

MAJORITY = {0: 0.685, 1: 0.682, 2: 0.69}  # a mean of 0.6857
ACCURACY = {"linear_probe": 0.75, "lora_r8": 0.80}


def analysis_of(test_split: str, train_subset: str = "fixed") -> Analysis:
    """Return two experiments over three seeds; with per_seed, splits and majorities differ by seed."""
    differs = test_split == "per_seed"
    records: list[RunRecord] = []
    for name, accuracy in ACCURACY.items():
        for seed, majority in MAJORITY.items():
            changes = {"majority_accuracy": {"test": majority if differs else 0.685}}
            split = {"split_sha256": f"{seed:064x}"} if differs else {}
            one = planted.record(planted.experiments()[name], seed, accuracy, changes=changes, provenance_changes=split)
            data = one.spec.data.model_copy(update={"test_split": test_split, "train_subset": train_subset})
            records.append(planted.asking(one, data=data))
    return analyze(planted.study_of(records))


def test_what_seeds_draw_and_intervals_cover_is_told() -> None:
    parts = []
    for asked in (("fixed",), ("fixed", "per_seed"), ("per_seed",)):
        analysis = analysis_of(*asked)
        facts = dict(summary.facts(analysis.study))
        figure = accuracy_by_method(analysis.study, analysis.methods)
        majority = figure.svg[figure.svg.index("majority class") :].split("<")[0]
        said = (*summary.how_sure(analysis), *summary.not_shown(analysis.study), figure.caption, majority)
        parts.append("\n".join([f"## {' '.join(asked)}", facts["Split"], facts["Classes"], *said]))
    check_golden("report/splits.md", "\n\n".join(parts) + "\n")


def test_the_figure_of_accuracies_and_pairs_have_each_seeds_majority() -> None:
    per_seed = analysis_of("per_seed")
    rows = {
        (row["seed"], row["majority_accuracy"]) for row in accuracy_by_method(per_seed.study, per_seed.methods).data
    }
    assert rows == set(MAJORITY.items())
    (comparison,) = [c for c in per_seed.comparisons if c.reference == "linear_probe"]
    assert list(comparison.by_seed.values()) == pytest.approx([0.05] * 3, abs=1 / planted.N_TEST)
    assert comparison.note == ""
    assert {m.experiment.name: m.above_majority.estimate for m in per_seed.methods} == pytest.approx(
        {name: sum(accuracy - one for one in MAJORITY.values()) / 3 for name, accuracy in ACCURACY.items()},
        abs=1 / planted.N_TEST,
    )
