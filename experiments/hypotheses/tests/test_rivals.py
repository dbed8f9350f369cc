"""The test that something leads every one of several rivals: its error rates, and its p-values by hand."""

import numpy as np
import pytest

from experiments.hypotheses.rivals import wilcoxon_against_each
from peft_vit.base.statistics import wilcoxon

SIMULATIONS, SEEDS, RIVALS = 1000, 10, 5
ROOM = 3 * np.sqrt(0.05 * 0.95 / SIMULATIONS)


def rates(lead: np.ndarray, spread: np.ndarray) -> tuple[float, float]:
    """Return how often "leads every rival" and "some rival leads" pass 5 %."""
    rng = np.random.default_rng(0)
    passed = np.zeros(2)
    for _ in range(SIMULATIONS):
        own = rng.normal(size=SEEDS)
        differences = own + lead[:, None] - spread[:, None] * rng.normal(size=(RIVALS, SEEDS))
        passed += [test.p_value <= 0.05 for test in wilcoxon_against_each(list(differences))]
    ahead, behind = passed / SIMULATIONS
    return ahead, behind


@pytest.mark.parametrize(
    ("lead", "spread"),
    [
        ([0.0] * RIVALS, [1.0] * RIVALS),
        ([0.0, 0.5, 0.5, 0.5, 0.5], [3.0, 0.1, 0.1, 0.1, 0.1]),  # an equal one of large spread among weak ones
    ],
)
def test_equal_rivals_show_neither(lead, spread) -> None:
    assert max(rates(np.array(lead), np.array(spread))) <= 0.05 + ROOM


def test_what_is_true_is_shown() -> None:
    assert rates(np.full(RIVALS, 3.0), np.ones(RIVALS))[0] > 0.8
    assert rates(np.array([-3.0, 1, 1, 1, 1]), np.ones(RIVALS))[1] > 0.8


def test_by_hand() -> None:
    far, near = np.arange(1.0, 9.0), np.array([-1.0, 2, 3, 4, 5, 6, 7, 8])
    shown, opposite = wilcoxon_against_each([far, near])
    assert shown.p_value == wilcoxon(near).p_value == pytest.approx(4 / 256)
    assert (shown.direction, opposite.direction, opposite.p_value) == (1, 0, 1.0)
    shown, opposite = wilcoxon_against_each([far, -far, -near])
    assert (shown.p_value, opposite.p_value) == (1.0, pytest.approx(3 * 2 / 256))
    assert (shown.comparisons, opposite.comparisons) == (1, 3)
