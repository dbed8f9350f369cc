"""Estimates: what they are known from, and how they add up."""

from dataclasses import replace

import pytest
import torch
from written_runs import run_and_write

from peft_vit.backbones import describe
from peft_vit.forecasting.calibration import Costs, keep_costs
from peft_vit.forecasting.estimate import EstimateRequest, Workload
from peft_vit.forecasting.estimate import estimate_runs as estimate
from peft_vit.records import write_record
from peft_vit.studies.plan import plan_study

pytestmark = pytest.mark.part("runner")

COSTS = Costs(start_s=2.0, step_s=0.5, image_s=0.01, peak_memory_bytes=400_000_000, images=50)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path_factory.mktemp("costs")))


def planned(config, folder, **options):
    return plan_study(config, folder, file=folder / "tiny.yaml", **options)


def wanted(config, folder) -> tuple[list[EstimateRequest], Workload]:
    runs = [
        EstimateRequest(run.spec, run.total_steps, run.spec, run.spec.digest(), None)
        for run in planned(config, folder).runs
    ]
    workload = Workload(describe(config.backbone, 32), 32, 1, torch.device("cpu"), "fp32", 1, 24, 20, 30)
    return runs, workload


def test_costs_are_put_together(study, tmp_path) -> None:
    runs, workload = wanted(study("lora", epochs=4), tmp_path)
    (run,) = runs
    keep_costs(run.kind, COSTS)
    (found,) = estimate(runs, workload)
    # 12 steps; 20 validation images in each of 4 epochs and 30 test images
    assert found.seconds == pytest.approx(2.0 + 12 * 0.5 + (4 * 20 + 30) * 0.01)
    assert found.peak_memory_bytes == 400_000_000 + (24 + 20 + 30 - 50) * 32 * 32  # more grey images
    assert found.basis == "calibration"


def test_what_is_not_known_is_measured_once_a_kind_or_estimated(study, tmp_path) -> None:
    asked = []

    def measure(kinds):
        asked.append(sorted(kinds))
        return {"lora": COSTS}

    config = study("linear", "lora", seeds=(0, 1))
    plan = planned(config, tmp_path, measure=measure)
    assert asked == [["lora"]]  # a probe takes no steps that could be measured
    assert [run.estimate.basis for run in plan.runs] == ["estimate", "estimate", "calibration", "calibration"]
    run_and_write(plan.runs[0].spec, tmp_path)
    again = planned(config, tmp_path, measure=measure)
    assert asked[1:] == [["lora"]]
    assert [run.estimate.basis for run in again.runs] == ["records", "records", "calibration", "calibration"]
    assert planned(config, tmp_path / "smoke", smoke=True, measure=measure).runs[0].estimate.basis == "estimate"
    assert len(asked) == 2  # never of a smoke study


def test_records_serve_runs_of_the_same_kind_and_length(study, tmp_path) -> None:
    config = study("lora")
    (one,) = config.experiments
    training = one.training
    alike = one.model_copy(update={"name": "rate", "training": training.model_copy(update={"learning_rate": 1e-4})})
    longer = one.model_copy(update={"name": "longer", "training": training.model_copy(update={"epochs": 3})})
    config = config.model_copy(update={"experiments": (one, alike, longer)})
    record = run_and_write(planned(config, tmp_path).runs[0].spec, tmp_path)
    *same, other = [run.estimate for run in planned(config, tmp_path).runs]
    assert [one.basis for one in (*same, other)] == ["records", "records", "estimate"]
    assert {(one.seconds, one.peak_memory_bytes) for one in same} == {(record.seconds, record.peak_memory_bytes)}
    elsewhere = record.provenance.model_copy(update={"processor": "another one"})
    write_record(tmp_path, record.model_copy(update={"provenance": elsewhere}))
    assert {run.estimate.basis for run in planned(config, tmp_path).runs} == {"estimate"}


@pytest.mark.parametrize(
    ("training", "images", "widths", "passes"),
    [
        ({}, 8, lambda depth: 34 * depth, 2),
        ({"micro_batch_size": 2}, 2, lambda depth: 34 * depth, 2),
        ({"activation_checkpointing": "blocks"}, 8, lambda depth: depth + 34, 3),
        ({"micro_batch_size": 4, "activation_checkpointing": "blocks"}, 4, lambda depth: depth + 34, 3),
        ({"activation_checkpointing": "adaptive", "recomputed_blocks": 0}, 8, lambda depth: 34 * depth, 2),
        ({"activation_checkpointing": "adaptive", "recomputed_blocks": 3}, 8, lambda depth: 3 + 34 * (depth - 3), 2.5),
    ],
)
def test_arithmetic_knows_what_a_step_keeps_and_computes_again(
    study, tmp_path, monkeypatch, training, images, widths, passes
) -> None:
    monkeypatch.setattr("peft_vit.forecasting.estimate.product_rate", lambda *_, **__: 1e9)
    config = study("lora")
    (one,) = config.experiments
    batch = {"batch_size": 8, "micro_batch_size": None, "activation_checkpointing": "none"}
    other = one.model_copy(update={"training": one.training.model_copy(update=batch | training)})
    runs, workload = wanted(config.model_copy(update={"experiments": (other,)}), tmp_path)
    (found,) = estimate(runs, workload)
    query = workload.shape.sites[0]
    depth = 1 + workload.shape.sites[-1].layer
    plain = 14 / 16  # its MLP is 3 times as wide as its tokens, not 4
    activations = plain * images * 4 * query.tokens * query.in_features * widths(depth)
    float_weights = (4 + 4) * workload.shape.parameters
    assert found.peak_memory_bytes == pytest.approx(700e6 + activations + float_weights, abs=1)
    steps = runs[0].steps
    (without,) = estimate([replace(runs[0], steps=0)], workload)
    assert found.seconds - without.seconds == pytest.approx(
        1.8 * passes * steps * 8 * workload.shape.multiply_adds / 1e9
    )
