"""Pareto fronts against brute force, and on planted studies."""

from typing import Any

import planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_vit.core.records import RunRecord
from peft_vit.lab.analysis import method_results
from peft_vit.lab.analysis.comparison import Front, fronts, pareto_front

EXPERIMENTS = planted.experiments()


def fronts_of(records: list[RunRecord]) -> dict[str, Front]:
    study = planted.study_of(records)
    return {front.cost: front for front in fronts(study, method_results(study))}


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=14))
def test_the_front_is_what_nothing_dominates(pairs) -> None:
    """Word by word: no other is at least as good in both, and better in one."""
    expected = [
        not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in pairs) for cost, value in pairs
    ]
    assert list(pareto_front([cost for cost, _ in pairs], [value for _, value in pairs])) == expected


def lora(name: str, seed: int, accuracy: float, final: int, validation: float | None = None) -> RunRecord:
    changes: dict[str, Any] = dict(planted.counts(final))
    if validation is not None:
        changes["validation"] = planted.metrics(validation, 400)
    return planted.record(EXPERIMENTS[name], seed, accuracy, changes=changes)


def test_validation_decides_who_stands_on_the_front_and_test_is_told() -> None:
    records = [
        lora("lora_r1", 0, 0.70, 100, validation=0.70),
        lora("lora_r2", 0, 0.90, 200, validation=0.69),  # best on test, but validation did not know
        lora("lora_r4", 0, 0.80, 300, validation=0.75),
    ]
    front = fronts_of(records)["final_parameters"]
    assert [(p.experiment, p.cost, p.on_front, p.on_test_front) for p in front.points] == [
        ("lora_r1", 100, True, True),
        ("lora_r2", 200, False, True),
        ("lora_r4", 300, True, False),
    ]
    assert [p.experiment for p in front.on_front] == ["lora_r1", "lora_r4"]
    lead = front.points[2].lead
    assert (lead.name, lead.reference) == ("lora_r4", "lora_r1")
    assert lead.interval.estimate == pytest.approx(0.1)
    assert lead.verdict == "not decided", "one seed"
    assert front.points[0].lead is front.points[1].lead is None


def test_leads_are_one_family_of_paired_tests() -> None:
    accuracy = {"lora_r1": 0.70, "lora_r2": 0.75, "lora_r4": 0.752}
    wobble = [0.0, 0.004, -0.004, 0.008, -0.008, 0.01, -0.01]
    records = [
        lora(name, seed, value + 0.03 * (-1) ** seed * (name == "lora_r4") + step, 100 * i, validation=value)
        for i, (name, value) in enumerate(accuracy.items(), start=1)
        for seed, step in enumerate(wobble)
    ]
    leads = [p.lead for p in fronts_of(records)["final_parameters"].on_front]
    assert [lead.verdict for lead in leads if lead is not None] == ["supported", "not decided"]
    # All seven differences have one sign: p = 2 / 2^7, times 2 comparisons.
    assert leads[1].adjusted_p == pytest.approx(2 * 2 / 2**7)


def test_stored_bytes_hold_the_frozen_weights_too() -> None:
    record = planted.record(EXPERIMENTS["lora_r1"], 0, 0.8)
    point = fronts_of([record])["stored_bytes"].points[0]
    assert point.cost == record.bytes.frozen_bytes + record.bytes.adapter_file_bytes
    assert fronts_of([planted.failed(EXPERIMENTS["lora_r8"], 0, "out of memory")]) == {}


def test_an_unrecorded_cost_is_named_and_one_that_nobody_has_makes_no_front() -> None:
    records = [
        planted.record(EXPERIMENTS["lora_r1"], 0, 0.8, changes={"latency_s": {1: 0.010, 8: 0.050}}),
        planted.record(EXPERIMENTS["lora_r1"], 1, 0.8, changes={"latency_s": {1: 0.012}}),
        planted.record(EXPERIMENTS["lora_r2"], 0, 0.8),
    ]
    front = fronts_of(records)["latency_s"]
    assert [(p.experiment, p.cost) for p in front.points] == [("lora_r1", pytest.approx(0.011))]
    assert front.left_out == ("lora_r2",)
    assert "latency_s" not in fronts_of(records[2:])


@pytest.mark.parametrize("change", [{"processor": "aarch64"}, {"threads": 8}, {"device": "cuda"}])
def test_seconds_of_several_machines_are_not_compared(change) -> None:
    by_cost = fronts_of(
        [
            planted.record(EXPERIMENTS["lora_r1"], 0, 0.8),
            planted.record(EXPERIMENTS["lora_r2"], 0, 0.8, provenance_changes=change),
        ]
    )
    assert by_cost["seconds_per_step"].points == ()
    assert "2 machines" in by_cost["seconds_per_step"].refused
    assert len(by_cost["final_parameters"].points) == 2
