"""Ranks from scores: budget and bounds hold in every unit, and each strategy does what its name says."""

from fractions import Fraction

import numpy as np
import pytest
from covering_pairs import covering_pairs
from hypothesis import given
from hypothesis import strategies as st

from peft_vit.base.errors import UserError
from peft_vit.core.allocation import Bounds, allocate

pytestmark = pytest.mark.part("controller")
STRATEGIES = ("proportional", "threshold", "top_k", "global")
SCORES = st.one_of(
    st.floats(0, 1e6), st.floats(0, allow_infinity=False), st.sampled_from([0.0, 1.0, 5e-324, 1e-30, 1e300])
)
ONE = st.just(1)
COSTS = st.one_of(st.sampled_from([768, 1920]), st.integers(1, 10), st.integers(1, 10**9))
ANY_SETTINGS = st.fixed_dictionaries({"threshold_tau": st.floats(0.1, 3), "top_k": st.integers(1, 15) | st.none()})


def bounds(minimum, maximum) -> Bounds:
    return Bounds(np.asarray(minimum, dtype=np.int64), np.asarray(maximum, dtype=np.int64))


@st.composite
def allocations(draw, costs=ONE, equal_bounds: bool = False, distinct: bool = False):
    """Draw (scores, budget, bounds, costs, triplet scores) with a budget that the minima allow."""
    sites = draw(st.integers(1, 12))
    scores = np.array(draw(st.lists(SCORES, min_size=sites, max_size=sites, unique=distinct)))
    minimum = draw(st.lists(st.integers(0, 3), min_size=sites, max_size=sites))
    extra = draw(st.lists(st.integers(0, 9), min_size=sites, max_size=sites))
    if equal_bounds:
        minimum, extra = minimum[:1] * sites, extra[:1] * sites
    maximum = [low + more for low, more in zip(minimum, extra, strict=True)]
    prices = np.array(draw(st.lists(costs, min_size=sites, max_size=sites)), dtype=np.int64)
    budget = draw(st.integers(int(prices @ minimum), int(prices @ maximum) + 5))
    present = [draw(st.integers(0, high)) for high in maximum]
    triplets = [np.array(draw(st.lists(SCORES, min_size=rank, max_size=rank))) for rank in present]
    return scores, budget, bounds(minimum, maximum), prices, triplets


@given(allocation=allocations(costs=COSTS), strategy=st.sampled_from(STRATEGIES), settings=ANY_SETTINGS)
def test_bounds_and_budget_hold_and_what_is_left_buys_nothing(allocation, strategy, settings) -> None:
    scores, budget, limits, costs, triplets = allocation
    settings = {**settings, "costs": costs, "triplet_scores": triplets}
    copies = [array.copy() for array in (scores, limits.minimum, limits.maximum, costs, *triplets)]
    ranks = allocate(strategy, scores, budget, limits, **settings)
    assert ranks.dtype == np.int64
    assert (limits.minimum <= ranks).all()
    assert (ranks <= limits.maximum).all()
    left = budget - int(costs @ ranks)
    assert left >= 0
    assert (costs[ranks < limits.maximum] > left).all()
    np.testing.assert_array_equal(ranks, allocate(strategy, scores, budget, limits, **settings))
    for now, before in zip((scores, limits.minimum, limits.maximum, costs, *triplets), copies, strict=True):
        np.testing.assert_array_equal(now, before)


@given(
    allocation=allocations(), strategy=st.sampled_from(STRATEGIES), settings=ANY_SETTINGS, price=st.integers(1, 10**9)
)
def test_equal_costs_are_ranks(allocation, strategy, settings, price) -> None:
    scores, budget, limits, ones, triplets = allocation
    settings = {**settings, "triplet_scores": triplets}
    ranks = allocate(strategy, scores, budget, limits, **settings)
    assert ranks.sum() == min(budget, limits.maximum.sum())
    scaled = allocate(strategy, scores, budget * price, limits, costs=ones * price, **settings)
    np.testing.assert_array_equal(scaled, ranks)


@given(allocation=allocations(equal_bounds=True), strategy=st.sampled_from(("proportional", "threshold", "top_k")))
def test_a_better_site_never_gets_less_and_ties_go_to_the_first(allocation, strategy) -> None:
    scores, budget, limits, _, _ = allocation
    ranks = allocate(strategy, scores, budget, limits)
    for i, better in enumerate(scores):
        for j, worse in enumerate(scores):
            if better > worse or (better == worse and i < j):
                assert ranks[i] >= ranks[j]


@given(allocation=allocations(costs=COSTS, distinct=True), strategy=st.sampled_from(STRATEGIES), data=st.data())
def test_permuted_sites_get_permuted_ranks(allocation, strategy, data) -> None:
    scores, budget, limits, costs, triplets = allocation
    order = data.draw(st.permutations(range(len(scores))))
    ranks = allocate(strategy, scores, budget, limits, costs=costs, triplet_scores=triplets)
    permuted = allocate(
        strategy,
        scores[order],
        budget,
        bounds(limits.minimum[order], limits.maximum[order]),
        costs=costs[order],
        triplet_scores=[triplets[site] for site in order],
    )
    np.testing.assert_array_equal(permuted, ranks[order])


@given(weights=st.lists(st.integers(0, 20), min_size=1, max_size=10).filter(any), budget=st.integers(0, 60))
def test_proportional_is_the_method_of_largest_remainders(weights, budget) -> None:
    total = sum(weights)
    quotas = [Fraction(budget * weight, total) for weight in weights]
    expected = [int(quota) for quota in quotas]
    order = sorted(range(len(weights)), key=lambda i: (-(quotas[i] - expected[i]), -weights[i], i))
    for i in order[: budget - sum(expected)]:
        expected[i] += 1
    ranks = allocate("proportional", np.array(weights, float), budget, bounds([0] * len(weights), [60] * len(weights)))
    assert ranks.tolist() == expected


@given(allocation=allocations(costs=st.integers(1, 50)))
def test_proportional_within_bounds_is_water_filling(allocation) -> None:
    scores, budget, limits, costs, _ = allocation
    scores = np.round(scores % 1e6) + 1.0  # every site has weight
    reached = min(budget, int(costs @ limits.maximum))
    low, high = 0.0, float(50 * limits.maximum.max() + 1)
    for _ in range(200):  # bisect the level at which spending clip(level * score) within the bounds meets the budget
        level = (low + high) / 2
        spent = np.clip(level * scores, costs * limits.minimum, costs * limits.maximum)
        low, high = (level, high) if spent.sum() < reached else (low, level)
    quotas = np.clip(high * scores / costs, limits.minimum, limits.maximum)
    ranks = allocate("proportional", scores, budget, limits, costs=costs)
    assert (ranks >= np.floor(quotas - 1e-6)).all()
    if len(set(costs)) == 1:  # else what is left of a dear rank may buy several cheap ones
        assert (ranks <= np.ceil(quotas + 1e-6)).all()


VIT_S = [768, 768, 1920]  # values a rank of query and key, 384 -> 384, and of fc1, 384 -> 1536: 2.5 times as many


@pytest.mark.parametrize(
    ("strategy", "scores", "budget", "settings", "expected"),
    [
        ("proportional", [8, 1, 4, 3], 16, {}, [8, 1, 4, 3]),
        ("threshold", [8, 1, 4, 3], 12, {}, [8, 0, 4, 0]),  # the mean is 4
        ("threshold", [8, 1, 4, 3], 12, {"threshold_tau": 1.5}, [12, 0, 0, 0]),
        ("threshold", [8, 1, 4, 3], 12, {"threshold_tau": 9.0}, [6, 1, 3, 2]),  # none reaches it
        ("top_k", [8, 1, 4, 3], 12, {}, [6, 0, 6, 0]),  # half of the sites
        ("top_k", [8, 1, 4, 3], 13, {"top_k": 3}, [5, 0, 4, 4]),
        ("top_k", [8, 1, 4, 3], 13, {"top_k": 1, "limits": ([1] * 4, [5] * 4)}, [5, 1, 4, 3]),  # what spills over
        # Equal scores, equal spending: 3 x 7,680 values are 10, 10 and 4 ranks.
        ("proportional", [1, 1, 1], 23040, {"costs": VIT_S}, [10, 10, 4]),
        # Spending 1 : 2 : 5 of 15,360: 1,920, 3,840 and 9,600 values are 2.5, 5 and 5 ranks; half a query fits no more.
        ("proportional", [1, 2, 5], 15360, {"costs": VIT_S}, [2, 5, 5]),
        ("proportional", [1, 2, 5], 15760, {"costs": VIT_S}, [3, 5, 5]),  # 400 more complete the third rank of query
        # Scores per 768 values are 1, 2 and 2 with a mean of 5 / 3: key and fc1 share 2 : 5 of 13,440.
        ("threshold", [1, 2, 5], 13440, {"costs": VIT_S}, [0, 5, 5]),
        ("top_k", [1, 2, 5], 15360, {"costs": VIT_S, "top_k": 2}, [0, 10, 4]),  # the best two per value: 7,680 each
        # The best one is fc1 by score (key's per value is equal): 3 ranks; 1,920 left buy 2 ranks of others, 1 : 2.
        ("top_k", [1, 2, 5], 7680, {"costs": VIT_S, "top_k": 1, "limits": ([0] * 3, [384, 384, 3])}, [1, 1, 3]),
    ],
)
def test_by_hand(strategy, scores, budget, settings, expected) -> None:
    limits = bounds(*settings.pop("limits", ([0] * len(scores), [384] * len(scores))))
    settings = {name: np.array(value) if name == "costs" else value for name, value in settings.items()}
    assert allocate(strategy, np.array(scores, float), budget, limits, **settings).tolist() == expected


@pytest.mark.parametrize(
    ("triplets", "costs", "budget", "limits", "expected"),
    [
        ([[9, 1, 7], [8, 2], [3]], [1, 1, 1], 3, ([0] * 3, [9] * 3), [2, 1, 0]),
        ([[9, 1, 7], [8, 2], [3]], [1, 1, 1], 5, ([0] * 3, [9] * 3), [2, 2, 1]),
        ([[9, 1, 7], [8, 2], [3]], [1, 1, 1], 3, ([0, 0, 1], [9] * 3), [1, 1, 1]),
        ([[9, 1, 7], [8, 2], [3]], [1, 1, 1], 3, ([0] * 3, [1] * 3), [1, 1, 1]),
        # Scores per 768 values are 3, 1 and 2, 1.6.
        ([[3, 1], [5, 4]], [768, 1920], 767, ([0] * 2, [9] * 2), [0, 0]),
        ([[3, 1], [5, 4]], [768, 1920], 768, ([0] * 2, [9] * 2), [1, 0]),
        ([[3, 1], [5, 4]], [768, 1920], 768 + 1920, ([0] * 2, [9] * 2), [1, 1]),
        ([[3, 1], [5, 4]], [768, 1920], 768 + 2 * 1920, ([0] * 2, [9] * 2), [1, 2]),
        ([[3, 1], [5, 4]], [768, 1920], 768 + 1920 + 800, ([0] * 2, [9] * 2), [2, 1]),  # fc1's second does not fit
        # Beyond its triplets query grows by what nobody else can take.
        ([[3, 1], [5, 4]], [768, 1920], 768 + 1920 + 2 * 768, ([0] * 2, [9] * 2), [3, 1]),
    ],
)
def test_global_ranks_triplets_by_score_per_cost(triplets, costs, budget, limits, expected) -> None:
    triplets = [np.array(values, float) for values in triplets]
    scores = np.array([values.mean() for values in triplets])
    ranks = allocate("global", scores, budget, bounds(*limits), costs=np.array(costs), triplet_scores=triplets)
    assert ranks.tolist() == expected


@pytest.mark.parametrize(("strategy", "bad"), covering_pairs(STRATEGIES, [np.nan, np.inf, -1.0]))
def test_bad_scores_are_refused(strategy, bad) -> None:
    with pytest.raises(UserError, match="importance scores must be finite and not negative"):
        allocate(strategy, np.array([1.0, bad]), 4, bounds([1, 1], [4, 4]), triplet_scores=[np.ones(2)] * 2)
