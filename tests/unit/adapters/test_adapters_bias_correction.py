"""The births of triplets survive saving, types and further changes; a step without an update gets no correction.

That the corrected step is right is shown in tests/oracle/test_resizing_numpy.py.
"""

import copy
import io

import pytest
import torch
from torch import nn

from peft_vit.adapters import attach_adapters, correct_young_triplets, resize_adapters, site_adapters
from peft_vit.adapters.bias_correction import TRIPLETS
from peft_vit.backbones import Site

pytestmark = pytest.mark.part("controller")

SITE = "blocks.0.mlp.fc1"
RATE = 1e-2


@pytest.fixture
def model(tiny_vit) -> nn.Module:
    model = tiny_vit(depth=1)
    site = Site(SITE, SITE, (0, 128), 0, "fc1", "mlp", 64, 128, tokens=17)
    attach_adapters(model, [site], {SITE: 2}, scale=2.0, seed=0)
    return model


def adamw(model, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(site_adapters(model)[SITE].parameters(), RATE, **options)


def steps(model, optimizer, count=1) -> None:
    """Make steps with gradients of ones: with constant gradients Adam moves every value by its rate."""
    for _ in range(count):
        for parameter in site_adapters(model)[SITE].parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


def resize(model, optimizer, rank) -> None:
    """Keep the first triplets."""
    present = site_adapters(model)[SITE].rank
    resize_adapters(model, optimizer, {SITE: rank}, {SITE: torch.arange(present, 0, -1.0)})


def births(model, optimizer) -> tuple[int, ...] | None:
    entries = [optimizer.state[p].get(TRIPLETS) for p in site_adapters(model)[SITE].parameters()]
    assert all(entry is None for entry in entries) or entries[0]["births"] == entries[1]["births"]
    return None if entries[0] is None else entries[0]["births"]


def test_births_follow_growth_and_shrinking(model) -> None:
    optimizer = adamw(model, weight_decay=0.0)
    steps(model, optimizer, 3)
    assert births(model, optimizer) is None
    resize(model, optimizer, 1)
    assert births(model, optimizer) is None  # all that is left is as old as the parameter
    resize(model, optimizer, 3)
    steps(model, optimizer, 2)
    resize(model, optimizer, 4)
    assert births(model, optimizer) == (0, 3, 3, 5)
    steps(model, optimizer, 1)
    resize(model, optimizer, 2)
    assert births(model, optimizer) == (0, 3)
    resize(model, optimizer, 1)
    assert births(model, optimizer) is None


def test_a_parameter_without_old_triplets_starts_anew(model) -> None:
    optimizer = adamw(model)
    steps(model, optimizer, 3)
    resize(model, optimizer, 0)
    assert not optimizer.state
    resize(model, optimizer, 2)
    assert not optimizer.state
    steps(model, optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_births_survive_a_file_and_are_not_rounded(model, dtype) -> None:
    model.to(dtype)
    optimizer = adamw(model)
    steps(model, optimizer, 301)  # bfloat16 would make it 300
    resize(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    restored = adamw(model)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert births(model, restored) == (0, 0, 301)


def test_a_resumed_optimizer_steps_alike(model) -> None:
    optimizer = adamw(model)
    correct_young_triplets(optimizer)
    steps(model, optimizer, 20)
    resize(model, optimizer, 3)
    steps(model, optimizer, 2)
    twin = copy.deepcopy(model)
    resumed = adamw(twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    correct_young_triplets(resumed)
    steps(model, optimizer, 3)
    steps(twin, resumed, 3)
    assert torch.equal(site_adapters(model)[SITE].lora_A, site_adapters(twin)[SITE].lora_A)


def test_a_step_that_was_not_made_is_not_corrected(model) -> None:
    optimizer = adamw(model)
    correct_young_triplets(optimizer)
    steps(model, optimizer, 20)
    resize(model, optimizer, 3)
    steps(model, optimizer)
    adapter = site_adapters(model)[SITE]
    before = adapter.lora_A.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(adapter.lora_A, before)


def test_an_overflow_under_the_fused_kernel_is_not_corrected(model) -> None:
    optimizer = adamw(model, fused=True)
    correct_young_triplets(optimizer)
    steps(model, optimizer, 20)
    resize(model, optimizer, 3)
    steps(model, optimizer)
    before = site_adapters(model)[SITE].lora_A.detach().clone()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)  # as GradScaler.step does
    steps(model, optimizer)
    assert torch.equal(site_adapters(model)[SITE].lora_A, before)
    optimizer.found_inf = torch.tensor(0.0)
    steps(model, optimizer)
    assert not torch.equal(site_adapters(model)[SITE].lora_A, before)


def test_old_triplets_cost_nothing(model, monkeypatch) -> None:
    optimizer = adamw(model, betas=(0.5, 0.5))  # 20 steps bring 0.5^20 below 1e-6
    correct_young_triplets(optimizer)
    steps(model, optimizer, 5)
    resize(model, optimizer, 3)
    made = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda values: made.append(len(values)) or cat(values))
    steps(model, optimizer, 25)
    assert made == 2 * 19 * [2]  # m and v, of the slices of A and B
