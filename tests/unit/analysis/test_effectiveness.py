"""Allocation against its controls, churn, and how early the end was visible; planted."""

import numpy as np
import planted
import pytest

from peft_vit.analysis.layers import AgainstControl, against_controls, allocations, overlap, settled_step
from peft_vit.config import ExperimentConfig
from peft_vit.records import RankEntry, RunRecord

ADALORA = planted.experiments()["adalora_proportional_magnitude"]
NAMES = [site.name for site in planted.sites()]


def variant(name: str, **settings: object) -> ExperimentConfig:
    section = ADALORA.adalora.model_copy(update=settings)
    return ADALORA.model_copy(update={"name": name, "adalora": section})


def run(experiment: ExperimentConfig, seed: int, accuracy: float, final: int = 1000) -> RunRecord:
    return planted.record(experiment, seed, accuracy, changes=planted.counts(final))


def rows_of(records: list[RunRecord]) -> dict[tuple[str, str], AgainstControl]:
    return {(row.experiment, row.control): row for row in against_controls(planted.study_of(records))}


def test_scored_ranks_against_uniform_and_random_ones() -> None:
    uniform, random = variant("uniform", importance_metric="uniform"), variant("random", importance_metric="random")
    records = [run(ADALORA, seed, 0.80 + 0.01 * seed) for seed in range(7)]
    records += [run(uniform, seed, 0.79 + 0.005 * seed, final=2000) for seed in range(7)]
    records += [run(random, seed, 0.83) for seed in range(7)]
    rows = rows_of(records)
    assert set(rows) == {(ADALORA.name, "uniform"), (ADALORA.name, "random")}, "a control has no control"
    against = rows[ADALORA.name, "uniform"]
    assert (against.control_experiment, against.same_strategy, against.parameters_ratio) == ("uniform", True, 0.5)
    assert against.accuracy.interval.estimate == pytest.approx(0.01 + 0.015)
    assert against.accuracy.verdict == "supported"
    assert rows[ADALORA.name, "random"].accuracy.verdict == "not decided"


def test_a_control_of_the_same_strategy_goes_before_another() -> None:
    threshold = variant("scored", allocation_strategy="threshold")
    other = variant("a_uniform", importance_metric="uniform")
    same = variant("z_uniform", importance_metric="uniform", allocation_strategy="threshold")
    records = [run(e, 0, 0.8) for e in (threshold, other)]
    first = rows_of(records)["scored", "uniform"]
    assert (first.control_experiment, first.same_strategy) == ("a_uniform", False)
    second = rows_of([*records, run(same, 0, 0.8)])["scored", "uniform"]
    assert (second.control_experiment, second.same_strategy) == ("z_uniform", True)


@pytest.mark.parametrize("change", [{"total_rank_budget": 144}, {"warmup_steps": 6}, {"scale": 1.0}])
def test_another_budget_or_course_is_no_control_and_its_absence_is_said(change) -> None:
    row = rows_of([run(ADALORA, 0, 0.8), run(variant("u", importance_metric="uniform", **change), 0, 0.8)])[
        ADALORA.name, "uniform"
    ]
    assert row.control_experiment is None
    assert row.accuracy.interval is None
    assert row.accuracy.verdict == "not decided"
    assert "importance_metric: uniform" in row.accuracy.note


def test_overlap_by_hand_and_one_minus_the_total_variation_distance() -> None:
    # Shares 1/4 1/4 1/2 and 1/2 1/2 0: the smaller ones are 1/4, 1/4, 0.
    assert overlap([1, 1, 2], [3, 3, 0]) == 0.5
    assert overlap([6, 6], [1, 1]) == 1.0, "a larger budget alone is no difference"
    assert overlap([0, 0], [1, 1]) is overlap([1, 1], [0, 0]) is None
    p, q = np.random.default_rng(1).integers(0, 9, (2, 40))
    assert overlap(p, q) == pytest.approx(1 - 0.5 * np.abs(p / p.sum() - q / q.sum()).sum(), abs=1e-12)


@pytest.mark.parametrize(
    ("overlaps", "expected"),
    [([0.5, 0.95, 0.8, 0.9, 1.0], 30), ([1.0] * 5, 0), ([0.5, 0.6, 0.7, 0.8, 1.0], 40), ([None] * 5, None)],
)
def test_settled_from_then_on(overlaps, expected) -> None:
    assert settled_step((0, 10, 20, 30, 40), overlaps) == expected


def course(*ranks: list[int]) -> list[dict]:
    """Return the course of a run whose sites have had these ranks, ten steps after each other."""
    entries = [
        RankEntry(step=10 * i, budget=sum(entry), ranks=dict(zip(NAMES, entry, strict=False)))
        for i, entry in enumerate(ranks)
    ]
    (allocation,) = allocations(planted.study_of([planted.record(ADALORA, 0, 0.8, changes={"rank_history": entries})]))
    return allocation.courses[0]


def test_churn_and_the_first_step_at_which_the_end_was_visible() -> None:
    keys = ("step", "moved", "churn", "overlap_with_final", "settled_step")
    rows = course([4, 4, 4], [2, 4, 2], [6, 1, 1], [6, 1, 1])
    assert [tuple(row[key] for key in keys) for row in rows] == [
        # Final shares 6/8 1/8 1/8 against thirds, and against 2/8 4/8 2/8; held afterwards: 8, 8, 8.
        (0, None, None, pytest.approx(1 / 3 + 2 / 8), 20),
        (10, 0, 0.0, 0.5, 20),
        (20, 4, 0.5, 1.0, 20),
        (30, 0, 0.0, 1.0, 20),
    ]
    nothing_left = course([1, 1, 1], [0, 0, 0])
    assert [(row["churn"], row["settled_step"]) for row in nothing_left] == [(None, None)] * 2
