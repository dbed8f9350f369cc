"""timm's Eva: gates and biases are what they are called, and adapters act."""

import copy

import pytest
import torch
from tiny_models import TINY_FAMILIES, random_model
from torch.nn import functional as F

from peft_vit.core.adapters import attach_adapters, site_adapters
from peft_vit.core.backbones import Architecture, find_sites
from peft_vit.core.backbones.catalog import create_skeleton


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
