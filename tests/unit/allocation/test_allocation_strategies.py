"""Ranks from scores: budget and bounds hold in every unit, and each strategy does what its name says."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_vit.allocation import Bounds, allocate
from peft_vit.errors import UserError

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
def problems(draw, costs=ONE, equal_bounds: bool = False, distinct: bool = False):
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


@given(problem=problems(costs=COSTS), strategy=st.sampled_from(STRATEGIES), settings=ANY_SETTINGS)
def test_bounds_and_budget_hold_and_what_is_left_buys_nothing(problem, strategy, settings) -> None:
    scores, budget, limits, costs, triplets = problem
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


@given(problem=problems(), strategy=st.sampled_from(STRATEGIES), settings=ANY_SETTINGS, price=st.integers(1, 10**9))
def test_in_ranks_the_budget_is_met_exactly_and_equal_costs_are_ranks(problem, strategy, settings, price) -> None:
    scores, budget, limits, ones, triplets = problem
    ranks = allocate(strategy, scores, budget, limits, triplet_scores=triplets, **settings)
    assert ranks.sum() == min(budget, limits.maximum.sum())
    for costs in (ones, ones * price):
        scaled = allocate(
            strategy, scores, budget * int(costs[0]), limits, costs=costs, triplet_scores=triplets, **settings
        )
        np.testing.assert_array_equal(scaled, ranks)


@given(problem=problems(equal_bounds=True), strategy=st.sampled_from(("proportional", "threshold", "top_k")))
def test_a_better_site_never_gets_less_and_ties_go_to_the_first(problem, strategy) -> None:
    scores, budget, limits, _, _ = problem
    ranks = allocate(strategy, scores, budget, limits)
    for i, better in enumerate(scores):
        for j, worse in enumerate(scores):
            if better > worse or (better == worse and i < j):
                assert ranks[i] >= ranks[j]


@given(problem=problems(costs=COSTS, distinct=True), strategy=st.sampled_from(STRATEGIES), data=st.data())
def test_permuted_sites_get_permuted_ranks(problem, strategy, data) -> None:
    scores, budget, limits, costs, triplets = problem
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


@given(problem=problems(costs=COSTS), strategy=st.sampled_from(STRATEGIES), exponent=st.integers(-40, 40))
def test_the_unit_of_the_scores_does_not_matter(problem, strategy, exponent) -> None:
    scores, budget, limits, costs, triplets = problem
    scores, triplets = np.round(scores % 1000), [np.round(values % 1000) for values in triplets]
    ranks = allocate(strategy, scores, budget, limits, costs=costs, triplet_scores=triplets)
    factor = 2.0**exponent  # exact
    scaled = [values * factor for values in triplets]
    again = allocate(strategy, scores * factor, budget, limits, costs=costs, triplet_scores=scaled)
    np.testing.assert_array_equal(again, ranks)


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


@given(problem=problems(costs=st.integers(1, 50)))
def test_proportional_within_bounds_is_water_filling(problem) -> None:
    scores, budget, limits, costs, _ = problem
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


def test_by_hand_in_parameters_of_vit_s() -> None:
    """Query and key 384 -> 384: 768 values a rank. fc1 384 -> 1536: 1920 values, 2.5 times as many."""
    costs = np.array([768, 768, 1920])  # query, key, fc1
    free = bounds([0] * 3, [384] * 3)
    # Equal scores, equal spending: 3 x 7,680 values are 10, 10 and 4 ranks.
    assert allocate("proportional", np.ones(3), 23040, free, costs=costs).tolist() == [10, 10, 4]
    # Spending 1 : 2 : 5 of 15,360: 1,920, 3,840 and 9,600 values are 2.5, 5 and 5 ranks; half a query fits no more.
    scores = np.array([1.0, 2.0, 5.0])
    assert allocate("proportional", scores, 15360, free, costs=costs).tolist() == [2, 5, 5]
    # 400 values more complete the third rank of query.
    assert allocate("proportional", scores, 15760, free, costs=costs).tolist() == [3, 5, 5]
    # Scores per 768 values are 1, 2 and 2 with a mean of 5 / 3: key and fc1 share 2 : 5 of 13,440.
    assert allocate("threshold", scores, 13440, free, costs=costs).tolist() == [0, 5, 5]
    # The best two per value get 7,680 each.
    assert allocate("top_k", scores, 15360, free, costs=costs, top_k=2).tolist() == [0, 10, 4]
    # The best one is fc1 by score (key's per value is equal): 3 ranks; 1,920 left buy 2 ranks of others, 1 : 2.
    assert allocate("top_k", scores, 7680, bounds([0] * 3, [384, 384, 3]), costs=costs, top_k=1).tolist() == [1, 1, 3]


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


def test_global_ranks_triplets_by_score_per_cost() -> None:
    triplets = [np.array([3.0, 1.0]), np.array([5.0, 4.0])]  # per 768 values: 3, 1 and 2, 1.6
    costs = np.array([768, 1920])
    scores = np.array([2.0, 4.5])
    free = bounds([0] * 2, [9] * 2)

    def ranks(budget: int) -> list[int]:
        return allocate("global", scores, budget, free, costs=costs, triplet_scores=triplets).tolist()

    assert ranks(767) == [0, 0]
    assert ranks(768) == [1, 0]
    assert ranks(768 + 1920) == [1, 1]
    assert ranks(768 + 2 * 1920) == [1, 2]
    assert ranks(768 + 1920 + 800) == [2, 1]  # the second of fc1 does not fit and is passed over
    assert ranks(768 + 1920 + 2 * 768) == [3, 1]  # beyond its triplets query grows by what nobody else can take


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bad_scores_and_budgets_are_refused(strategy, bad) -> None:
    limits = bounds([1, 1], [4, 4])
    triplets = [np.ones(2), np.ones(2)]
    with pytest.raises(UserError, match="importance scores must be finite and not negative"):
        allocate(strategy, np.array([1.0, bad]), 4, limits, triplet_scores=triplets)
    with pytest.raises(UserError, match="importance scores must be finite and not negative"):
        allocate("global", np.ones(2), 4, bounds([0, 0], [4, 4]), triplet_scores=[np.ones(2), np.array([1.0, bad])])
    with pytest.raises(UserError, match="1 lies below what the sites' minimum ranks cost, 2 together"):
        allocate(strategy, np.ones(2), 1, limits, triplet_scores=triplets)
    with pytest.raises(UserError, match="2687 lies below what the sites' minimum ranks cost, 2688 together"):
        allocate(strategy, np.ones(2), 2687, limits, costs=np.array([768, 1920]), triplet_scores=triplets)
    with pytest.raises(UserError, match="costs: a rank costs at least 1, got 0"):
        allocate(strategy, np.ones(2), 4, limits, costs=np.array([1, 0]), triplet_scores=triplets)
    with pytest.raises(UserError, match="global strategy ranks triplets"):
        allocate("global", np.ones(2), 4, limits)
