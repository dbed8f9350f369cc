"""Measures of the loss's course against hand computations, second implementations and planted noise."""

import math

import numpy as np
import planted
import pytest
from scipy import stats

from peft_vit.core.records import Evaluation
from peft_vit.lab.analysis import Run
from peft_vit.lab.analysis.comparison import method_results
from peft_vit.lab.analysis.convergence import late_loss_deviation, roughness, settled_step
from peft_vit.lab.report.study_tables import convergence_table

LORA = planted.experiments()["lora_r8"]


def run_with(losses: list[float], *, validation: dict[int, float] | None = None, seed: int = 0) -> Run:
    """Return a run with given losses by step and validation losses by step."""
    whole = planted.record(LORA, seed, 0.8)
    changes: dict[str, object] = {"steps": planted.steps(losses)}
    if validation is not None:
        metrics = whole.evaluations[0].metrics
        changes["evaluations"] = [
            Evaluation(step=s, epoch=i + 1, deployable=True, metrics=metrics.model_copy(update={"nll": nll}))
            for i, (s, nll) in enumerate(validation.items())
        ]
    return planted.study_of([planted.record(LORA, seed, 0.8, changes=changes)]).runs[0]


def test_late_deviation_equals_the_standard_error_of_linregress() -> None:
    losses = np.random.default_rng(1).exponential(size=50)
    late = losses[-17:]  # 50 / 3, rounded up
    x = np.arange(17)
    fit = stats.linregress(x, late)
    expected = fit.stderr * math.sqrt(np.sum((x - x.mean()) ** 2))  # residual standard error
    assert late_loss_deviation(run_with(losses.tolist())) == pytest.approx(expected, rel=1e-12)
    assert late_loss_deviation(run_with([10 - 0.5 * i for i in range(12)])) == pytest.approx(0, abs=1e-12), "a line"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "losses",
    [[], [1.0, 2.0], *([1.0, 2.0, 1.0] * 4 + [loss] for loss in (math.nan, math.inf, -math.inf, 1e308, -1e155))],
)
def test_too_few_losses_or_one_without_a_finite_square_are_not_measured(losses) -> None:
    run = run_with(losses)
    assert (late_loss_deviation(run), roughness(run)) == (None, None)


def test_roughness_finds_the_noise_and_not_the_slope() -> None:
    noise = 0.1 * np.random.default_rng(2).normal(size=20_000)
    steep = np.linspace(50, 0, 20_000)
    assert roughness(run_with((steep + noise).tolist())) == pytest.approx(0.1, rel=0.03)
    assert roughness(run_with(steep.tolist())) == pytest.approx(0, abs=1e-9)


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
def test_settled_step(validation, expected) -> None:
    assert settled_step(run_with([1.0], validation=validation)) == expected


def test_an_experiment_over_its_seeds() -> None:
    losses = {0: [0, 3, 0, 3, 0, 3, 0, 3, 0], 1: [0, 6, 0, 6, 0, 6, 0, 6, 0], 2: [0, 1]}
    validation = {0: {4: 0.5}, 1: {4: 0.9, 8: 0.5}, 2: {}}
    records = [run_with(losses[seed], validation=validation[seed], seed=seed).record for seed in losses]
    (row,) = convergence_table(method_results(planted.study_of(records))).data
    assert (row["roughness"], row["late_deviation"]) == pytest.approx((1.5 * math.sqrt(6),) * 2)
    assert row["settled_step"] == 6
    assert {row[f"{name}_n"] for name in ("roughness", "late_deviation", "settled_step")} == {2}
    assert (row["steps"], row["n"]) == (9, 3)
