"""Rules for starting ranks: scores against float64 NumPy, and what an even spread keeps."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_vit.base.errors import SilentNoEffectWarning, UserError
from peft_vit.core.adapters import attach_adapters
from peft_vit.core.allocation import check_starting_ranks, choose_starting_ranks
from peft_vit.core.backbones import Site, find_sites
from peft_vit.core.config import FORMER_RULES, StartingRanksConfig

pytestmark = pytest.mark.part("controller")


@pytest.fixture
def case(tiny_vit):
    """Return a model with adapters of rank 0, its sites, and their weights for NumPy."""
    model = tiny_vit().eval()
    sites = find_sites(model)
    weights = {site.module: model.get_submodule(site.module).weight.detach().double().numpy() for site in sites}
    weights = {site.name: weights[site.module][site.span] for site in sites}
    attach_adapters(model, sites, 0, scale=2.0, seed=0)
    return {"model": model, "sites": sites, "weights": weights}


def stable_rank(weight):
    values = np.linalg.svd(weight, compute_uv=False)
    return np.sum(values**2) / values[0] ** 2


def shared(scores, budget):
    """Share in proportion, by largest remainder."""
    quotas = {name: budget * score / sum(scores.values()) for name, score in scores.items()}
    ranks = {name: int(quota) for name, quota in quotas.items()}
    for name in sorted(quotas, key=lambda name: ranks[name] - quotas[name])[: budget - sum(ranks.values())]:
        ranks[name] += 1
    return ranks


@pytest.mark.parametrize("budget", [3, 9, 40])
def test_scores_and_ranks_are_those_of_numpy(case, budget) -> None:
    ranks, scores = chosen_for(case, budget=budget)
    expected = {name: stable_rank(weight) for name, weight in case["weights"].items()}
    assert scores == pytest.approx(expected, rel=1e-4)
    assert ranks == shared(expected, budget)
    assert sum(ranks.values()) == budget


def test_under_values_ranks_stay_in_proportion_to_scores(case) -> None:
    costs = {site.name: site.in_features + site.out_features for site in case["sites"]}
    ranks, _ = chosen_for(case, budget=40 * 144, unit="parameters")
    scores = {name: stable_rank(weight) for name, weight in case["weights"].items()}
    level = 40 * 144 / sum(scores[name] * cost for name, cost in costs.items())
    assert all(abs(ranks[name] - level * scores[name]) <= 1 for name in costs)


def test_a_cap_holds_and_what_it_leaves_goes_to_others(case) -> None:
    first = case["sites"][0]
    with torch.no_grad():
        for site in case["sites"]:
            case["model"].get_submodule(site.module).weight[site.span].fill_(1.0)  # of stable rank 1
        torch.nn.init.eye_(case["model"].get_submodule(first.module).weight[first.span])  # of its width
    assert chosen_for(case, budget=9)[0][first.name] >= 7
    capped, _ = chosen_for(case, budget=9, maximum_rank=2)
    assert (capped[first.name], sum(capped.values())) == (2, 9)


def test_the_model_stays_as_it_was(case) -> None:
    model = case["model"].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    chosen_for(case, budget=5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert all(module.training for module in model.modules())


def site_at(place: int, wide: bool = False, **changes) -> Site:
    block, kind = divmod(place, 3)
    sizes = (8, 24) if wide else (8, 8)
    made = Site(f"blocks.{block}.{kind}", f"m{place}", (0, sizes[1]), block, f"k{kind}", "mlp", *sizes, tokens=5)
    return replace(made, **changes)


def choose(sites, *, model=None, **settings):
    return choose_starting_ranks(model or torch.nn.Identity(), sites, StartingRanksConfig(**settings))


def chosen_for(case, **settings):
    return choose(case["sites"], model=case["model"], rule="stable_rank", **settings)


@given(st.sampled_from(["ranks", "parameters"]), st.integers(1, 12), st.data())
def test_even_ranks_keep_the_budget(unit, blocks, data) -> None:
    sites = [site_at(place, place % 3 == 2) for place in range(3 * blocks)]
    costs = [1 if unit == "ranks" else site.in_features + site.out_features for site in sites]
    budget = data.draw(st.integers(min(costs), 8 * sum(costs) - 1))
    by_site, scores = choose(sites, rule="even", unit=unit, budget=budget)
    ranks = list(by_site.values())
    spent = sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))
    assert not scores
    assert 0 <= budget - spent < min(cost for cost, rank in zip(costs, ranks, strict=True) if rank < 8)
    if unit == "ranks":
        assert spent == budget
        assert max(ranks) - min(ranks) <= 1
        more = np.flatnonzero(np.array(ranks) > min(ranks))  # none where all are equal
        assert np.ptp(np.bincount(more // 3, minlength=blocks)) <= 1
        assert np.ptp(np.bincount(more % 3, minlength=3)) <= 1


@pytest.mark.parametrize(("kinds", "blocks"), [(6, 12), (2, 12), (1, 12), (6, 6), (6, 24), (4, 24)])
def test_even_ranks_reach_as_many_kinds_and_blocks_as_they_can(kinds: int, blocks: int) -> None:
    places = range(kinds * blocks)
    sites = [site_at(place, layer=place // kinds, kind=f"k{place % kinds}", name=str(place)) for place in places]
    for budget in range(1, len(sites), 1 + len(sites) // 16):
        ranks, _ = choose(sites, rule="even", budget=budget)
        chosen = [site for site in sites if ranks[site.name]]
        assert len(chosen) == sum(ranks.values()) == budget
        for what, all_of_them in (("kind", kinds), ("layer", blocks)):
            counts = Counter(getattr(site, what) for site in chosen)
            assert len(counts) == min(budget, all_of_them)
            assert max(counts.values()) == -(-budget // all_of_them)
        depths = sorted(site.layer for site in chosen)
        if 2 < budget < blocks:
            assert np.ptp(np.diff(depths)) <= 1


def test_even_ranks_where_kinds_are_not_in_every_block() -> None:
    kinds = enumerate(("a", "b", "a", "a", "c", "a"))
    sites = [site_at(place, layer=(0, 0, 1, 2, 2, 3)[place], kind=kind, name=str(place)) for place, kind in kinds]
    ranks, _ = choose(sites, rule="even", budget=5)
    assert sum(ranks.values()) == 5
    assert ranks["1"] == ranks["4"] == 1  # b and c, which have one site each


def test_scores_that_are_not_finite_are_refused(case) -> None:
    with torch.no_grad():
        case["model"].get_submodule(case["sites"][0].module).weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite") as refused:
        chosen_for(case, budget=5)
    assert refused.value.field == "lora.ranks.rule"


@pytest.mark.parametrize(
    ("settings", "field", "said"),
    [
        ({"rule": "even", "budget": 12 * 8}, "budget", "less than 96 ranks .of all 12 modules what they can hold"),
        ({"rule": "stable_rank", "budget": 24, "maximum_rank": 2}, "budget", "maximum_rank 2 everywhere; raise it"),
        ({"rule": "stable_rank", "budget": 15, "unit": "parameters"}, "budget", "at least 16 .one rank of the cheap"),
        ({"rule": "stable_rank", "budget": 5, "maximum_rank": 9}, "maximum_rank", "above the widest module's 8"),
        ({"rule": "stable_rank", "budget": 5, "maximum_rank": 6}, "maximum_rank", "no effect above the 5 ranks that"),
        *(({"rule": rule, "budget": 5}, "rule", "use stable_rank or even") for rule in FORMER_RULES),
    ],
)
def test_what_decides_nothing_and_what_went_is_refused(settings, field, said) -> None:
    sites = [site_at(place, place % 3 == 2) for place in range(12)]
    with pytest.raises(UserError, match=said) as refused:
        check_starting_ranks(StartingRanksConfig(**settings), sites)
    assert refused.value.field == f"lora.ranks.{field}"


def test_a_rule_that_tells_no_site_from_another_says_so(tiny_vit) -> None:
    model = tiny_vit()
    sites = find_sites(model, ("out",))
    for site in sites:
        torch.nn.init.eye_(model.get_submodule(site.module).weight)
    attach_adapters(model, sites, 0, scale=1.0, seed=0)
    with pytest.warns(SilentNoEffectWarning, match="gave every module the same score"):
        choose(sites, model=model, rule="stable_rank", budget=3)
