"""The budget's course is the cubic formula, it holds for what is there, and what cannot be met is refused."""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import allocation_runs
import numpy as np
import pytest
import torch
from allocation_runs import STEPS, start, train_step
from covering_pairs import covering_pairs
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_model
from torch.utils.flop_counter import FlopCounterMode

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import adapted_modules, current_ranks, site_adapters
from peft_vit.core.allocation import Bounds, BudgetSchedule, bounds_for, costs_for, largest_ranks, schedule_for
from peft_vit.core.backbones import Site, find_sites
from peft_vit.core.config import AdaLoraConfig

pytestmark = pytest.mark.part("controller")


config = partial(
    AdaLoraConfig,
    total_rank_budget=8,
    allocation_strategy="proportional",
    importance_metric="magnitude",
    update_frequency=6,
    warmup_steps=12,
)


def schedule_of(sites: int = 4, largest: int = 1000, **settings) -> BudgetSchedule:
    """Return the schedule in ranks over 48 steps, of sites that can hold as many ranks together."""
    maximum = np.zeros(sites, np.int64)
    maximum[0] = largest
    return schedule_for(config(**settings), 48, Bounds(np.zeros_like(maximum), maximum), np.ones(sites, np.int64))


def test_the_quickstarts_steps_of_decision() -> None:
    schedule = schedule_of(final_steps=12)
    assert [step for step in range(49) if schedule.last_due(step) == step > 0] == [12, 18, 24, 30, 36]
    assert schedule == schedule_of()  # a quarter is the default


@given(
    total=st.integers(1, 100),
    more=st.integers(0, 200),
    warmup=st.integers(1, 20),
    middle=st.integers(0, 60),
    final=st.integers(0, 20),
    every=st.integers(1, 15),
)
def test_cubic_course(total, more, warmup, middle, final, every) -> None:
    schedule = BudgetSchedule(total + more, total, warmup, every, final, warmup + middle + final)
    budgets = [schedule.budget_at(step) for step in range(schedule.total_steps + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert set(budgets[:warmup]) == {total + more}
    assert budgets[-1] == total == budgets[warmup + middle]
    latest = total + more
    for step in range(warmup, warmup + middle):
        if (step - warmup) % every == 0:
            latest = math.floor(total + more * (1 - Fraction(step - warmup, middle)) ** 3)
        assert budgets[step] == latest
    due = [step for step in range(schedule.total_steps + 1) if schedule.last_due(step) == step > 0]
    assert due[0] == warmup if middle else due == [warmup]
    assert due[-1] == warmup + middle
    assert set(due) - {warmup + middle} == set(range(warmup, warmup + middle, every))


def test_the_initial_budget() -> None:
    assert schedule_of().initial == 12  # 1.5 times the total
    assert schedule_of(sites=72).initial == 72  # one a site
    assert schedule_of(sites=72, largest=10).initial == 10  # what the sites can hold
    assert schedule_of(initial_budget=1000).initial == 1000
    constant = schedule_of(sites=72, budget_schedule="constant")
    assert {constant.budget_at(step) for step in range(49)} == {8}
    assert schedule_of(final_steps=36).last_update == 12
    for settings, words in (
        ({"initial_budget": 1001}, r"initial_budget: 1001 ranks are more than the 1000 that the modules"),
        ({"final_steps": 37}, r"warmup_steps: warmup_steps 12 plus final_steps 37 leave no step"),
    ):
        with pytest.raises(UserError, match=rf"adalora\.{words}"):
            schedule_of(**settings)


SHAPES = {"query": (384, 384), "out": (384, 384), "fc1": (384, 1536), "fc2": (1536, 384)}  # (in, out) of ViT-S


def sites_of(tokens: Sequence[int]) -> list[Site]:
    return [
        Site(kind, kind, (0, outputs), 0, kind, "mlp", inputs, outputs, count)
        for (kind, (inputs, outputs)), count in zip(SHAPES.items(), tokens, strict=True)
    ]


SITES = sites_of([37] * 4)
PARAMETERS = {"total_rank_budget": None, "total_parameter_budget": 9000}


@pytest.mark.parametrize(
    ("settings", "costs"),
    [
        ({"total_rank_budget": 8}, [1, 1, 1, 1]),
        (PARAMETERS, [768, 768, 1920, 1920]),
        ({**PARAMETERS, "parametrization": "svd"}, [769, 769, 1921, 1921]),
        ({"total_byte_budget": 36000}, [3072, 3072, 7680, 7680]),
        ({"total_mac_budget": 400_000}, [28416, 28416, 71040, 71040]),  # 37 tokens: 84 px, patches of 14, one class
    ],
)
def test_what_a_rank_costs(settings, costs) -> None:
    assert costs_for(config(**{"total_rank_budget": None, **settings}), SITES).tolist() == costs


def test_costs_of_other_tokens_and_of_grouped_inputs() -> None:
    macs = config(total_rank_budget=None, total_mac_budget=400_000)
    assert costs_for(macs, sites_of([49, 49, 196, 1])).tolist() == [49 * 768, 49 * 768, 196 * 1920, 1920]
    assert costs_for(config(**PARAMETERS), SITES[:1], 32).tolist() == [396]


@pytest.mark.parametrize(
    ("settings", "initial"),
    [({"minimum_rank": 1}, 13500), ({"total_parameter_budget": 800}, 5376), ({"maximum_rank": 2}, 2 * 5376)],
)
def test_the_initial_budget_in_parameters(settings, initial) -> None:
    settings = config(**{**PARAMETERS, **settings})
    costs = costs_for(settings, SITES)  # of a rank everywhere: 5,376
    assert schedule_for(settings, 48, bounds_for(settings, largest_ranks(SITES), costs), costs).initial == initial


@pytest.mark.parametrize(
    ("settings", "field", "word"),
    [
        ({"total_rank_budget": 3, "minimum_rank": 1}, "total_rank_budget", "expected 4 .minimum ranks of 4 modules"),
        ({"total_rank_budget": 4 * 384 + 1}, "total_rank_budget", "expected 1 .* to 1536 ranks .*, got 1537"),
        ({"total_rank_budget": 9, "maximum_rank": 2}, "total_rank_budget", "to 8 ranks"),
        ({"maximum_rank": 385}, "maximum_rank", "above the widest module's 384"),
        ({"minimum_rank": 385}, "minimum_rank", "above a module's largest rank 384"),
        ({**PARAMETERS, "total_parameter_budget": 767}, "total_parameter_budget", "expected 768 .* to 2064384 param"),
        ({**PARAMETERS, "total_parameter_budget": 5375, "minimum_rank": 1}, "total_parameter_budget", "expected 5376"),
        ({**PARAMETERS, "total_parameter_budget": 10753, "maximum_rank": 2}, "total_parameter_budget", "to 10752"),
        ({"total_rank_budget": None, "total_byte_budget": 3071}, "total_byte_budget", "expected 3072 .* bytes"),
        ({"total_rank_budget": None, "total_mac_budget": 28415}, "total_mac_budget", "expected 28416 .* macs"),
        ({"minimum_rank": 2}, "minimum_rank", "take the 8 ranks of total_rank"),
        ({**PARAMETERS, "total_parameter_budget": 6143, "minimum_rank": 1}, "minimum_rank", "nothing is left"),
        ({"allocation_strategy": "top_k", "top_k": 4}, "top_k", "is every module"),
        ({"allocation_strategy": "top_k", "top_k": 5}, "top_k", "exceeds the 4 modules"),
        ({"allocation_strategy": "threshold", "threshold_tau": 4.5}, "threshold_tau", "the mean of 4 modules"),
    ],
)
def test_what_the_sites_cannot_meet_or_leaves_nothing_to_decide_is_refused(settings, field, word) -> None:
    settings = config(**settings)
    with pytest.raises(UserError, match=word) as refused:
        bounds_for(settings, largest_ranks(SITES), costs_for(settings, SITES))
    assert refused.value.field == f"adalora.{field}"


@pytest.mark.parametrize(
    "settings",
    [
        {"minimum_rank": 1},
        {"total_rank_budget": None, "total_parameter_budget": 5376 + 768, "minimum_rank": 1},
        {"allocation_strategy": "top_k", "top_k": 3},
        {"allocation_strategy": "threshold", "threshold_tau": 4.0},
    ],
)
def test_the_least_that_is_left_to_decide(settings) -> None:
    settings = config(**settings)
    assert len(bounds_for(settings, largest_ranks(SITES), costs_for(settings, SITES)).minimum) == 4


STRATEGIES = ("proportional", "threshold", "top_k", "global")
METRICS = ("magnitude", "gradient_norm", "fisher", "sensitivity", "random", "uniform")
BUDGETS = {
    "ranks": ("total_rank_budget", 15),
    "parameters": ("total_parameter_budget", 2000),
    "bytes": ("total_byte_budget", 8000),
    "macs": ("total_mac_budget", 34000),
}


def counted(model, images, unit: str) -> int:
    """Count on the live model, without the formula."""
    adapters = site_adapters(model)
    if unit == "ranks":
        return sum(adapter.rank for adapter in adapters.values())
    if unit == "parameters":
        return sum(parameter.numel() for adapter in adapters.values() for parameter in adapter.parameters())
    if unit == "bytes":
        return sum(parameter.nbytes for adapter in adapters.values() for parameter in adapter.parameters())
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, given, __, name=name: inputs.update({name: given[0]}))
        for name, module in adapted_modules(model)
    ]
    model(images[:1])
    total = 0
    for site, adapter in adapters.items():
        module = next(
            name for name in inputs if site in {held.name for held, _ in model.get_submodule(name).adapters()}
        )
        with FlopCounterMode(display=False) as flops:
            inner = inputs[module] @ adapter.lora_A.T
            inner @ adapter.lora_B.T
        scaling = 0 if adapter.lora_lambda is None else inner.numel()
        total += flops.get_total_flops() // 2 + scaling
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.filterwarnings("ignore::peft_vit.base.errors.SilentNoEffectWarning")
@pytest.mark.parametrize(
    ("strategy", "metric", "unit", "parametrization"),
    [
        case
        for case in covering_pairs(STRATEGIES, METRICS, [*BUDGETS], ["product", "svd"])
        if case[:2] != ("global", "uniform")  # is refused
    ],
)
def test_the_budget_holds_for_what_is_there(tiny_vit, batch, strategy, metric, unit, parametrization) -> None:
    model, (field, total) = tiny_vit(depth=1), BUDGETS[unit]
    settings = allocation_runs.config(
        allocation_strategy=strategy,
        importance_metric=metric,
        budget_schedule="cubic" if strategy == "global" or metric in METRICS[::2] else "constant",
        minimum_rank=1,
        maximum_rank=9,
        parametrization=parametrization,
        **{"total_rank_budget": None, field: total},
    )
    controller, optimizer = start(model, settings)
    for step in range(STEPS + 1):
        ranks = train_step(model, controller, optimizer, batch, step) if step else controller.ranks
        assert ranks == controller.ranks == current_ranks(model)
        assert all(1 <= rank <= 9 for rank in ranks.values())
        entry, present = controller.rank_history[-1], counted(model, batch[0], unit)
        assert (entry["unit"], entry["cost"], entry["ranks"]) == (unit, present, ranks)
        left = controller.schedule.budget_at(step) - present
        assert left >= 0
        if step and controller.schedule.last_due(step) == step:
            assert all(cost > left for cost, rank in zip(controller.costs, ranks.values(), strict=True) if rank < 9)
    assert entry["budget"] == total
    assert [entry["step"] for entry in controller.rank_history] == [0, 2, 4, 6, 7]


@pytest.mark.parametrize("name", ["tiny_swin", "tiny_hiera", "tiny_pool"])
def test_multiply_adds_are_those_of_each_stages_tokens(name: str, batch) -> None:
    model = random_model(name)
    controller, optimizer = start(model, allocation_runs.config(total_rank_budget=None, total_mac_budget=150_000))
    for step in range(STEPS + 1):
        if step:
            train_step(model, controller, optimizer, batch, step)
        entry = controller.rank_history[-1]
        assert entry["cost"] == counted(model, batch[0], "macs") <= controller.schedule.budget_at(step)
    assert 150_000 - min(controller.costs) < entry["cost"]
    each = {site.tokens for site in find_sites(model)}
    assert len(each) > 1


def test_it_starts_with_equal_ranks(tiny_vit) -> None:
    settings = allocation_runs.config(
        total_rank_budget=None, total_parameter_budget=2 * 960 + 128, budget_schedule="constant"
    )
    controller, _ = start(tiny_vit(depth=1), settings)
    # 128 values a rank of query, key, value, out (64 -> 64), 192 of fc1 and fc2 (64 -> 128): 896 for one rank each.
    assert sorted(controller.ranks.values()) == [2, 2, 2, 2, 2, 3]
    one_each = allocation_runs.config(total_rank_budget=None, total_parameter_budget=600)
    assert set(start(tiny_vit(depth=1), one_each)[0].ranks.values()) == {1}
