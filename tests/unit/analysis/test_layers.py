"""Importance, allocation, quantization and the claims, on planted truth."""

import numpy as np
import planted
import pytest

from peft_vit.analysis import Study
from peft_vit.analysis.allocation import allocations, moved_ranks
from peft_vit.analysis.importance import importance_patterns
from peft_vit.analysis.quantization import layers_bits, quantization_impacts
from peft_vit.records import ImportanceEntry, RankEntry, SiteInfo
from peft_vit.report.figure import Canvas
from peft_vit.report.heatmaps import importance_maps

EXPERIMENTS = planted.experiments()
ADALORA = EXPERIMENTS["adalora_proportional_magnitude"]


@pytest.fixture(scope="module")
def quickstart() -> Study:
    return planted.study_of(planted.quickstart())


def test_planted_importance_is_found(quickstart: Study) -> None:
    pattern = importance_patterns(quickstart)[0]
    assert pattern.attention_over_mlp == pytest.approx((2.0, 2.0)), "attention is four times the MLP"
    # Four types of weight 4 and two of weight 1: mean 3.
    assert pattern.by_matrix["query"].estimate == pytest.approx(4 / 3)
    assert pattern.by_matrix["fc1"].estimate == pytest.approx(1 / 3)
    assert np.diff(np.mean(pattern.by_block, axis=0)) == pytest.approx(np.full(11, 1 / 6.5)), "block i weighs i + 1"
    assert pattern.agreement_between_seeds == pytest.approx(1.0)
    assert pattern.agreement_with_final[-1] == pytest.approx(1.0)
    assert pattern.steps == planted.UPDATES


def test_the_unit_of_the_scores_does_not_matter() -> None:
    small = [ImportanceEntry(step=12, scores=planted.scores_at(36, 0, factor=1e-9))]
    (one,) = importance_patterns(
        planted.study_of([planted.record(ADALORA, 0, 0.8, changes={"importance_history": small})])
    )
    (other,) = importance_patterns(planted.study_of([planted.record(ADALORA, 0, 0.8)]))
    np.testing.assert_allclose(one.relative_final, other.relative_final, rtol=1e-12)


def test_one_seed_has_no_agreement_between_seeds() -> None:
    (pattern,) = importance_patterns(planted.study_of([planted.record(ADALORA, 0, 0.8)]))
    assert pattern.agreement_between_seeds is None
    assert pattern.by_matrix["query"].low is None


def test_scores_of_some_matrices_only() -> None:
    scores = {name: 1.0 for name in planted.scores_at(36, 0) if "attn" in name}
    entries = [ImportanceEntry(step=36, scores=scores)]
    (pattern,) = importance_patterns(
        planted.study_of([planted.record(ADALORA, 0, 0.8, changes={"importance_history": entries})])
    )
    assert pattern.grid.matrices == ("query", "key", "value", "out")
    assert pattern.attention_over_mlp == ()
    assert pattern.agreement_with_final == (None,), "constant scores have no order"


def test_a_matrix_of_some_blocks_only_counts_neither_as_attention_nor_as_mlp() -> None:
    """As Swin's, which merges patches between stages."""
    merge = SiteInfo(name="merge", block=1, matrix="reduction", role="other", in_features=4, out_features=2)
    plain = planted.record(ADALORA, 0, 0.8)
    entries = [
        entry.model_copy(update={"scores": {**entry.scores, "merge": 1e3}}) for entry in plain.importance_history
    ]
    (pattern,) = importance_patterns(
        planted.study_of([plain.model_copy(update={"importance_history": entries, "sites": [*plain.sites, merge]})])
    )
    assert pattern.grid.matrices[-1] == "reduction"
    assert np.isfinite(pattern.relative_final[0, :, -1]).tolist() == [block == 1 for block in range(12)]
    assert pattern.attention_over_mlp == pytest.approx((2.0,))
    assert np.isfinite(pattern.by_block).all()
    drawing = importance_maps([pattern])
    assert drawing.caption.endswith("Grey: the block has no such matrix.")
    assert "Grey" not in importance_maps(importance_patterns(planted.study_of([plain]))).caption
    canvas = Canvas(8, 3)
    drawing.paint(canvas)
    lines = {line.get_label(): line.get_ydata() for line in canvas.figure.subfigs[0].axes[1].lines}
    courses = [lines[label] for label in ("attention", "MLP")]
    assert all(len(course) == 12 and np.isfinite(course).all() for course in courses)
    np.testing.assert_allclose(courses[0], 4 * courses[1])


def test_runs_with_scores_of_zero_are_left_out() -> None:
    entries = [ImportanceEntry(step=36, scores=dict.fromkeys(planted.scores_at(36, 0), 0.0))]
    assert (
        importance_patterns(
            planted.study_of([planted.record(ADALORA, 0, 0.8, changes={"importance_history": entries})])
        )
        == ()
    )


def test_moved_ranks_do_not_count_the_budget() -> None:
    assert moved_ranks([6, 6, 6], [4, 4, 4]) == 0
    assert moved_ranks([4, 4, 4], [6, 4, 2]) == 2
    assert moved_ranks([6, 6, 6], [8, 4, 3]) == 2


def test_allocation_counts(quickstart: Study) -> None:
    first = allocations(quickstart)[0]
    run = first.runs[0]
    record = quickstart.of(ADALORA.name)[0].record
    assert [run[key] for key in ("used", "spent", "budget", "unit")] == [288, 288, 288, "ranks"]
    assert (run["sites"], run["updates"]) == (72, len(planted.UPDATES))
    assert run["sites_without_rank"] == sum(rank == 0 for rank in record.rank_history[-1].ranks.values())
    assert [m.step for m in first.maps] == [0, *planted.UPDATES]
    assert np.nansum(first.maps[0].ranks) == 432
    assert (first.maps[0].ranks == 6).all()


def test_equal_ranks_have_no_concentration() -> None:
    equal = [RankEntry(step=0, budget=72, ranks=dict.fromkeys(planted.scores_at(36, 0), 1))]
    (one,) = allocations(planted.study_of([planted.record(ADALORA, 0, 0.8, changes={"rank_history": equal})]))
    assert one.runs[0]["gini"] == pytest.approx(0)
    assert one.runs[0]["evenness"] == pytest.approx(1)


def test_adaptive_ranks_against_the_line_through_fixed_ranks() -> None:
    """Between 100 and 10,000 parameters the geometric middle, 1,000, has the mean accuracy."""
    records = [
        planted.record(EXPERIMENTS["lora_r1"], 0, 0.70, changes=planted.counts(100)),
        planted.record(EXPERIMENTS["lora_r8"], 0, 0.80, changes=planted.counts(10_000)),
        planted.record(ADALORA, 0, 0.78, changes=planted.counts(1_000)),
    ]
    (one,) = allocations(planted.study_of(records))
    assert one.against_fixed.interval is not None
    assert one.against_fixed.interval.estimate == pytest.approx(0.03)


@pytest.mark.parametrize(("final", "paired"), [(9_901, True), (9_900, False), (10_100, True), (10_101, False)])
def test_sizes_within_one_percent_are_equal(final, paired) -> None:
    records = [
        planted.record(EXPERIMENTS["lora_r8"], 0, 0.80, changes=planted.counts(10_000)),
        planted.record(ADALORA, 0, 0.78, changes=planted.counts(final)),
    ]
    (one,) = allocations(planted.study_of(records))
    assert (one.against_fixed.interval is not None) == paired
    if paired:
        assert list(one.against_fixed.by_seed.values()) == pytest.approx([-0.02])


def test_nothing_is_extrapolated_beyond_the_fixed_ranks() -> None:
    records = [
        planted.record(EXPERIMENTS["lora_r1"], 0, 0.70, changes=planted.counts(100)),
        planted.record(ADALORA, 0, 0.78, changes=planted.counts(1_000)),
    ]
    (one,) = allocations(planted.study_of(records))
    assert one.against_fixed.interval is None
    assert "left out" in one.against_fixed.note


def test_quantization_against_the_float_lora_of_equal_rank(quickstart: Study) -> None:
    by_name = {q.experiment.name: q for q in quantization_impacts(quickstart)}
    nf4 = by_name["qa_lora_4bit_nf4_constant"]
    assert nf4.against_unquantized.reference == "lora_r8"
    assert nf4.claimed == 8.0
    assert layers_bits(nf4.runs) == 5.0, "scales and offsets count: 6.4 times smaller than fp32, not 8"
    assert nf4.model is not None
    left, weights = planted.LEFT_IN_FLOAT + 3080, planted.BACKBONE_PARAMETERS + 770
    assert nf4.model.total == pytest.approx(21_233_664 * 5 / 8 + left)
    assert nf4.model.bits_per_weight == pytest.approx(8 * (21_233_664 * 5 / 8 + left) / weights)
    assert nf4.model.file == nf4.model.live + 9000
    assert nf4.bits_by_layer == dict.fromkeys(nf4.relative_errors, 5.0)
    assert len(nf4.bits_by_layer) == 48
    assert max(nf4.relative_errors, key=nf4.relative_errors.__getitem__) == "blocks.11.mlp.fc2"
    assert nf4.balance() == [
        {"measure": "adapter_to_error_norm", "step": step, "mean": pytest.approx(0.02 * step), "n": 2}
        for step in (16, 32, 48)
    ]


def test_without_an_equal_float_lora_nothing_is_compared() -> None:
    study = planted.study_of([r for r in planted.quickstart() if r.spec.experiment.name != "lora_r8"])
    for impact in quantization_impacts(study):
        assert impact.against_unquantized.interval is None
        assert "no float LoRA of rank 8" in impact.against_unquantized.note


def test_a_float_run_that_was_trained_otherwise_is_no_reference() -> None:
    lora, nf4 = EXPERIMENTS["lora_r8"], EXPERIMENTS["qa_lora_4bit_nf4_constant"]
    slower = lora.model_copy(
        update={"name": "slow", "training": lora.training.model_copy(update={"learning_rate": 1e-4})}
    )
    records = [planted.record(experiment, 0, 0.8) for experiment in (slower, nf4)]
    (impact,) = quantization_impacts(planted.study_of(records))
    assert impact.against_unquantized.interval is None
    (impact,) = quantization_impacts(planted.study_of([*records, planted.record(lora, 0, 0.7)]))
    assert impact.against_unquantized.reference == "lora_r8"


def test_offsets_that_merging_adds_count_and_older_records_have_no_model_size() -> None:
    nf4 = EXPERIMENTS["qa_lora_4bit_nf4_constant"]
    now = planted.record(nf4, 0, 0.8)
    assert now.quantization is not None
    assert now.quantization.size is not None
    merging = now.quantization.size.model_copy(update={"merging_bytes": 1_000_000})
    changed = now.quantization.model_copy(update={"size": merging})
    impacts = [
        quantization_impacts(planted.study_of([planted.record(nf4, 0, 0.8, changes={"quantization": quantization})]))[0]
        for quantization in (now.quantization, changed, now.quantization.model_copy(update={"size": None}))
    ]
    plain, more, older = (impact.model for impact in impacts)
    assert plain is not None
    assert more is not None
    assert more.parts["offsets"] - plain.parts["offsets"] == more.total - plain.total == 1_000_000
    assert older is None
    assert layers_bits(impacts[2].runs) == 5.0
