"""The metric singular_value: after the last step one cut over all sites, as NumPy cuts the updates themselves."""

import numpy as np
import pytest
import torch
from allocation_runs import config, optimizer_of, train_step

from peft_vit import AdaLoRAController
from peft_vit.adapters import singular_values, site_adapters, to_singular_triplets
from peft_vit.adapters.low_rank import SiteAdapter

pytestmark = pytest.mark.part("controller")
STEPS = 4


@pytest.mark.parametrize(("rank", "pool"), [(0, 1), (1, 1), (3, 1), (3, 2), (4, 2)])
def test_singular_triplets_are_those_of_the_update(rank, pool) -> None:
    generator = torch.Generator().manual_seed(0)
    adapter = SiteAdapter(8, 5, rank, scale=1.7, generator=generator, pool=pool)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    update = adapter.delta().detach().double().numpy()
    expected = np.linalg.svd(update, compute_uv=False)[:rank]
    np.testing.assert_allclose(singular_values(adapter), expected, rtol=1e-5, atol=1e-6)
    to_singular_triplets(adapter)
    np.testing.assert_allclose(adapter.delta().detach(), update, rtol=1e-5, atol=1e-5)
    left, right = (one.detach().double().numpy() for one in adapter.factors())
    each = [np.linalg.norm(np.outer(left[:, i], right[i])) * pool**0.5 for i in range(rank)]
    np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-6)  # the i-th triplet is the i-th component


@pytest.mark.parametrize("budget", [9, 20])
def test_one_cut_after_the_last_step_leaves_the_largest_components_of_all_sites(tiny_vit, batch, budget) -> None:
    model = tiny_vit()
    settings = config(
        importance_metric="singular_value",
        allocation_strategy="global",
        total_rank_budget=budget,
        initial_budget=36,
        warmup_steps=STEPS,
        final_steps=0,
    )
    controller = AdaLoRAController(model, settings, STEPS)
    optimizer = optimizer_of(model)
    controller.attach(model, optimizer)
    updates = {}

    def keep(*_) -> None:
        updates.update({name: one.delta().detach().double().numpy() for name, one in site_adapters(model).items()})

    optimizer.register_step_post_hook(keep)
    for step in range(1, STEPS + 1):
        train_step(model, controller, optimizer, batch, step)
    # Scores are taken before the last step's own update, and so are the ranks; the components are those after it.
    ranks = controller.ranks
    assert sum(ranks.values()) == budget
    assert len(set(ranks.values())) > 1
    for name, adapter in site_adapters(model).items():
        u, s, v = np.linalg.svd(updates[name])
        best = (u[:, : ranks[name]] * s[: ranks[name]]) @ v[: ranks[name]]
        np.testing.assert_allclose(adapter.delta().detach(), best, rtol=1e-3, atol=1e-6)
