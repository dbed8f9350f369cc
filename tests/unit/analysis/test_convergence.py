"""Measures of the loss's course against hand computations, second implementations and planted noise."""

from __future__ import annotations

import math
import random

import numpy as np
import planted
import pytest
from scipy import stats

from peft_vit.analysis import Run
from peft_vit.analysis.comparison import method_results
from peft_vit.analysis.convergence import late_loss_deviation, roughness, settled_step
from peft_vit.analysis.quantization import costs, quantization_impacts
from peft_vit.records import Evaluation, RunRecord, StepRow
from peft_vit.report.method_tables import convergence_table

LORA = planted.experiments()["lora_r8"]


def steps(losses: list[float]) -> list[StepRow]:
    return [
        StepRow(step=i + 1, loss=loss, learning_rate=1e-3, gradient_norm=1.0, seconds=0.5)
        for i, loss in enumerate(losses)
    ]


def run_with(losses: list[float], *, validation: dict[int, float] | None = None, seed: int = 0) -> Run:
    """Return a run with given losses by step and validation losses by step."""
    whole = planted.record(LORA, seed, 0.8)
    changes: dict[str, object] = {"steps": steps(losses)}
    if validation is not None:
        metrics = whole.evaluations[0].metrics
        changes["evaluations"] = [
            Evaluation(step=s, epoch=i + 1, deployable=True, metrics=metrics.model_copy(update={"nll": nll}))
            for i, (s, nll) in enumerate(validation.items())
        ]
    return planted.study_of([planted.record(LORA, seed, 0.8, changes=changes)]).runs[0]


def test_late_deviation_of_a_line_is_zero_however_steep() -> None:
    assert late_loss_deviation(run_with([10 - 0.5 * i for i in range(12)])) == pytest.approx(0, abs=1e-12)


def test_late_deviation_equals_the_standard_error_of_linregress() -> None:
    losses = np.random.default_rng(1).exponential(size=50)
    late = losses[-17:]  # 50 / 3, rounded up
    x = np.arange(17)
    fit = stats.linregress(x, late)
    expected = fit.stderr * math.sqrt(np.sum((x - x.mean()) ** 2))  # residual standard error
    assert late_loss_deviation(run_with(losses.tolist())) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e308, -1e155])
def test_a_loss_that_has_no_finite_square_is_not_measured(loss: float) -> None:
    run = run_with([1.0, 2.0, 1.0] * 4 + [loss])
    assert late_loss_deviation(run) is None
    assert roughness(run) is None


def test_roughness_by_a_plain_loop() -> None:
    random.seed(3)
    y = [random.random() for _ in range(20)]
    total = 0.0
    for i in range(1, 19):
        total += (0.5 * y[i - 1] - y[i] + 0.5 * y[i + 1]) ** 2
    assert roughness(run_with(y)) == pytest.approx(math.sqrt(total / 1.5 / 18), rel=1e-12)


def test_roughness_finds_the_noise_and_not_the_slope() -> None:
    noise = 0.1 * np.random.default_rng(2).normal(size=20_000)
    steep = np.linspace(50, 0, 20_000)
    assert roughness(run_with((steep + noise).tolist())) == pytest.approx(0.1, rel=0.03)
    assert roughness(run_with(steep.tolist())) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("losses", [[1.0, 2.0], [1.0] * 11 + [math.nan], []])
def test_what_cannot_be_measured_is_none(losses: list[float]) -> None:
    run = run_with(losses)
    assert (late_loss_deviation(run), roughness(run)) == (None, None)


def test_rows_in_another_order_give_the_same_bits() -> None:
    losses = np.random.default_rng(4).random(30).tolist()
    rows = steps(losses)
    random.Random(1).shuffle(rows)
    shuffled = planted.study_of([planted.record(LORA, 0, 0.8, changes={"steps": rows})]).runs[0]
    assert late_loss_deviation(shuffled) == late_loss_deviation(run_with(losses))
    assert roughness(shuffled) == roughness(run_with(losses))


@pytest.mark.parametrize(
    ("validation", "expected"),
    [
        ({10: 0.9, 20: 0.51, 30: 0.49, 40: 0.5}, 20),
        ({10: 0.9, 20: 0.5, 30: 0.3, 40: 0.5}, 40),  # passing through is not settling
        ({10: 0.5, 20: 0.5}, 10),
        ({10: 0.9}, 10),
        ({}, None),
    ],
)
def test_settled_step(validation: dict[int, float], expected: int | None) -> None:
    assert settled_step(run_with([1.0], validation=validation)) == expected


def test_an_experiment_over_its_seeds() -> None:
    rough = {0: [0, 3, 0, 3], 1: [0, 6, 0, 6]}
    records = [planted.record(LORA, seed, 0.8, changes={"steps": steps(y)}) for seed, y in rough.items()]
    (row,) = convergence_table(method_results(planted.study_of(records))).data
    assert row["roughness"] == pytest.approx(1.5 * math.sqrt(6))
    assert row["roughness_n"] == 2
    assert row["late_deviation"] is None, "two steps are no course"
    assert (row["steps"], row["n"]) == (4, 2)


def quantized(seed: int, losses: list[float], **changes: object) -> RunRecord:
    experiment = planted.experiments()["qa_lora_4bit_nf4_constant"]
    return planted.record(experiment, seed, 0.79, changes={"steps": steps(losses), **changes})


def test_a_rougher_quantized_run_is_told_against_its_float_twin() -> None:
    smooth, rough = [0.0, 3, 0, 3, 0, 3, 0, 3, 0], [0.0, 6, 0, 6, 0, 6, 0, 6, 0]
    records = [planted.record(LORA, seed, 0.8, changes={"steps": steps(smooth)}) for seed in range(2)]
    records += [quantized(seed, rough) for seed in range(2)]
    (impact,) = quantization_impacts(planted.study_of(records))
    against = impact.against_float
    assert (against["roughness"].name, against["roughness"].reference) == ("qa_lora_4bit_nf4_constant", "lora_r8")
    assert list(against["roughness"].by_seed.values()) == pytest.approx([math.sqrt(6), math.sqrt(6)])
    # The last three of nine: 0, 3, 0 (6, 0, 6 ...) about their mean: sqrt(6), and twice that.
    assert list(against["late_deviation"].by_seed.values()) == pytest.approx([math.sqrt(6), math.sqrt(6)])
    assert against["nll"].interval is not None
    assert against["nll"].interval.estimate == pytest.approx(1.2 * 0.01)


def test_a_loss_that_is_not_finite_leaves_its_pair_out_and_says_so() -> None:
    records = [planted.record(LORA, seed, 0.8) for seed in range(2)]
    records += [quantized(0, [math.nan] * 12), quantized(1, [1.0, 2.0, 1.0] * 4)]
    (impact,) = quantization_impacts(planted.study_of(records))
    assert impact.against_float["roughness"].by_seed.keys() == {1}
    assert "1 pair(s) left out" in impact.against_float["roughness"].note


def test_costs_stand_beside_those_of_the_float_twin() -> None:
    latency = {1: 0.02, 8: 0.1}
    records = [planted.record(LORA, 0, 0.8, changes={"latency_s": latency, "seconds_per_step": 0.5})]
    records += [
        quantized(0, [1.0] * 9, latency_s={1: 0.03, 16: 0.2}, seconds_per_step=0.9),
        quantized(1, [1.0] * 9, latency_s={1: 0.05, 8: 0.4}, seconds_per_step=1.1, own_memory_bytes=None),
    ]
    (impact,) = quantization_impacts(planted.study_of(records))
    own, twin = costs(impact.runs), costs(impact.twin)
    latencies = {name: seconds for name, seconds in own.items() if name.startswith("latency")}
    assert latencies == {"latency_s_batch_1": pytest.approx(0.04)}, "only what both runs measured"
    assert own["seconds_per_step"] == pytest.approx(1.0)
    assert own["own_memory_bytes"] == 900_000_000
    assert (twin["latency_s_batch_1"], twin["latency_s_batch_8"]) == (latency[1], latency[8])
    assert impact.same_machine
    assert twin["stored_bytes"] is not None
    assert own["stored_bytes"] is not None
    assert twin["stored_bytes"] > 3 * own["stored_bytes"]


def test_balance_at_every_step_with_how_many_seeds_measured_it() -> None:
    whole = planted.record(planted.experiments()["qa_lora_4bit_nf4_constant"], 0, 0.79).quantization
    assert whole is not None
    rows = ([{"step": 4.0, "a": 1.0}, {"step": 8.0, "a": 2.0, "b": 5.0}], [{"step": 8.0, "a": 4.0}])
    records = [
        quantized(seed, [1.0] * 9, quantization=whole.model_copy(update={"balance": balance}))
        for seed, balance in enumerate(rows)
    ]
    (impact,) = quantization_impacts(planted.study_of(records))
    assert [tuple(row[key] for key in ("step", "measure", "mean", "n")) for row in impact.balance()] == [
        (4, "a", 1.0, 1),
        (8, "a", 3.0, 2),
        (8, "b", 5.0, 1),
    ]
