"""Triplets that have just grown stay for one interval and do not count yet; the budget comes first."""

import numpy as np
import pytest
import torch
from allocation_runs import backward, config, scored, start, train_step
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_vit.adapters import site_adapters
from peft_vit.allocation import Bounds
from peft_vit.allocation.protection import TripletAges, protected_minimum, shielded

pytestmark = pytest.mark.part("controller")


@st.composite
def problems(draw):
    """Draw (young, scores, budget, bounds, costs) with a budget that the minima allow."""
    count = draw(st.integers(1, 8))
    numbers = lambda low, high: np.array(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)))  # noqa: E731
    minimum, costs = numbers(0, 3), numbers(1, draw(st.sampled_from([1, 5])))
    bounds = Bounds(minimum, minimum + numbers(0, 6))
    budget = int(costs @ minimum) + draw(st.integers(0, 60))
    return numbers(0, 6), numbers(0, 4).astype(float), budget, bounds, costs


@settings(max_examples=300)
@given(problems())
def test_the_budget_comes_before_protection_and_the_worst_sites_give_way_first(problem) -> None:
    young, scores, budget, bounds, costs = problem
    wanted = np.clip(young, bounds.minimum, bounds.maximum)
    least = protected_minimum(*problem)
    assert costs @ least <= budget
    assert (bounds.minimum <= least).all()
    assert (least <= wanted).all()
    if costs @ wanted <= budget:
        assert (least == wanted).all()
    for site in np.flatnonzero(least < wanted):
        assert costs @ least + costs[site] > budget  # no more than it takes
        if (costs == 1).all():
            worse = [s for s in range(len(scores)) if scores[s] < scores[site]]
            assert all(least[s] == bounds.minimum[s] for s in worse)


def test_young_triplets_come_first_within_their_site() -> None:
    ages = TripletAges({"a": 5})
    scores = torch.tensor([0.3, 0.9, 0.1, 0.2, 0.5])
    assert ages.strongest_first("a", scores) is scores  # those of the start are never young
    ages.decisions, ages.births["a"] = 2, torch.tensor([0, 0, 1, 2, 2])
    order = torch.argsort(ages.strongest_first("a", scores), descending=True)
    assert order.tolist() == [4, 3, 1, 0, 2]
    assert ages.young("a").tolist() == [False, False, False, True, True]
    ages.follow({"a": torch.tensor([0, 2, 4])}, {"a": 5})
    assert ages.births["a"].tolist() == [0, 1, 2, 2, 2]


def test_only_the_protected_are_shielded() -> None:
    scores, young = np.array([5.0, 1.0, 3.0, 2.0]), np.array([False, True, True, True])
    assert shielded(scores, young, 0).tolist() == scores.tolist()
    assert shielded(scores, young, 2).tolist() == [5.0, 1.0, np.inf, np.inf]
    assert shielded(scores, young, 9).tolist() == [5.0, np.inf, np.inf, np.inf]


def one_block(tiny_vit, **given):
    model = tiny_vit(depth=1)
    controller, optimizer = start(
        model, config(**{"budget_schedule": "constant", "total_rank_budget": 12, "update_frequency": 1, **given}), 20
    )
    return model, controller, optimizer, controller.names


@pytest.mark.parametrize("strategy", ["proportional", "threshold", "top_k"])
def test_what_grew_stays_for_one_decision_and_may_then_go(tiny_vit, batch, strategy) -> None:
    model, controller, optimizer, names = one_block(tiny_vit, allocation_strategy=strategy)
    best = {name: 10.0 if name == names[3] else 0.1 for name in names}
    worst = {name: 0.0 if name == names[3] else 1.0 for name in names}
    assert set(controller.ranks.values()) == {2}
    first = train_step(model, controller, optimizer, batch, 2, best)
    grown = first[names[3]] - 2
    assert grown >= 2
    old = site_adapters(model)[names[3]].lora_A.detach()[2:].clone()
    second = train_step(model, controller, optimizer, batch, 3, worst)
    assert second[names[3]] == grown
    kept = site_adapters(model)[names[3]].lora_A.detach()
    larger = first[names[3]] / grown  # A takes the size that belongs to the smaller rank
    torch.testing.assert_close(kept, old * larger, rtol=0, atol=0.02)  # those that grew, one step later
    third = train_step(model, controller, optimizer, batch, 4, worst)
    assert third[names[3]] == 0
    assert all(entry["gave_way"] == {} for entry in controller.rank_history)


def test_global_ranking_keeps_what_grew(tiny_vit, batch, monkeypatch) -> None:
    model, controller, optimizer, names = one_block(
        tiny_vit, allocation_strategy="global", budget_schedule="cubic", initial_budget=12, total_rank_budget=7
    )
    scored(model, controller, batch, 1)
    zero = dict.fromkeys(names, 0)
    controller._ages.decisions = 1  # as if a decision had just been taken
    controller.apply_ranks(model, optimizer, zero | {names[0]: 6, names[1]: 2})
    optimizer.zero_grad()
    assert controller._ages.young_count(names[0]) == 4
    # In a budget of 7 the four young ones stay although they are the worst, and so do the two best old ones.
    scores = {name: torch.ones(rank) for name, rank in controller.ranks.items()}
    scores[names[0]] = torch.tensor([5.0, 6.0, 0.1, 0.1, 0.1, 0.1])
    monkeypatch.setattr(controller.tracker, "update", lambda adapters, scale: dict(scores))
    controller.bounds = Bounds(controller.bounds.minimum, np.full(6, 6))
    monkeypatch.setattr(type(controller.schedule), "budget_at", lambda schedule, step: 7)
    ranks = train_step(model, controller, optimizer, batch, 2, dict.fromkeys(names, 1.0))
    assert ranks == {**zero, names[0]: 6, names[1]: 1}


def test_the_young_do_not_count_in_their_sites_score(tiny_vit, batch) -> None:
    model, controller, optimizer, names = one_block(tiny_vit, warmup_steps=2, update_frequency=4)
    scores = {name: 10.0 if name == names[3] else 0.1 for name in names}
    ranks = train_step(model, controller, optimizer, batch, 2, scores)
    assert ranks[names[3]] > 2
    for step in (3, 4):
        scores = scored(model, controller, batch, step)
        optimizer.zero_grad()
        triplets = controller._triplet_scores[names[3]]
        assert scores[names[3]] == pytest.approx(triplets[:2].mean().item(), rel=1e-6)
        assert triplets[2:].mean() < triplets[:2].mean()
    for name in names:
        if ranks[name] and name != names[3]:
            assert scores[name] == pytest.approx(controller._triplet_scores[name].mean().item(), rel=1e-6)


def test_a_site_of_young_triplets_keeps_the_score_that_let_it_grow(tiny_vit, batch) -> None:
    model, controller, optimizer, names = one_block(tiny_vit, total_rank_budget=5, update_frequency=4)
    empty = next(name for name, rank in controller.ranks.items() if rank == 0)
    controller.attach(model, optimizer)
    scored(model, controller, batch, 1)
    optimizer.step()
    controller.apply_ranks(model, optimizer, controller.ranks)  # the next step is probed
    optimizer.zero_grad()
    before = scored(model, controller, batch, 2)[empty]
    assert controller.probe_history[0]["sites"] == [empty]
    ranks = controller.reallocate_ranks({name: float(name == empty) for name in names}, 2)
    controller.apply_ranks(model, optimizer, ranks)
    optimizer.zero_grad()
    assert ranks[empty] == 5
    for step in (3, 4, 5):
        backward(model, batch)
        assert controller.update_importance_scores(model, step)[empty] == before
        optimizer.zero_grad()
    after = scored(model, controller, batch, 6)
    controller.apply_ranks(model, optimizer, controller.reallocate_ranks(after, 6))
    optimizer.zero_grad()
    backward(model, batch)
    assert controller.update_importance_scores(model, 7)[empty] != before  # grown up


def test_a_falling_budget_comes_first_and_who_gave_way_is_recorded(tiny_vit, batch) -> None:
    model, controller, optimizer, names = one_block(
        tiny_vit, budget_schedule="cubic", total_rank_budget=4, initial_budget=18, warmup_steps=2, update_frequency=9
    )
    ups = {name: {names[0]: 8.0, names[5]: 6.0}.get(name, 0.01) for name in names}
    first = train_step(model, controller, optimizer, batch, 2, ups)
    grown = {name: first[name] - 3 for name in (names[0], names[5])}
    assert sum(grown.values()) > controller.schedule.budget_at(11)
    downs = {name: {names[0]: 0.5, names[5]: 0.2}.get(name, 1.0) for name in names}
    second = train_step(model, controller, optimizer, batch, 11, downs)
    entry = controller.rank_history[-1]
    assert entry["gave_way"] == {name: grown[name] - second[name] for name in grown if grown[name] > second[name]}
    assert names[5] in entry["gave_way"]  # of the lower score
    assert sum(second.values()) == entry["budget"]
    assert second[names[0]] >= second[names[5]]
