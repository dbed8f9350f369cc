"""The choice under a budget is the best one of all."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_vit.core.training.adaptive_bits import choose_bits

pytestmark = pytest.mark.part("quantization")
GROUP = st.integers(1, 4).flatmap(
    lambda count: st.tuples(
        st.lists(st.floats(-100, 100), min_size=count, max_size=count),
        st.lists(st.integers(0, 50), min_size=count, max_size=count),
    )
)
GROUPS = st.lists(GROUP, min_size=1, max_size=5)


@given(groups=GROUPS, share=st.floats(0, 1.1))
def test_no_combination_within_the_budget_is_better(groups, share) -> None:
    losses, sizes = zip(*groups, strict=True)
    least, most = (sum(pick(group) for group in sizes) for pick in (min, max))
    budget = least + int(share * (most - least))
    choice, best = choose_bits(losses, sizes, budget), by_dynamic_programming(losses, sizes, budget)
    assert choice.size == sum(group[place] for group, place in zip(sizes, choice.options, strict=True)) <= budget
    total = sum(group[place] for group, place in zip(losses, choice.options, strict=True))
    assert [choice.loss, total, choice.lower_bound] == pytest.approx([best] * 3, abs=1e-9)
    assert choice.lower_bound <= choice.loss
    assert choose_bits(losses, sizes, budget) == choice


def by_dynamic_programming(losses, sizes, budget: int) -> float:
    """Return the least total loss, from a table of the best loss for every size."""
    best = np.zeros(budget + 1)
    for group in zip(losses, sizes, strict=True):
        new = np.full(budget + 1, np.inf)
        for loss, size in zip(*group, strict=True):
            if size <= budget:
                new[size:] = np.minimum(new[size:], best[: budget + 1 - size] + loss)
        best = new
    return float(best[budget])


@pytest.mark.parametrize("seed", range(3))
def test_many_layers_and_ranks_against_dynamic_programming(seed) -> None:
    rng = np.random.default_rng(seed)
    losses = [list(rng.lognormal(0, 2) * np.array([1, 0.06, 3e-4])) for _ in range(24)]
    sizes = [[n, 2 * n, 4 * n] for n in rng.integers(10, 60, 24).tolist()]
    for cost in rng.integers(1, 9, 30).tolist():  # sites: each rank costs as much, and gains less than the one before
        gains = np.sqrt(np.cumsum(np.sort(rng.lognormal(0, 1, 12))[::-1] ** 2))
        losses.append([0.0, *(-0.1 * gains)])
        sizes.append([cost * rank for rank in range(13)])
    budget = sum(group[1] for group in sizes) + 300
    choice = choose_bits(losses, sizes, budget)
    assert choice.size <= budget
    assert choice.loss == pytest.approx(by_dynamic_programming(losses, sizes, budget), rel=1e-9)
    assert choice.lower_bound == pytest.approx(choice.loss, rel=1e-9)


def test_losses_far_apart_are_still_told_apart() -> None:
    losses, sizes = [[1e4, 0.0], [3e-6, 0.0], [2e-6, 0.0]], [[1, 2], [1, 2], [1, 2]]
    assert choose_bits(losses, sizes, 5).options == (1, 1, 0)
    for unit in (1e-15, 5e-324):
        losses = [[3 * unit, 0.0], [2 * unit, unit], [unit, 0.0]]
        assert choose_bits(losses, sizes, 4).options == (1, 0, 0)


def test_equals_go_to_the_smaller_and_then_to_the_earlier() -> None:
    assert choose_bits([[1.0, 1.0, 1.0]], [[7, 3, 3]], 10).options == (1,)
    same = [choose_bits([[1.0, 0.0]] * 6, [[1, 2]] * 6, 9).options for _ in range(3)]
    assert len(set(same)) == 1
    assert sum(same[0]) == 3


def test_a_search_that_stops_early_says_how_far_off_it_may_be() -> None:
    rng = np.random.default_rng(1)
    sizes = [[0, int(size)] for size in rng.integers(1000, 2000, 40)]
    losses = [[0.0, -size * rng.uniform(0.999, 1.001)] for _, size in sizes]
    budget = sum(size for _, size in sizes) // 2
    choice = choose_bits(losses, sizes, budget, node_limit=1)
    best = by_dynamic_programming(losses, sizes, budget)
    assert choice.size <= budget
    assert choice.lower_bound <= best + 1e-6 <= choice.loss + 2e-6
    assert math.isfinite(choice.lower_bound)


def test_what_has_no_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="smallest options take 6, the budget is 5"):
        choose_bits([[0.0, 1.0]] * 2, [[3, 4]] * 2, 5)
    with pytest.raises(ValueError, match="finite"):
        choose_bits([[0.0, math.nan]], [[3, 4]], 5)
