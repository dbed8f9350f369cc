"""Tables of pairs, fronts, calibration, ranks, low bits and sizes, and the line on the score fisher: what they say."""

from __future__ import annotations

from collections.abc import Iterable

import planted
import pytest

from peft_vit.analysis import Analysis, analyze
from peft_vit.analysis.comparison import AllPairs, all_pairs
from peft_vit.records import FisherCheck, Predictions, RankEntry, RunRecord
from peft_vit.report.allocation_tables import allocation_course_table, allocation_table, control_blocks
from peft_vit.report.calibration_tables import calibration_blocks
from peft_vit.report.document import Block, Paragraph, Table
from peft_vit.report.layer_tables import seed_agreement_table
from peft_vit.report.pair_tables import front_blocks, pair_blocks
from peft_vit.report.quantization_tables import (
    against_float_table,
    balance_table,
    bytes_table,
    layers_table,
    quantization_cost_table,
    size_table,
)
from peft_vit.report.sections import study_documents

EXPERIMENTS = planted.experiments()


def analysis_of(records: list[RunRecord]) -> Analysis:
    study = planted.study_of(records)
    return analyze(study)


def pairs_of(records: list[RunRecord], **options: int) -> AllPairs:
    study = planted.study_of(records)
    return all_pairs(study, **options)


@pytest.fixture(scope="module")
def quickstart() -> Analysis:
    return analysis_of(planted.quickstart())


def table(blocks: Iterable[Block], slug: str) -> Table:
    (found,) = [block for block in blocks if isinstance(block, Table) and block.slug == slug]
    return found


def three(n: int) -> list[RunRecord]:
    """Two experiments alike, one far behind."""
    values = {"linear_probe": 0.70, "lora_r2": 0.80, "lora_r8": 0.80}
    return [
        planted.record(EXPERIMENTS[name], seed, value + 0.01 * (-1) ** (seed + (name == "lora_r2")))
        for name, value in values.items()
        for seed in range(n)
    ]


def test_few_experiments_stand_in_a_matrix_whose_halves_mirror_one_another() -> None:
    matrix = table(pair_blocks(pairs_of(three(8))), "all_pairs")
    assert matrix.columns == ("experiment", "1", "2", "3")
    first, second, third = matrix.rows
    assert first[1] == second[2] == third[3] == "–"
    assert (first[3], third[1]) == ("−10.0 ▼", "+10.0 ▲"), "alike in every seed: 3 x 2 / 2^8 is below 5 %"
    assert (second[3], third[2]) == ("0.0", "0.0")
    assert "2 of 3 pairs are decided" in matrix.note


def test_the_better_one_stands_first_among_decided_pairs() -> None:
    decided = table(pair_blocks(pairs_of(three(8))), "decided_pairs")
    assert {(row[0], row[1]) for row in decided.rows} == {("lora_r2", "linear_probe"), ("lora_r8", "linear_probe")}
    for row in decided.rows:
        assert row[2].startswith("+10.0 [")
        assert row[5] == "100.0 %", "improvement counts for the better one"


def test_without_enough_seeds_the_needed_number_is_told() -> None:
    matrix = table(pair_blocks(pairs_of(three(2))), "all_pairs")
    assert "0 of 3 pairs are decided" in matrix.note
    assert "at least 7 seeds" in matrix.note, "3 x 2 / 2^7 <= 0.05 < 3 x 2 / 2^6"


def test_too_many_pairs_are_refused_in_words() -> None:
    (said,) = pair_blocks(pairs_of(three(2), most=2))
    assert isinstance(said, Paragraph)
    assert "3 experiments make 3 pairs" in said.text


def test_many_experiments_have_their_decided_pairs_and_a_csv_of_all() -> None:
    records = planted.quickstart()
    extra = EXPERIMENTS["lora_r8"].model_copy(update={"name": "one_more"})
    blocks = pair_blocks(pairs_of([*records, planted.record(extra, 0, 0.8)]))
    decided = table(blocks, "all_pairs")
    assert decided.rows == ()
    assert len(decided.data) == 13 * 12 // 2


def test_fronts_show_members_and_keep_the_rest_in_the_csv_file(quickstart: Analysis) -> None:
    fronts = table(front_blocks(quickstart.fronts), "pareto_fronts")
    rows = [row for row in fronts.rows if row[0] == "trainable parameters"]
    assert rows[0][1] == "linear_probe", "770 parameters: the cheapest"
    assert rows[0][6] == "cheapest"
    assert all(row[6] == "not decided" for row in rows[1:]), "two seeds decide nothing"
    assert len([row for row in fronts.data if row["cost"] == "final_parameters"]) == 12


def test_other_machines_are_said_in_place_of_a_front() -> None:
    records = [
        planted.record(EXPERIMENTS["lora_r2"], 0, 0.8),
        planted.record(EXPERIMENTS["lora_r8"], 0, 0.8, provenance_changes={"threads": 8}),
    ]
    said = [block.text for block in front_blocks(analysis_of(records).fronts) if isinstance(block, Paragraph)]
    assert any("No Pareto front of seconds a step" in text for text in said)


def test_calibration_names_runs_without_predictions() -> None:
    predicted = Predictions(images=[0, 1], labels=[0, 1], predicted=[0, 0], probability=[0.9, 0.9])
    records = [
        planted.record(EXPERIMENTS["lora_r8"], 0, 0.8, changes={"predictions": predicted}),
        planted.record(EXPERIMENTS["lora_r8"], 1, 0.8),
        planted.record(EXPERIMENTS["lora_r2"], 0, 0.8),
    ]
    found = analysis_of(records)
    blocks = list(calibration_blocks(found.calibration, found.calibration_differences))
    (said,) = [block.text for block in blocks if isinstance(block, Paragraph)]
    assert "lora_r2, lora_r8 (1 of 2)" in said
    rows = {row[0]: row for row in table(blocks, "calibration").rows}
    assert rows["lora_r2"][3:6] == ("–", "–", "–")
    assert rows["lora_r8"][5] == "0.400 [no interval]", "0.9 is 0.4 above the one right of two"
    bins = table(blocks, "reliability")
    assert bins.rows == (("lora_r8", "90.0 % / 50.0 % (2)"),)


def test_a_study_without_controls_says_so_in_a_sentence_a_kind_that_names_each_experiment(quickstart: Analysis) -> None:
    blocks = list(control_blocks(quickstart.against_controls))
    assert [block.kind for block in blocks] == ["paragraph", "paragraph"]
    for block, control in zip(blocks, ("uniform", "random"), strict=True):
        assert isinstance(block, Paragraph)
        assert f"importance_metric: {control}" in block.text
        assert all(name in block.text for name in EXPERIMENTS if name.startswith("adalora_"))


def test_a_control_that_some_experiments_have_stands_in_the_table_and_the_others_are_named() -> None:
    scored = {
        "total_rank_budget": 288,
        "allocation_strategy": "proportional",
        "update_frequency": 6,
        "warmup_steps": 12,
    }
    uniform = planted.experiments_of(
        {"name": "u", "method": "adalora", "adalora": {**scored, "importance_metric": "uniform"}}
    )["u"]
    names = ("adalora_proportional_magnitude", "adalora_top_k_fisher")
    records = [planted.record(e, seed, 0.8) for e in (uniform, *(EXPERIMENTS[n] for n in names)) for seed in (0, 1)]
    blocks = list(control_blocks(analysis_of(records).against_controls))
    assert table(blocks, "allocation_against_controls").rows[0][:3] == (names[0], "uniform", "u")
    said = [block.text for block in blocks if isinstance(block, Paragraph)]
    assert any("importance_metric: random" in text and names[0] in text and names[1] in text for text in said)


def test_every_update_stands_in_the_csv_file(quickstart: Analysis) -> None:
    course = allocation_course_table(quickstart.allocation)
    assert len(course.rows) == 6
    assert len(course.data) == 6 * (1 + len(planted.UPDATES))
    assert {row[-1] for row in course.rows} == {str(planted.UPDATES[-1])}


def test_low_bits_stand_with_their_settings_and_costs(quickstart: Analysis) -> None:
    rows = {row[0]: row for row in against_float_table(quickstart.quantization).rows}
    assert rows["qa_lora_4bit_nf4_constant"][1:5] == ("4", "nf4", "32", "constant")
    assert rows["qa_lora_4bit_fp4_cosine"][1:5] == ("4", "fp4", "rows", "cosine")
    assert all(row[6].endswith("not decided") for row in rows.values())
    costs = {row[0]: row for row in quantization_cost_table(quickstart.quantization).rows}
    float_bytes = 4 * planted.BACKBONE_PARAMETERS + 4 * 664_322 + 4000
    kept = 4 * (planted.BACKBONE_PARAMETERS - 21_233_664) + 21_233_664 * 5 // 8 + 4 * 664_322 + 4000
    assert costs["qa_lora_4bit_nf4_constant"][2].endswith(f"(× {kept / float_bytes:.2f})")
    assert costs["qa_lora_4bit_nf4_constant"][5] == "–", "no latency was recorded"


def test_the_balance_shows_first_middle_and_last_check(quickstart: Analysis) -> None:
    row = balance_table(quickstart.quantization).rows[0]
    assert row[2:] == ("0.32 (step 16)", "0.64 (step 32)", "0.96 (step 48)")


def test_agreement_of_seeds_has_no_test(quickstart: Analysis) -> None:
    agreement = seed_agreement_table(quickstart.seed_agreements)
    assert "no test" in agreement.note
    assert all(row[3] == "1.00" for row in agreement.rows), "planted orders are equal"


def test_the_budget_stands_in_its_unit() -> None:
    ranks = EXPERIMENTS["adalora_proportional_magnitude"]
    assert ranks.adalora is not None
    settings = ranks.adalora.model_copy(update={"total_rank_budget": None, "total_parameter_budget": 83_000})
    in_parameters = ranks.model_copy(update={"name": "in_parameters", "adalora": settings})
    one_each = dict.fromkeys((site.name for site in planted.sites()), 1)
    entry = RankEntry(step=0, budget=83_000, ranks=one_each, unit="parameters", cost=82_944)  # 72 x 1,152
    changed = planted.record(in_parameters, 0, 0.8, changes={"rank_history": [entry]})
    table = allocation_table(analysis_of([planted.record(ranks, 0, 0.8), changed]).allocation)
    column = table.columns.index("ranks / budget")
    assert {row[0]: row[column] for row in table.rows} == {
        ranks.name: "288 / 288",
        "in_parameters": "72 ranks: 82,944 / 83,000 parameters",
    }
    data = {row["experiment"]: (row["used"], row["spent"], row["budget"], row["unit"]) for row in table.data}
    assert data == {ranks.name: (288, 288, 288, "ranks"), "in_parameters": (72, 82_944, 83_000, "parameters")}


NF4, INT8 = (EXPERIMENTS[name] for name in ("qa_lora_4bit_nf4_constant", "qa_lora_8bit_int8_linear"))
WEIGHTS = 21_233_664  # of the quantized layers


def test_claimed_and_measured_sizes_stand_side_by_side_and_older_records_say_what_they_know() -> None:
    old = planted.record(INT8, 0, 0.8)
    assert old.quantization is not None
    older = {"quantization": old.quantization.model_copy(update={"size": None}), "bits_history": []}
    found = analysis_of([planted.record(NF4, 0, 0.8), planted.record(INT8, 0, 0.8, changes=older)]).quantization
    total = WEIGHTS * 5 / 8 + planted.LEFT_IN_FLOAT + 3080
    bits = 8 * total / (planted.BACKBONE_PARAMETERS + 770)
    model = (f"{bits:.2f}", f"{32 / bits:.1f} ×", f"{16 / bits:.1f} ×")
    stored = (f"{total / 1e6:.1f} MB", f"{(total + 9000) / 1e6:.1f} MB", "900.0 MB")
    assert size_table(found).rows == (
        (NF4.name, "8.0 ×", "5.00", "6.4 ×", "3.2 ×", *model, *stored),
        (INT8.name, "4.0 ×", "9.00", "3.6 ×", "1.8 ×", "–", "–", "–", "–", "–", "900.0 MB"),
    )
    (parts,) = bytes_table(found).data
    counted = {name: size for name, size in parts.items() if name not in {"experiment", "total_bytes", "weights"}}
    assert sum(counted.values()) == parts["total_bytes"]
    assert counted["codes"] == WEIGHTS / 2
    assert counted["scales"] == counted["offsets"] == WEIGHTS / 16
    layers = [row for row in layers_table(found).data if row["experiment"] == NF4.name]
    assert [row["bits_per_weight"] for row in layers] == [5.0] * 48
    errors = [row["relative_error"] for row in layers]
    assert errors == sorted(errors)


def check(rho: float | None, sites: int) -> FisherCheck:
    values = {site.name: 1.0 for site in planted.sites()[:sites]}
    return FisherCheck(images=32, minibatch=values, per_sample=values, rho=rho)


@pytest.mark.part("importance analysis")
@pytest.mark.parametrize(
    ("checks", "said"),
    [
        ([check(0.9, 72), check(0.7, 40)], ["over the 40–72 sites with rank: 0.80 (from 0.70 to 0.90), n = 2 seeds."]),
        ([check(0.9, 72), None], ["over the 72 sites with rank: 0.90, n = 1 seed."]),
        ([check(None, 72)], ["over the 72 sites with rank: undefined, one of both is constant, n = 0 seeds."]),
        ([None, None], []),
    ],
)
def test_one_line_says_how_far_the_score_fisher_is_from_the_empirical_one(
    checks: list[FisherCheck | None], said: list[str]
) -> None:
    name = "adalora_top_k_fisher"
    records = [planted.record(EXPERIMENTS[name], s, 0.8, changes={"fisher_check": c}) for s, c in enumerate(checks)]
    (document,) = study_documents([analysis_of(records)])
    blocks = document.sections["Layer importance patterns"]
    lines = [block.text for block in blocks if isinstance(block, Paragraph)]
    assert len(lines) == len(said)
    for line, found in zip(lines, said, strict=True):
        assert line.startswith(f"{name}: the score fisher (minibatch empirical Fisher) against the per-sample")
        assert "same 32 training images" in line
        assert found in line
