"""Estimates: what they are known from, how they add up; lines through two sizes, what fits, a real measurement."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from written_runs import planned, run_and_write

from peft_vit.core.backbones import describe
from peft_vit.core.config import MeasuresConfig
from peft_vit.runs.costs.estimate import EstimateRequest, Throughput, Workload
from peft_vit.runs.costs.estimate import estimate_runs as estimate
from peft_vit.runs.costs.time_limit import makespan
from peft_vit.runs.costs.timing_run import MeasuredCosts, cache_costs
from peft_vit.runs.records.storage import write_record

pytestmark = pytest.mark.part("runner")

COSTS = MeasuredCosts(start_s=2.0, step_s=0.5, image_s=0.01, peak_memory_bytes=400_000_000, images=50)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path_factory.mktemp("costs")))


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
    cache_costs(run.kind, COSTS)
    (estimated,) = estimate(runs, workload)
    # 12 steps; 20 validation images in each of 4 epochs and 30 test images
    assert estimated.seconds == pytest.approx(2.0 + 12 * 0.5 + (4 * 20 + 30) * 0.01)
    assert estimated.peak_memory_bytes == 400_000_000 + (24 + 20 + 30 - 50) * 32 * 32  # more grey images
    assert estimated.basis == "calibration"
    spec = run.spec.model_copy(update={"measures": MeasuresConfig(latency_batches=(1, 8))})
    (measuring,) = estimate([replace(run, spec=spec)], workload)
    assert measuring.seconds == estimated.seconds  # the timing run has done that before its steps


def test_no_batch_is_larger_than_the_training_set(study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("peft_vit.runs.costs.estimate.product_throughput", lambda *_, **__: 1e9)
    (run,), workload = wanted(study("lora", batch_size=24, schedule="constant"), tmp_path)
    training = run.spec.experiment.training.model_copy(update={"batch_size": 64})
    spec = run.spec.model_copy(update={"experiment": run.spec.experiment.model_copy(update={"training": training})})
    larger, whole = estimate([replace(run, spec=spec), run], workload)
    assert larger.seconds == whole.seconds


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
    (experiment,) = config.experiments
    training = experiment.training
    alike = experiment.model_copy(
        update={"name": "rate", "training": training.model_copy(update={"learning_rate": 1e-4})}
    )
    longer = experiment.model_copy(update={"name": "longer", "training": training.model_copy(update={"epochs": 3})})
    config = config.model_copy(update={"experiments": (experiment, alike, longer)})
    record = run_and_write(planned(config, tmp_path).runs[0].spec, tmp_path)
    *same, other = [run.estimate for run in planned(config, tmp_path).runs]
    assert [run.basis for run in (*same, other)] == ["records", "records", "estimate"]
    assert {(run.seconds, run.peak_memory_bytes) for run in same} == {(record.seconds, record.peak_memory_bytes)}
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
    monkeypatch.setattr("peft_vit.runs.costs.estimate.product_throughput", lambda *_, **__: 1e9)
    config = study("lora")
    (experiment,) = config.experiments
    batch = {"batch_size": 8, "micro_batch_size": None, "activation_checkpointing": "none"}
    other = experiment.model_copy(update={"training": experiment.training.model_copy(update=batch | training)})
    runs, workload = wanted(config.model_copy(update={"experiments": (other,)}), tmp_path)
    (estimated,) = estimate(runs, workload)
    query = workload.shape.sites[0]
    depth = 1 + workload.shape.sites[-1].layer
    plain = 14 / 16  # its MLP is 3 times as wide as its tokens, not 4
    activations = plain * images * 4 * query.tokens * query.in_features * widths(depth)
    float_weights = (4 + 4) * workload.shape.parameters
    assert estimated.peak_memory_bytes == pytest.approx(700e6 + activations + float_weights, abs=1)
    steps = runs[0].steps
    (without,) = estimate([replace(runs[0], steps=0)], workload)
    assert estimated.seconds - without.seconds == pytest.approx(
        1.8 * passes * steps * 8 * workload.shape.multiply_adds / 1e9
    )


# --- times from a few measured steps ---


def test_a_step_counts_its_passes_and_blocks_that_are_computed_again(study) -> None:
    shape = describe(study("lora").backbone, 32)
    throughput = Throughput.estimated(1e9)
    image_s = throughput.image_s(shape)
    assert image_s == pytest.approx(1.8 * shape.multiply_adds / 1e9)
    blocks = len(shape.values_by_block)
    for method, recomputed, passes in (("lora", 0, 2), ("full", 0, 3), ("lora", blocks, 3), ("lora", blocks // 2, 2.5)):
        assert throughput.step_s(shape, method, 8, recomputed) == pytest.approx(8 * passes * image_s)


def simulated(seconds: list[float], workers: int, busy: list[float]) -> float:
    """Move a clock from one end of a run to the next."""
    clock, waiting, running = 0.0, list(seconds), sorted(busy)
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(clock + waiting.pop(0))
        running.sort()
        clock = running.pop(0)
    return clock


def test_the_makespan_is_that_of_a_simulation() -> None:
    draw = random.Random(0)
    for workers, count, occupied in itertools.product((1, 2, 3, 7), (0, 1, 2, 5, 20), (0, 1, 2)):
        seconds = [draw.choice((1.0, 2.5, 7.0, draw.random())) for _ in range(count)]
        busy = [draw.random() * 5 for _ in range(min(occupied, workers))]
        expected = simulated(seconds, workers, busy)
        assert makespan(seconds, workers, busy=busy) == pytest.approx(expected), (seconds, workers, busy)
    assert makespan([1.0, 1.0, 1.0, 3.0], 2) == 4.0  # a long run at the end
