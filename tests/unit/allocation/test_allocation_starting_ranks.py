"""Rules for starting ranks against float64 NumPy on gradients of a plain copy, and what every control keeps."""

import copy
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from peft_vit.base.errors import SilentNoEffectWarning, UserError
from peft_vit.core.adapters import attach_adapters
from peft_vit.core.allocation import CalibrationBatch, check_starting_ranks, choose_starting_ranks
from peft_vit.core.backbones import Site, find_sites
from peft_vit.core.config import StartingRanksConfig

pytestmark = pytest.mark.part("controller")
IMAGES = 18  # batches of 8, 8 and 2
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])  # of the classes


def weighted(logits, labels):
    return F.cross_entropy(logits, labels, weight=WEIGHTS.to(logits), reduction="sum") / len(labels)


@pytest.fixture
def case(tiny_vit):
    """Return a model with adapters of rank 0, its sites, a batch, and what NumPy needs: weights and gradients."""
    model = tiny_vit().eval()
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(IMAGES, 3, 32, 32, generator=generator)
    labels = torch.randint(5, (IMAGES,), generator=generator)
    sites = find_sites(model)
    double = copy.deepcopy(model).double()
    weights = {site.module: double.get_submodule(site.module).weight for site in sites}
    gradients = torch.autograd.grad(weighted(double(images.double()), labels), list(weights.values()))
    attach_adapters(model, sites, 0, scale=2.0, seed=0)
    return {
        "model": model,
        "sites": sites,
        "batch": CalibrationBatch(images, labels, weighted),
        "weights": {name: weight.detach().numpy() for name, weight in weights.items()},
        "gradients": {name: gradient.numpy() for name, gradient in zip(weights, gradients, strict=True)},
    }


def gradient(case, site):
    return np.linalg.svd(case["gradients"][site.module][site.span], compute_uv=False) ** 2


def stable_rank(case, site):
    values = np.linalg.svd(case["weights"][site.module][site.span], compute_uv=False)
    return np.array([np.sum(values**2) / values[0] ** 2])


SCORES = {"gradient": gradient, "stable_rank": stable_rank}


def best(scores, budget):
    """Take the best ranks of all sites one by one."""
    ranks = dict.fromkeys(scores, 0)
    for _, name in sorted(((score, name) for name, by_rank in scores.items() for score in by_rank), reverse=True)[
        :budget
    ]:
        ranks[name] += 1
    return ranks


def shared(scores, budget):
    """Share in proportion, by largest remainder."""
    total = sum(by_rank[0] for by_rank in scores.values())
    quotas = {name: budget * by_rank[0] / total for name, by_rank in scores.items()}
    ranks = {name: int(quota) for name, quota in quotas.items()}
    for name in sorted(quotas, key=lambda name: ranks[name] - quotas[name])[: budget - sum(ranks.values())]:
        ranks[name] += 1
    return ranks


@pytest.mark.parametrize("budget", [3, 9, 40])
@pytest.mark.parametrize("rule", SCORES)
def test_scores_and_ranks_are_those_of_numpy(case, rule, budget) -> None:
    ranks, scores = chosen_for(case, rule=rule, budget=budget)
    expected = {site.name: SCORES[rule](case, site) for site in case["sites"]}
    assert scores == pytest.approx({name: by_rank[0] for name, by_rank in expected.items()}, rel=1e-4)
    assert ranks == (shared if rule == "stable_rank" else best)(expected, budget)
    assert sum(ranks.values()) == budget
    assert all(rank < 64 for rank in ranks.values())


def test_under_values_a_gradients_score_is_divided_by_what_a_rank_costs(case) -> None:
    ranks, _ = chosen_for(case, rule="gradient", budget=1500, unit="parameters")
    costs = {site.name: site.in_features + site.out_features for site in case["sites"]}
    expected, left = dict.fromkeys(costs, 0), 1500
    values = [(score / costs[site.name], site.name) for site in case["sites"] for score in gradient(case, site)]
    for _, name in sorted(values, reverse=True):
        if costs[name] <= left:
            expected[name] += 1
            left -= costs[name]
    assert ranks == expected
    ranks, _ = choose(case["sites"], model=case["model"], rule="stable_rank", budget=40 * 144, unit="parameters")
    scores = {site.name: stable_rank(case, site)[0] for site in case["sites"]}
    level = 40 * 144 / sum(scores[name] * cost for name, cost in costs.items())
    assert all(abs(ranks[name] - level * scores[name]) <= 1 for name in costs)


def test_a_cap_holds_and_what_it_leaves_goes_to_others(case) -> None:
    ranks, _ = chosen_for(case, rule="gradient", budget=9, maximum_rank=1)
    firsts = {site.name: gradient(case, site)[0] for site in case["sites"]}
    assert sorted(ranks.values()) == [0] * 3 + [1] * 9
    assert {name for name, rank in ranks.items() if rank} == set(sorted(firsts, key=firsts.__getitem__)[3:])


def hooks_of(model):
    return [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]


def test_the_model_stays_as_it_was(case) -> None:
    model = case["model"].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained, hooks = [name for name, parameter in model.named_parameters() if parameter.requires_grad], hooks_of(model)
    for rule in SCORES:
        chosen_for(case, rule=rule, budget=5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert hooks_of(model) == hooks


def site_at(place: int, wide: bool = False, **changes) -> Site:
    block, kind = divmod(place, 3)
    sizes = (8, 24) if wide else (8, 8)
    made = Site(f"blocks.{block}.{kind}", f"m{place}", (0, sizes[1]), block, f"k{kind}", "mlp", *sizes, tokens=5)
    return replace(made, **changes)


def choose(sites, *, seed=0, model=None, batch=None, **settings):
    return choose_starting_ranks(
        model or torch.nn.Identity(), sites, StartingRanksConfig(**settings), seed=seed, batch=batch
    )


def chosen_for(case, **settings):
    return choose(case["sites"], model=case["model"], batch=case["batch"], **settings)


controls = st.fixed_dictionaries(
    {
        "rule": st.sampled_from(["even", "random", "first_blocks", "last_blocks"]),
        "unit": st.sampled_from(["ranks", "parameters"]),
    }
)


@given(controls, st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**31 - 1), st.data())
def test_controls_keep_the_budget_and_follow_the_seed(settings, blocks, each, seed, data) -> None:
    sites = [site_at(place, place % 3 == 2) for place in range(3 * blocks)]
    costs = [1 if settings["unit"] == "ranks" else site.in_features + site.out_features for site in sites]
    ordered = settings["rule"] != "even"
    most = sum(costs) * (each if ordered else 8)
    budget = data.draw(st.integers(min(costs) * (each if ordered else 1), most - 1))
    ranks_of = partial(choose, sites, **settings, budget=budget, **({"site_rank": each} if ordered else {}))
    by_site, scores = ranks_of(seed=seed)
    ranks = list(by_site.values())
    spent = sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))
    assert not scores
    assert ranks_of(seed=seed)[0] == by_site
    assert (ranks_of(seed=seed + 1)[0] == by_site) or settings["rule"] == "random"
    roomy = [cost for cost, rank in zip(costs, ranks, strict=True) if rank < (each if ordered else 8)]
    assert 0 <= budget - spent < min(roomy)
    if settings["unit"] == "ranks":
        assert spent == budget
        if ordered:
            assert (
                sorted(ranks) == sorted([each] * (budget // each) + [budget % each] + [0] * 3 * blocks)[-3 * blocks :]
            )
        else:
            assert max(ranks) - min(ranks) <= 1
            more = np.flatnonzero(np.array(ranks) > min(ranks))  # none where all are equal
            assert np.ptp(np.bincount(more // 3, minlength=blocks)) <= 1
            assert np.ptp(np.bincount(more % 3, minlength=3)) <= 1
        if settings["rule"] == "last_blocks":
            layers = [site.layer for site, rank in zip(sites, ranks, strict=True) if rank == 0]
            assert all(site.layer >= max(layers) for site, rank in zip(sites, ranks, strict=True) if rank and layers)


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


@pytest.mark.parametrize(
    ("rule", "fill", "said"),
    [
        ("gradient", torch.nan, "rule gradient gave scores that are not finite"),
        ("stable_rank", torch.nan, "rule stable_rank gave scores that are not finite"),
        ("gradient", 0.0, "rule gradient gave every module the score 0, so it can't"),
    ],
)
def test_scores_that_decide_nothing_are_refused(case, rule, fill, said) -> None:
    model, sites = case["model"], case["sites"]
    batch = case["batch"]._replace(loss=lambda logits, _: fill * logits.sum())
    if rule == "stable_rank":
        with torch.no_grad():
            model.get_submodule(sites[0].module).weight[0, 0] = fill
    with pytest.raises(UserError, match=rf"lora\.ranks\.rule: {said}"):
        choose(sites, model=model, batch=batch, rule=rule, budget=5)


def test_random_sites_are_new_ones_each_seed_and_each_as_likely() -> None:
    sites = [site_at(place) for place in range(12)]
    drawn = [choose(sites, rule="random", budget=3, seed=seed)[0] for seed in range(400)]
    assert len({tuple(ranks.items()) for ranks in drawn}) > 100  # of 220
    counts = [sum(ranks[site.name] for ranks in drawn) for site in sites]
    assert max(abs(count - 100) for count in counts) < 5 * np.sqrt(400 * 0.25 * 0.75)


@pytest.mark.parametrize(
    ("settings", "field", "said"),
    [
        ({"rule": "random", "budget": 12}, "budget", r"less than 12 ranks \(of all 12 modules site_rank 1 everywhere"),
        ({"rule": "gradient", "budget": 24, "maximum_rank": 2}, "budget", "maximum_rank 2 everywhere; raise maximum"),
        ({"rule": "even", "budget": 12 * 8}, "budget", "less than 96 ranks .of all 12 modules what they can hold"),
        ({"rule": "stable_rank", "budget": 15, "unit": "parameters"}, "budget", "at least 16 .one rank of the cheap"),
        ({"rule": "gradient", "budget": 5, "maximum_rank": 9}, "maximum_rank", "9 lies above the widest module's 8"),
        ({"rule": "stable_rank", "budget": 5, "maximum_rank": 6}, "maximum_rank", "no effect above the 5 ranks that"),
        ({"rule": "random", "budget": 3, "site_rank": 4}, "site_rank", "no effect above the 3 ranks that the"),
    ],
)
def test_what_decides_nothing_is_refused(settings, field, said) -> None:
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
