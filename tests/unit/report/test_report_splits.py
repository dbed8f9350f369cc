"""What a report says of splits, intervals and the majority class, where seeds share test images and where not."""

from __future__ import annotations

from collections.abc import Callable

import planted
import pytest

from peft_vit.analysis import Analysis, analyze
from peft_vit.records import RunRecord
from peft_vit.report import summary
from peft_vit.report.document import Drawing
from peft_vit.report.forest_plot import accuracy_by_method

MAJORITY = {0: 0.685, 1: 0.682, 2: 0.69}  # a mean of 0.6857
ACCURACY = {"linear_probe": 0.75, "lora_r8": 0.80}


def drawn(test_split: str, train_subset: str = "fixed") -> Analysis:
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
    study = planted.study_of(records)
    return analyze(study)


@pytest.fixture(scope="module")
def fixed() -> Analysis:
    return drawn("fixed")


@pytest.fixture(scope="module")
def per_seed() -> Analysis:
    return drawn("per_seed")


def fact(analysis: Analysis, name: str) -> str:
    return dict(summary.facts(analysis.study))[name]


def test_the_facts_say_what_a_seed_draws(fixed: Analysis, per_seed: Analysis) -> None:
    assert fact(fixed, "Split").endswith("; training images the same for all seeds")
    assert fact(drawn("fixed", "per_seed"), "Split").endswith("; training images drawn per seed")
    assert fact(per_seed, "Split").endswith("; test, validation and training images drawn per seed")


def test_the_majority_class_has_a_range_where_test_images_differ(fixed: Analysis, per_seed: Analysis) -> None:
    assert fact(fixed, "Classes") == "2: functional, defective; the most frequent has 68.5 % of the test images"
    assert fact(per_seed, "Classes").endswith("; the most frequent has 68.2 to 69.0 % of the test images")


def figure(analysis: Analysis) -> Drawing:
    return accuracy_by_method(analysis.study, analysis.methods)


def test_the_figure_of_accuracies_has_each_seeds_majority(fixed: Analysis, per_seed: Analysis) -> None:
    assert {row["majority_accuracy"] for row in figure(fixed).data} == {0.685}
    rows = {(row["seed"], row["majority_accuracy"]) for row in figure(per_seed).data}
    assert rows == set(MAJORITY.items())
    assert "seeds on the same test images" in figure(fixed).caption
    assert "seeds with other test images out of the same data set" in figure(per_seed).caption
    assert "majority class, 68.5 %" in figure(fixed).svg
    assert "majority class, on average 68.6 %" in figure(per_seed).svg


SAID: tuple[tuple[Callable[[Analysis], tuple[str, ...]], str, str], ...] = (
    (summary.how_sure, "On top comes the choice of test images: with", "Each seed draws its own test images, so"),
    (lambda analysis: summary.not_shown(analysis.study), "orders on the same images.", "such splits overlap"),
)


@pytest.mark.parametrize(("said", "same", "other"), SAID)
def test_what_intervals_cover_is_told(
    said: Callable[[Analysis], tuple[str, ...]], same: str, other: str, fixed: Analysis, per_seed: Analysis
) -> None:
    found = {name: " ".join(said(analysis)) for name, analysis in (("fixed", fixed), ("per_seed", per_seed))}
    assert same in found["fixed"]
    assert same not in found["per_seed"]
    assert other in found["per_seed"]
    assert other not in found["fixed"]


def test_other_training_images_alone_are_told_apart() -> None:
    said = " ".join(summary.not_shown(drawn("fixed", "per_seed").study))
    assert "describe other training images, initial values and orders on the same test images." in said


def test_runs_of_a_seed_are_pairs_whatever_their_seeds_draw(per_seed: Analysis) -> None:
    (comparison,) = [c for c in per_seed.comparisons if c.reference == "linear_probe"]
    assert list(comparison.by_seed.values()) == pytest.approx([0.05] * 3, abs=1 / planted.N_TEST)
    assert comparison.note == ""
    assert {m.experiment.name: m.above_majority.estimate for m in per_seed.methods} == pytest.approx(
        {name: sum(accuracy - one for one in MAJORITY.values()) / 3 for name, accuracy in ACCURACY.items()},
        abs=1 / planted.N_TEST,
    )
