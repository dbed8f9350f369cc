"""Bits and ranks under one budget: the best of all choices, within the stored bytes; no choice, no budget."""

import itertools
import math

import numpy as np
import pytest
import qa_lora_settings
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_vit import QaLoraConfig, QALoRATrainer, allocate_bits
from peft_vit.base.errors import SilentNoEffectWarning
from peft_vit.core.adapters import adapted_modules, current_ranks, site_adapters
from peft_vit.core.allocation.loss_prediction import fit_head, layer_losses, rank_gains
from peft_vit.core.backbones import find_sites
from peft_vit.core.training.adaptive_bits import choose_bits

pytestmark = [pytest.mark.part("quantization"), qa_lora_settings.SILENT]


def config(targets=("query", "key", "value", "out", "fc1", "fc2"), **adaptive) -> QaLoraConfig:
    bits = {"quantization_bits": None, "quantization_type": None, "adaptive_bits": adaptive}
    return qa_lora_settings.config(**bits, rank=None if adaptive.get("ranks") else 2, targets=targets)


def uniform_bytes(model, type: str, targets) -> int:
    bits = {"int2": 2, "int4": 4, "int8": 8}[type]
    names = {site.module for site in find_sites(model, targets)}
    return sum(model.get_submodule(name).weight.numel() * (bits + 32 // 16) // 8 for name in names)


@pytest.mark.parametrize(("by", "share"), [("fisher", 1.0), ("fisher", 0.8), ("loss", 0.85), ("loss", 1.4)])
def test_types_are_the_best_of_all_within_the_bytes(tiny_vit, batch, by, share) -> None:
    model, targets = tiny_vit(), ("out", "fc2")
    budget = int(share * uniform_bytes(model, "int4", targets))
    settings = config(targets, total_byte_budget=budget, sensitivity=by)
    chosen = allocate_bits(model, settings, *batch, seed=5)
    record = chosen.record
    modules = list(record.losses)
    assert modules == [f"blocks.{block}.{name}" for block in (0, 1) for name in ("attn.proj", "mlp.fc2")]
    head, _ = fit_head(model, *batch)
    expected = layer_losses(
        model, {name: list(chosen.formats.values()) for name in modules}, batch[0], head, by=by, seed=5
    )
    for place, (name, format) in enumerate(chosen.formats.items()):
        assert record.losses[name][format.type] == expected[name][place]
    bits = {"int2": 2, "int4": 4, "int8": 8}
    totals = {}
    for types in itertools.product(bits, repeat=4):
        weights = [model.get_submodule(name).weight.numel() for name in modules]
        size = sum(count * (bits[type] + 2) // 8 for count, type in zip(weights, types, strict=True))
        if size <= budget:
            totals[types] = sum(record.losses[name][type] for name, type in zip(modules, types, strict=True))
    assert record.predicted_rise == pytest.approx(min(totals.values()), rel=1e-9)
    assert totals[tuple(record.types.values())] == pytest.approx(record.predicted_rise)
    assert (len(set(record.types.values())) > 1) == (share != 1)
    if share >= 1:
        assert record.predicted_rise <= sum(record.losses[name]["int4"] for name in modules)
    assert record.gap == pytest.approx(0, abs=1e-9)
    assert chosen.ranks is record.ranks is None
    trainer = QALoRATrainer(model, settings, 4, formats=chosen.formats)
    stored = {name: module.quantized for name, module in adapted_modules(model)}
    assert {name: weight.format.type for name, weight in stored.items()} == record.types
    assert sum(weight.nbytes for weight in stored.values()) == record.spent_bytes <= budget
    assert trainer.bits_history[0]["bits_per_weight"] == {name: bits[type] + 2 for name, type in record.types.items()}


@pytest.mark.parametrize(
    ("types", "average_bits", "least"), [(("int2", "int4", "int8"), 5.3, 5.0), (("int2", "int3", "nf4"), 4.6, 4.3)]
)
def test_average_bits_are_those_of_the_stored_bytes(tiny_vit, batch, types, average_bits, least) -> None:
    model, settings = tiny_vit(), config(average_bits=average_bits, types=types)
    chosen = allocate_bits(model, settings, *batch)
    QALoRATrainer(model, settings, 4, formats=chosen.formats)
    layers = [module.quantized for _, module in adapted_modules(model)]
    used = {layer.format.type for layer in layers}
    assert len(used) > 1
    assert used <= set(types)
    assert sum(layer.nbytes for layer in layers) == chosen.record.spent_bytes
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    assert least < 8 * chosen.record.spent_bytes / weights <= average_bits


def test_bits_and_ranks_are_the_best_of_all_within_the_bytes(tiny_vit, batch) -> None:
    model, targets = tiny_vit(depth=1), ("query", "out", "fc2")
    budget = 18_000
    settings = config(targets, total_byte_budget=budget, ranks=True)
    chosen = allocate_bits(model, settings, *batch)
    record = chosen.record
    head, places = fit_head(model, *batch)
    gains = rank_gains(model, find_sites(model, targets), batch[0], places, head, pool=16)
    ceilings = {name: len(gain) - 1 for name, gain in gains.items()}
    assert list(ceilings.values()) == [4, 4, 8]  # 64, 64 and 128 inputs in groups of 16
    bits = {"int2": 2, "int4": 4, "int8": 8}
    weights = {"blocks.0.attn.qkv": 3 * 64 * 64, "blocks.0.attn.proj": 64 * 64, "blocks.0.mlp.fc2": 64 * 128}
    best = float("inf")
    for types in itertools.product(bits, repeat=3):
        packed = sum(count * (bits[type] + 2) // 8 for count, type in zip(weights.values(), types, strict=True))
        rise = sum(record.losses[name][type] for name, type in zip(weights, types, strict=True))
        for ranks in itertools.product(*(range(top + 1) for top in ceilings.values())):
            adapters = sum(4 * rank * (top + 64) for rank, top in zip(ranks, ceilings.values(), strict=True))
            if packed + adapters <= budget:
                gain = sum(gains[name][rank] for name, rank in zip(gains, ranks, strict=True))
                best = min(best, rise - gain)
    assert record.predicted_rise - record.predicted_gain == pytest.approx(best, rel=1e-9)
    assert any(chosen.ranks.values())
    QALoRATrainer(model, settings, 4, formats=chosen.formats, ranks=chosen.ranks)
    assert current_ranks(model) == chosen.ranks
    adapters = sum(p.nbytes for adapter in site_adapters(model).values() for p in adapter.parameters())
    packed = sum(module.quantized.nbytes for _, module in adapted_modules(model))
    assert packed + adapters == record.spent_bytes <= budget


def test_equal_input_gives_equal_choices(tiny_vit, batch) -> None:
    settings = config(total_byte_budget=60_000, ranks=True)
    assert allocate_bits(tiny_vit(), settings, *batch).record == allocate_bits(tiny_vit(), settings, *batch).record


def test_bits_may_take_every_byte(tiny_vit, batch) -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(0)  # all images alike, so no adapter could tell them apart
    least = uniform_bytes(model, "int2", ("out",))
    with pytest.warns(SilentNoEffectWarning, match="gave every byte to bits and no module a rank"):
        allocate_bits(model, config(("out",), total_byte_budget=least + 4096, ranks=True), *batch)


def test_the_same_type_everywhere_is_said(tiny_vit, batch) -> None:
    budget = uniform_bytes(tiny_vit(depth=1), "int4", ("out", "fc2"))  # fc2 is twice as large, so there is no exchange
    with pytest.warns(SilentNoEffectWarning, match="adaptive_bits chose int4 for every layer"):
        chosen = allocate_bits(tiny_vit(depth=1), config(("out", "fc2"), total_byte_budget=budget), *batch)
    assert chosen.record.predicted_rise == sum(losses["int4"] for losses in chosen.record.losses.values())


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
    with pytest.raises(ValueError, match="finite"):
        choose_bits([[0.0, math.nan]], [[3, 4]], 5)
