"""How much adaptive ranks moved, and how early the end was visible; planted."""

import numpy as np
import planted
import pytest

from peft_vit.core.records import RankEntry
from peft_vit.lab.analysis.layers import allocations, overlap, settled_step

ADALORA = planted.experiments()["adalora_proportional_magnitude"]
NAMES = [site.name for site in planted.sites()]


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
