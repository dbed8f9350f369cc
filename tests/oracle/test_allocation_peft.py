"""Sensitivity scores, the cubic budget and the global ranking against PEFT's RankAllocator."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from peft_vit.adapters import SiteAdapter
from peft_vit.allocation import Bounds, BudgetSchedule, ImportanceTracker, allocate

layer = pytest.importorskip("peft.tuners.adalora.layer")
RANK, SITES, FINAL_BUDGET, STEPS = 4, 3, 6, 12


def holder_of(adapters: dict[str, SiteAdapter]) -> nn.Module:
    """Return a module with PEFT's names and shapes for our factors."""
    holder = nn.Module()
    for name, adapter in adapters.items():
        site = nn.Module()
        for key, value in (
            ("lora_A", adapter.lora_A),
            ("lora_E", adapter.lora_lambda[:, None]),
            ("lora_B", adapter.lora_B),
        ):
            site.add_module(key, nn.ParameterDict({"default": nn.Parameter(value.detach().clone())}))
        holder.add_module(name, site)
    return holder


def test_scores_and_ranking() -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = {
        f"site{i}": SiteAdapter(5 + i, 6, RANK, scale=1.0, generator=generator, parametrization="svd")
        for i in range(SITES)
    }
    settings = SimpleNamespace(
        beta1=0.85, beta2=0.8, tinit=2, tfinal=3, total_step=STEPS, deltaT=2, target_r=FINAL_BUDGET // SITES
    )
    holder = holder_of(adapters)
    theirs = layer.RankAllocator(holder, settings, "default")
    ours = ImportanceTracker("sensitivity", sensitivity_beta=0.85, uncertainty_beta=0.8, generator=generator)
    for _step in range(1, STEPS - settings.tfinal):
        for name, adapter in adapters.items():
            site = getattr(holder, name)
            for key, parameter in adapter.named_parameters():
                value, gradient = (torch.randn(parameter.shape, generator=generator) for _ in range(2))
                peer = getattr(site, key.replace("lambda", "E")).default
                with torch.no_grad():
                    parameter.copy_(value)
                    peer.copy_(value.view(peer.shape))
                parameter.grad, peer.grad = gradient, gradient.view(peer.shape).clone()
        scores = ours.update(adapters)
        theirs.update_ipt(holder)
        for name in adapters:
            parts = {key: theirs._element_score(f"{name}.lora_{key}.default") for key in "AEB"}
            expected = parts["E"].flatten() + parts["A"].mean(1) + parts["B"].mean(0)
            torch.testing.assert_close(scores[name], expected, rtol=1e-5, atol=0)
    mask = theirs.mask_to_budget(holder, FINAL_BUDGET)
    triplets = [scores[name].double().numpy() for name in adapters]
    bounds = Bounds(np.zeros(SITES, np.int64), np.full(SITES, RANK, np.int64))
    ranks = allocate("global", np.array([t.mean() for t in triplets]), FINAL_BUDGET, bounds, triplet_scores=triplets)
    assert ranks.tolist() == [sum(mask[f"{name}.lora_E.default"]) for name in adapters]
    assert len(set(ranks.tolist())) > 1


def test_budget_course() -> None:
    holder = holder_of(
        {
            f"site{i}": SiteAdapter(
                6, 6, 10, scale=1.0, generator=torch.Generator().manual_seed(0), parametrization="svd"
            )
            for i in range(7)
        }
    )
    settings = SimpleNamespace(beta1=0.85, beta2=0.85, tinit=20, tfinal=30, total_step=150, deltaT=1, target_r=4)
    theirs = layer.RankAllocator(holder, settings, "default")
    ours = BudgetSchedule(70, 28, warmup_steps=20, update_frequency=1, final_steps=30, total_steps=150)
    for step in range(1, 151):
        expected, _ = theirs.budget_schedule(step)
        assert ours.budget_at(step) == expected
