"""Where adaptive ranks went, and what low bits cost and save, on planted truth."""

import math

import planted
import pytest

from peft_vit.core.config import ExperimentConfig
from peft_vit.core.records import RankEntry, RunRecord
from peft_vit.lab.analysis.layers import Allocation, allocations
from peft_vit.lab.analysis.quantization import QuantizationImpact, layers_bits, quantization_impacts

EXPERIMENTS = planted.experiments()
ADALORA, LORA = EXPERIMENTS["adalora_proportional_magnitude"], EXPERIMENTS["lora_r8"]
NF4 = EXPERIMENTS["qa_lora_4bit_nf4_constant"]


def allocation_of(*records: RunRecord) -> Allocation:
    (allocation,) = allocations(planted.study_of(list(records)))
    return allocation


def impact_of(*records: RunRecord) -> QuantizationImpact:
    (impact,) = quantization_impacts(planted.study_of(list(records)))
    return impact


def test_final_ranks_are_means_over_seeds_and_a_site_that_is_left_out_has_none() -> None:
    names = [site.name for site in planted.sites()]
    entries = [[RankEntry(step=0, budget=9, ranks=dict.fromkeys(names, 3))], [RankEntry(step=0, budget=9, ranks={})]]
    entries[1].append(RankEntry(step=6, budget=9, ranks={names[0]: 9}))
    entries[1][0] = entries[0][0]
    runs = [planted.record(ADALORA, seed, 0.8, changes={"rank_history": own}) for seed, own in enumerate(entries)]
    allocation = allocation_of(*runs)
    assert (allocation.seeds, allocation.ranks) == (2, dict.fromkeys(names, 1.5) | {names[0]: 6})


@pytest.mark.parametrize(("final", "paired"), [(9_901, True), (9_900, False), (10_100, True), (10_101, False)])
def test_sizes_within_one_percent_are_equal(final, paired) -> None:
    """Between sizes of LoRA the line counts (test_findings_values.py); beyond them, nothing is extrapolated."""
    against = allocation_of(
        planted.record(LORA, 0, 0.80, changes=planted.counts(10_000)),
        planted.record(ADALORA, 0, 0.78, changes=planted.counts(final)),
    ).against_fixed
    assert against.by_seed == ({0: pytest.approx(-0.02)} if paired else {})
    assert (against.interval is not None, "left out" not in against.note) == (paired, paired)


# --- low bits ---------------------------------------------------------------------------------------------------------


def test_offsets_that_merging_adds_count_and_older_records_have_no_model_size() -> None:
    now = planted.record(NF4, 0, 0.8).quantization
    sizes = (now.size, now.size.model_copy(update={"merging_bytes": 1_000_000}), None)
    impacts = [
        impact_of(planted.record(NF4, 0, 0.8, changes={"quantization": now.model_copy(update={"size": size})}))
        for size in sizes
    ]
    plain, more, older = (impact.model for impact in impacts)
    assert more.total - plain.total == 1_000_000
    assert (older, layers_bits(impacts[2].runs)) == (None, 5.0)


def test_the_twin_on_float_weights_differs_in_nothing_else() -> None:
    for impact in quantization_impacts(
        planted.study_of([r for r in planted.quickstart() if r.spec.experiment != LORA])
    ):
        assert impact.against_unquantized.interval is None
        assert "no float LoRA of rank 8" in impact.against_unquantized.note
    training = LORA.training.model_copy(update={"learning_rate": 1e-4})
    slower = LORA.model_copy(update={"name": "slow", "training": training})
    records = [planted.record(experiment, 0, 0.8) for experiment in (slower, NF4)]
    assert impact_of(*records).twin == ()
    assert impact_of(*records, planted.record(LORA, 0, 0.7)).against_unquantized.reference == "lora_r8"


def with_losses(experiment: ExperimentConfig, seed: int, losses: list[float], **changes: object) -> RunRecord:
    return planted.record(experiment, seed, 0.79, changes={"steps": planted.steps(losses), **changes})


def test_a_rougher_quantized_run_is_told_against_its_float_twin_and_one_that_is_not_finite_left_out() -> None:
    smooth, rough = [0.0, 3, 0, 3, 0, 3, 0, 3, 0], [0.0, 6, 0, 6, 0, 6, 0, 6, 0]
    fixed = [with_losses(LORA, seed, smooth) for seed in range(3)]
    records = [*fixed, *(with_losses(NF4, seed, rough) for seed in range(2)), with_losses(NF4, 2, [math.nan] * 9)]
    against = impact_of(*records).against_float
    assert (against["roughness"].name, against["roughness"].reference) == (NF4.name, "lora_r8")
    assert "1 pair(s) left out" in against["roughness"].note
    # The last three of nine: 0, 3, 0 (6, 0, 6 ...) about their mean: sqrt(6), and twice that.
    for measure in ("roughness", "late_deviation"):
        assert against[measure].by_seed == pytest.approx({0: math.sqrt(6), 1: math.sqrt(6)})
    assert against["nll"].by_seed == {0: 0, 1: 0, 2: 0}


def test_balance_at_every_step_with_how_many_seeds_measured_it() -> None:
    whole = planted.record(NF4, 0, 0.79).quantization
    rows = ([{"step": 4.0, "a": 1.0}, {"step": 8.0, "a": 2.0, "b": 5.0}], [{"step": 8.0, "a": 4.0}])
    records = [
        planted.record(NF4, seed, 0.8, changes={"quantization": whole.model_copy(update={"balance": balance})})
        for seed, balance in enumerate(rows)
    ]
    assert impact_of(*records).balance() == {
        "a": [{"step": 4, "mean": 1.0, "n": 1}, {"step": 8, "mean": 3.0, "n": 2}],
        "b": [{"step": 8, "mean": 5.0, "n": 1}],
    }
