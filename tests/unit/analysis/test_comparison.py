import numpy as np
import planted
import pytest

from peft_vit.analysis import Study, analyze, compare_all, method_results
from peft_vit.analysis.comparison import all_pairs, references
from peft_vit.records import RunRecord

EXPERIMENTS = planted.experiments()


def two_methods(linear: list[float], lora: list[float]) -> Study:
    """Return a study with one run a seed for either method."""
    return planted.study_of(
        [planted.record(EXPERIMENTS["linear_probe"], seed, value) for seed, value in enumerate(linear)]
        + [planted.record(EXPERIMENTS["lora_r8"], seed, value) for seed, value in enumerate(lora)]
    )


def test_known_mean_and_interval() -> None:
    linear, lora = method_results(two_methods([0.70, 0.72], [0.80]))
    assert linear.by_seed == {0: 0.70, 1: 0.72}
    assert linear.test_accuracy.estimate == pytest.approx(0.71)
    assert linear.test_accuracy.high == pytest.approx(0.71 + 12.7062 * 0.01, abs=1e-6)
    assert linear.above_majority.estimate == pytest.approx(0.71 - 0.675)
    assert lora.test_accuracy.low is None, "one seed has no interval"


def test_paired_difference_by_hand() -> None:
    study = two_methods([0.70, 0.72, 0.71], [0.75, 0.78, 0.75])
    (comparison,) = compare_all(study, "linear_probe")
    assert list(comparison.by_seed.values()) == pytest.approx([0.05, 0.06, 0.04])
    assert comparison.interval.estimate == pytest.approx(0.05)
    # s = 0.01, t_2 = 4.302653, half = 4.302653 * 0.01 / sqrt(3)
    assert comparison.interval.high == pytest.approx(0.05 + 0.0248414, abs=1e-6)


def test_two_seeds_decide_nothing_however_large_the_difference() -> None:
    (comparison,) = compare_all(two_methods([0.60, 0.60], [0.90, 0.91]), "linear_probe")
    assert comparison.verdict == "not decided"
    assert comparison.significance.sentence() == "not decidable with n = 2, needs at least 6"


@pytest.mark.parametrize(("shift", "expected"), [(0.05, "supported"), (-0.05, "refuted"), (0.0, "not decided")])
def test_six_seeds_decide_a_clear_difference(shift: float, expected: str) -> None:
    linear = [0.70, 0.71, 0.72, 0.73, 0.74, 0.75]
    lora = [value + shift + 0.005 * (-1) ** i * (i + 1) / 3 for i, value in enumerate(linear)]
    (comparison,) = compare_all(two_methods(linear, lora), "linear_probe")
    assert comparison.verdict == expected


def test_a_larger_family_needs_more_seeds() -> None:
    study = planted.study_of(planted.quickstart(seeds=tuple(range(8))))
    for comparison in compare_all(study, "linear_probe"):
        assert comparison.significance.minimum_n == 9, "eleven comparisons: 11 * 2 / 2^9 <= 0.05"
        assert comparison.verdict == "not decided"


def test_nine_seeds_decide_within_the_whole_family() -> None:
    study = planted.study_of(planted.quickstart(seeds=tuple(range(9)), spread=0.004))
    verdicts = {c.name: c.verdict for c in compare_all(study, "linear_probe")}
    assert verdicts["lora_r8"] == "supported"


def test_ties_are_ties_despite_floating_point() -> None:
    study = two_methods([0.6, 0.7, 0.8], [0.6 + 0.1, 0.7 + 0.1, 0.8 + 0.1])
    (comparison,) = compare_all(study, "linear_probe")
    assert len(set(comparison.by_seed.values())) == 1


def test_only_common_seeds_are_paired() -> None:
    (comparison,) = compare_all(two_methods([0.70, 0.72, 0.74], [0.80]), "linear_probe")
    assert list(comparison.by_seed) == [0]


@pytest.mark.parametrize("field", ["split_sha256", "data_sha256", "weights_sha256"])
def test_pairs_on_other_images_or_weights_are_refused(field: str) -> None:
    other = planted.record(EXPERIMENTS["lora_r8"], 0, 0.8, provenance_changes={field: "f" * 64})
    study = planted.study_of([planted.record(EXPERIMENTS["linear_probe"], 0, 0.7), other])
    (comparison,) = compare_all(study, "linear_probe")
    assert comparison.interval is None
    assert "1 pair(s) refused" in comparison.note


def test_pairs_with_another_initial_head_are_marked() -> None:
    other = planted.record(EXPERIMENTS["lora_r8"], 0, 0.8, provenance_changes={"head_init_sha256": "f" * 64})
    (comparison,) = compare_all(planted.study_of([planted.record(EXPERIMENTS["lora_r4"], 0, 0.7), other]), "lora_r4")
    assert "initial head" in comparison.note


def test_a_probe_is_paired_by_its_split_alone() -> None:
    """It has neither initial head nor order of images, so that nothing is marked; another split is still refused."""
    drawn = {"head_init_sha256": "f" * 64, "data_order_sha256": "e" * 64}
    probe = planted.record(EXPERIMENTS["linear_probe"], 0, 0.7)
    for changes, note in ((drawn, ""), ({"split_sha256": "0" * 64}, "refused")):
        other = planted.record(EXPERIMENTS["lora_r8"], 0, 0.8, provenance_changes=changes)
        (comparison,) = compare_all(planted.study_of([probe, other]), "linear_probe")
        assert (comparison.interval is None) == bool(note)
        assert note in comparison.note
        assert "initial head" not in comparison.note


def test_references_are_the_linear_probe_and_lora_of_rank_8() -> None:
    everything = planted.quickstart()
    assert references(planted.study_of(everything)) == ("linear_probe", "lora_r8")
    without = [r for r in everything if r.spec.experiment.method != "linear" and r.spec.experiment.name != "lora_r8"]
    assert references(planted.study_of(without)) == ("lora_r4",)
    assert references(planted.study_of([r for r in everything if r.spec.experiment.method == "full"])) == ()


def test_an_analysis_without_any_finished_run_is_empty() -> None:
    analysis = analyze(planted.study_of([planted.failed(EXPERIMENTS["lora_r8"], 0, "out of memory")]))
    assert (analysis.methods, analysis.comparisons) == ((), ())
    assert {finding.verdict for finding in analysis.findings} == {"no data"}


# --- all pairs --------------------------------------------------------------------------------------------------------


def runs(accuracies: dict[str, list[float]]) -> list[RunRecord]:
    return [
        planted.record(EXPERIMENTS[name], seed, value)
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


def test_planted_differences_are_decided_and_the_others_are_not() -> None:
    steps = [0.0, 0.01, -0.01, 0.005, -0.005, 0.0, 0.01, -0.01]
    accuracies = {
        "linear_probe": [0.70 + s for s in steps],
        "lora_r8": [0.80 + s + 0.002 * i for i, s in enumerate(steps)],
        "full_finetuning": [0.80 + s + 0.002 * (7 - i) for i, s in enumerate(steps)],
    }
    found = all_pairs(planted.study_of(runs(accuracies)))
    verdicts = {(c.name, c.reference): c.verdict for c in (pair.comparison for pair in found.pairs)}
    assert verdicts == {
        ("linear_probe", "full_finetuning"): "refuted",
        ("linear_probe", "lora_r8"): "refuted",
        ("full_finetuning", "lora_r8"): "not decided",
    }
    assert len(found.decided) == 2


def test_effect_and_improvement_by_hand() -> None:
    differences = [0.05, 0.06, 0.04, 0.0, -0.01]
    accuracies = {"linear_probe": [0.70 + d for d in differences], "lora_r8": [0.70] * 5}
    (pair,) = all_pairs(planted.study_of(runs(accuracies))).pairs
    assert pair.effect.d == pytest.approx(np.mean(differences) / np.std(differences, ddof=1))
    assert pair.improvement.estimate == pytest.approx(3.5 / 5)


def test_the_family_is_all_pairs() -> None:
    found = all_pairs(planted.study_of(planted.quickstart(seeds=tuple(range(11)), spread=0.002)))
    needed = {c.significance.minimum_n for c in (pair.comparison for pair in found.pairs) if c.significance is not None}
    assert needed == {12}, "66 pairs: 66 * 2 / 2^12 <= 0.05 < 66 * 2 / 2^11"
    assert found.decided == (), "eleven seeds are one too few"


def test_too_many_pairs_are_counted_and_not_formed() -> None:
    found = all_pairs(planted.study_of(planted.quickstart()), most=65)
    assert (found.pairs, found.not_formed) == ((), 66)
    assert len(found.experiments) == 12


def test_nothing_finished_gives_no_pair() -> None:
    found = all_pairs(planted.study_of([planted.failed(EXPERIMENTS["lora_r8"], 0, "out of memory")]))
    assert (found.experiments, found.pairs, found.not_formed) == ((), (), 0)


def test_records_in_another_order_give_the_same_values() -> None:
    records = planted.quickstart(seeds=(0, 1, 2))
    assert all_pairs(planted.study_of(records)) == all_pairs(planted.study_of(records[::-1]))
