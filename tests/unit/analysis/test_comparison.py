import planted
import pytest

from peft_vit.lab.analysis import Study, analyze
from peft_vit.lab.analysis.comparison import compare_all, references

EXPERIMENTS = planted.experiments()


def two_methods(linear: list[float], lora: list[float]) -> Study:
    """Return a study with one run a seed for either method."""
    return planted.study_of(
        [planted.record(EXPERIMENTS["linear_probe"], seed, value) for seed, value in enumerate(linear)]
        + [planted.record(EXPERIMENTS["lora_r8"], seed, value) for seed, value in enumerate(lora)]
    )


@pytest.mark.parametrize(("shift", "expected"), [(0.05, "supported"), (-0.05, "refuted"), (0.0, "not decided")])
def test_six_seeds_decide_a_clear_difference(shift, expected) -> None:
    linear = [0.70, 0.71, 0.72, 0.73, 0.74, 0.75]
    lora = [value + shift + 0.005 * (-1) ** i * (i + 1) / 3 for i, value in enumerate(linear)]
    (comparison,) = compare_all(two_methods(linear, lora), "linear_probe")
    assert comparison.verdict == expected


def test_only_common_seeds_are_paired_and_ties_are_ties_despite_floating_point() -> None:
    (comparison,) = compare_all(two_methods([0.6, 0.7, 0.8], [0.6 + 0.1, 0.7 + 0.1]), "linear_probe")
    assert list(comparison.by_seed) == [0, 1]
    assert len(set(comparison.by_seed.values())) == 1
    assert comparison.significance.sentence() == "not decidable with n = 2, needs at least 6"


@pytest.mark.parametrize("reference", ["linear_probe", "lora_r4"])
@pytest.mark.parametrize("field", ["split_sha256", "data_sha256", "weights_sha256", "head_init_sha256"])
def test_pairs_on_other_images_or_weights_are_refused_and_of_another_initial_head_marked(reference, field) -> None:
    """A probe has no initial head, so that nothing is marked."""
    other = planted.record(EXPERIMENTS["lora_r8"], 0, 0.8, provenance_changes={field: "f" * 64})
    (comparison,) = compare_all(planted.study_of([planted.record(EXPERIMENTS[reference], 0, 0.7), other]), reference)
    is_head = field == "head_init_sha256"
    assert (comparison.interval is None) == ("1 pair(s) refused" in comparison.note) == (not is_head)
    assert ("initial head" in comparison.note) == (is_head and reference == "lora_r4")


def test_references_are_the_linear_probe_and_lora_of_rank_8() -> None:
    everything = planted.quickstart()
    assert references(planted.study_of(everything)) == ("linear_probe", "lora_r8")
    without = [r for r in everything if r.spec.experiment.method != "linear" and r.spec.experiment.name != "lora_r8"]
    assert references(planted.study_of(without)) == ("lora_r4",)
    assert references(planted.study_of([r for r in everything if r.spec.experiment.method == "full"])) == ()


def test_an_analysis_without_any_finished_run_is_empty() -> None:
    study = planted.study_of([planted.failed(EXPERIMENTS["lora_r8"], 0, "out of memory")])
    analysis = analyze(study)
    assert (analysis.methods, analysis.comparisons, analysis.findings) == ((), (), ())
