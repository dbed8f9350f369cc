"""Budgets in parameters, bytes and multiply-accumulates hold for the tensors and products that are really there."""

import pytest
import torch
from allocation_runs import STEPS, config, start, train_step
from covering_pairs import covering_pairs
from tiny_models import random_model
from torch.utils.flop_counter import FlopCounterMode

from peft_vit.core.adapters import adapted_modules, current_ranks, site_adapters
from peft_vit.core.backbones import find_sites

pytestmark = pytest.mark.part("controller")
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
    settings = config(
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
    controller, optimizer = start(model, config(total_rank_budget=None, total_mac_budget=150_000))
    for step in range(STEPS + 1):
        if step:
            train_step(model, controller, optimizer, batch, step)
        entry = controller.rank_history[-1]
        assert entry["cost"] == counted(model, batch[0], "macs") <= controller.schedule.budget_at(step)
    assert 150_000 - min(controller.costs) < entry["cost"]
    each = {site.tokens for site in find_sites(model)}
    assert len(each) > 1


def test_it_starts_with_equal_ranks(tiny_vit) -> None:
    settings = config(total_rank_budget=None, total_parameter_budget=2 * 960 + 128, budget_schedule="constant")
    controller, _ = start(tiny_vit(depth=1), settings)
    # 128 values a rank of query, key, value, out (64 -> 64), 192 of fc1 and fc2 (64 -> 128): 896 for one rank each.
    assert sorted(controller.ranks.values()) == [2, 2, 2, 2, 2, 3]
    one_each = config(total_rank_budget=None, total_parameter_budget=600)
    assert set(start(tiny_vit(depth=1), one_each)[0].ranks.values()) == {1}
