"""timm's Eva: gates and biases are what they are called, and adapters act."""

import copy

import pytest
import torch
from tiny_models import TINY_EVAS, TINY_FAMILIES, random_model
from torch.nn import functional as F

from peft_vit.core.adapters import attach_adapters, site_adapters
from peft_vit.core.backbones import Architecture, find_sites
from peft_vit.core.backbones.catalog import create_skeleton
from peft_vit.core.config import MATRICES


@pytest.mark.parametrize("name", ["tiny_eva02", "tiny_eva02_fused"])
def test_gate_and_up_are_what_they_are_called(name: str) -> None:
    model = random_model(name)
    mlp = model.blocks[1].mlp
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    parts = {}
    for site in find_sites(model, ("gate", "up")):
        if site.layer == 1:
            linear = model.get_submodule(site.module)
            parts[site.kind] = F.linear(x, linear.weight[site.span], linear.bias[site.span])
    hidden = mlp.norm(F.silu(parts["gate"]) * parts["up"])
    torch.testing.assert_close(mlp(x), F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias))


@pytest.mark.parametrize("name", TINY_EVAS)
def test_adapted_it_starts_as_the_plain_model_and_is_one_with_larger_weights(name, batch, fill_adapters) -> None:
    plain, model = random_model(name), random_model(name)
    sites = find_sites(model, MATRICES)
    assert sites == find_sites(model)  # the default of targets stands for all
    attach_adapters(model, sites, 2, scale=1.5, seed=0)
    with torch.no_grad():
        assert torch.equal(model(batch[0]), plain(batch[0]))
        fill_adapters(model)
        for site in sites:
            adapter = site_adapters(model)[site.name]
            plain.get_submodule(site.module).weight[site.span] += 1.5 * adapter.lora_B @ adapter.lora_A
        torch.testing.assert_close(model(batch[0]), plain(batch[0]), rtol=0, atol=1e-5)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    for adapter in site_adapters(model).values():
        assert adapter.lora_B.grad.abs().sum() > 0


def test_a_bias_that_timm_adds_past_its_module_is_added_after_it(batch) -> None:
    model = random_model("tiny_eva02_fused")
    own = copy.deepcopy(model)
    for block in own.blocks:
        assert block.attn.q_bias.abs().sum() > 0
        block.attn.qkv_bias_separate = False
    with torch.no_grad():
        torch.testing.assert_close(model(batch[0]), own(batch[0]))
        assert find_sites(own) == find_sites(model)
        attach_adapters(own, find_sites(own, ("query",)), 1, scale=1.0, seed=0)
        before = own(batch[0])
        for adapter in site_adapters(own).values():
            adapter.lora_B.fill_(1.0)
        assert not torch.equal(own(batch[0]), before)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_a_skeleton_has_what_no_file_holds(name: str, batch) -> None:
    model = random_model(name)
    state = torch.get_rng_state()
    skeleton = create_skeleton(Architecture("timm", name), 32, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    skeleton.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(skeleton.eval()(batch[0]), model(batch[0]))
