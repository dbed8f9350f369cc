"""Ranks from scores: the budget is met exactly, bounds hold, and each strategy does what its name says."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_vit.allocation import Bounds, allocate
from peft_vit.errors import UserError

pytestmark = pytest.mark.part("controller")
STRATEGIES = ("proportional", "threshold", "top_k", "global")


def bounds(minimum, maximum) -> Bounds:
    return Bounds(np.asarray(minimum, dtype=np.int64), np.asarray(maximum, dtype=np.int64))


@st.composite
def problems(draw, equal_bounds: bool = False):
    """Draw (scores, budget, bounds, triplet scores) with a budget that the minima allow."""
    sites = draw(st.integers(1, 12))
    score = st.one_of(st.floats(0, 1e6), st.sampled_from([0.0, 1.0, 1e-300, 1e-30]))
    scores = np.array(draw(st.lists(score, min_size=sites, max_size=sites)))
    minimum = draw(st.lists(st.integers(0, 3), min_size=sites, max_size=sites))
    extra = draw(st.lists(st.integers(0, 9), min_size=sites, max_size=sites))
    if equal_bounds:
        minimum, extra = minimum[:1] * sites, extra[:1] * sites
    maximum = [low + more for low, more in zip(minimum, extra, strict=True)]
    budget = draw(st.integers(sum(minimum), sum(maximum) + 5))
    present = [draw(st.integers(0, high)) for high in maximum]
    triplets = [np.array(draw(st.lists(score, min_size=rank, max_size=rank))) for rank in present]
    return scores, budget, bounds(minimum, maximum), triplets


@given(problem=problems(), strategy=st.sampled_from(STRATEGIES), tau=st.floats(0.1, 3), k=st.integers(1, 15))
def test_the_budget_is_met_exactly_within_the_bounds_by_a_pure_function(problem, strategy, tau, k) -> None:
    scores, budget, limits, triplets = problem
    copies = scores.copy(), limits.minimum.copy(), limits.maximum.copy(), [t.copy() for t in triplets]
    settings = {"threshold_tau": tau, "top_k": k, "triplet_scores": triplets}
    ranks = allocate(strategy, scores, budget, limits, **settings)
    assert ranks.dtype == np.int64
    assert ranks.sum() == min(budget, limits.maximum.sum())
    assert (limits.minimum <= ranks).all()
    assert (ranks <= limits.maximum).all()
    np.testing.assert_array_equal(ranks, allocate(strategy, scores, budget, limits, **settings))
    for now, before in zip((scores, limits.minimum, limits.maximum, *triplets), (*copies[:3], *copies[3]), strict=True):
        np.testing.assert_array_equal(now, before)


@given(problem=problems(equal_bounds=True), strategy=st.sampled_from(("proportional", "threshold", "top_k")))
def test_a_better_site_never_gets_less_and_ties_go_to_the_first(problem, strategy) -> None:
    scores, budget, limits, _ = problem
    ranks = allocate(strategy, scores, budget, limits)
    for i, better in enumerate(scores):
        for j, worse in enumerate(scores):
            if better > worse or (better == worse and i < j):
                assert ranks[i] >= ranks[j]


@given(
    weights=st.lists(st.integers(0, 20), min_size=1, max_size=10).filter(any),
    budget=st.integers(0, 60),
)
def test_proportional_is_the_method_of_largest_remainders(weights, budget) -> None:
    total = sum(weights)
    quotas = [Fraction(budget * weight, total) for weight in weights]
    expected = [int(quota) for quota in quotas]
    order = sorted(range(len(weights)), key=lambda i: (-(quotas[i] - expected[i]), -weights[i], i))
    for i in order[: budget - sum(expected)]:
        expected[i] += 1
    ranks = allocate("proportional", np.array(weights, float), budget, bounds([0] * len(weights), [60] * len(weights)))
    assert ranks.tolist() == expected


@given(problem=problems())
def test_proportional_within_bounds_is_water_filling(problem) -> None:
    scores, budget, limits, _ = problem
    scores = np.round(scores) + 1.0  # every site has weight
    budget = min(budget, int(limits.maximum.sum()))
    low, high = 0.0, float(limits.maximum.max() + 1)
    for _ in range(200):  # bisect the level at which clip(level * score) meets the budget
        level = (low + high) / 2
        filled = np.clip(level * scores, limits.minimum, limits.maximum).sum()
        low, high = (level, high) if filled < budget else (low, level)
    quotas = np.clip(high * scores, limits.minimum, limits.maximum)
    ranks = allocate("proportional", scores, budget, limits)
    assert (np.abs(ranks - quotas) < 1 + 1e-6).all()


def test_by_hand() -> None:
    scores = np.array([8.0, 1.0, 4.0, 3.0])
    free = bounds([0] * 4, [99] * 4)
    assert allocate("proportional", scores, 16, free).tolist() == [8, 1, 4, 3]
    assert allocate("threshold", scores, 12, free).tolist() == [8, 0, 4, 0]  # the mean is 4
    assert allocate("threshold", scores, 12, free, threshold_tau=1.5).tolist() == [12, 0, 0, 0]
    assert allocate("threshold", scores, 12, free, threshold_tau=9.0).tolist() == [6, 1, 3, 2]  # none reaches it
    assert allocate("top_k", scores, 12, free).tolist() == [6, 0, 6, 0]  # half of the sites
    assert allocate("top_k", scores, 13, free, top_k=3).tolist() == [5, 0, 4, 4]
    assert allocate("top_k", scores, 13, bounds([1] * 4, [5] * 4), top_k=1).tolist() == [5, 1, 4, 3]  # what spills over


def test_global_ranks_all_triplets() -> None:
    triplets = [np.array([9.0, 1.0, 7.0]), np.array([8.0, 2.0]), np.array([3.0])]
    scores = np.array([t.mean() for t in triplets])
    free = bounds([0] * 3, [9] * 3)
    assert allocate("global", scores, 3, free, triplet_scores=triplets).tolist() == [2, 1, 0]
    assert allocate("global", scores, 5, free, triplet_scores=triplets).tolist() == [2, 2, 1]
    assert allocate("global", scores, 3, bounds([0, 0, 1], [9] * 3), triplet_scores=triplets).tolist() == [1, 1, 1]
    assert allocate("global", scores, 3, bounds([0] * 3, [1] * 3), triplet_scores=triplets).tolist() == [1, 1, 1]
    grown = allocate("global", scores, 9, free, triplet_scores=triplets)
    assert grown.sum() == 9
    assert (grown >= [3, 2, 1]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bad_scores_and_budgets_are_refused(strategy, bad) -> None:
    limits = bounds([1, 1], [4, 4])
    triplets = [np.ones(2), np.ones(2)]
    with pytest.raises(UserError, match="importance scores must be finite and not negative"):
        allocate(strategy, np.array([1.0, bad]), 4, limits, triplet_scores=triplets)
    with pytest.raises(UserError, match="1 lies below what the sites' minimum ranks cost, 2 together"):
        allocate(strategy, np.ones(2), 1, limits, triplet_scores=triplets)
    with pytest.raises(UserError, match="global strategy ranks triplets"):
        allocate("global", np.ones(2), 4, limits)
