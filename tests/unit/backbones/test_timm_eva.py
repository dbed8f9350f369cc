"""timm's Eva: the sites are what they are called, adapters on them act, and replayed blocks compute what they did."""

import copy

import numpy as np
import pytest
import timm
import torch
from tiny_eva import TINY_EVAS
from torch import Tensor, nn
from torch.nn import functional as F

from peft_vit.adapters import attach_adapters, site_adapters
from peft_vit.allocation.bit_sensitivity import fit_head, layer_losses
from peft_vit.backbones import describe, find_sites
from peft_vit.backbones.catalog import create_model, create_skeleton
from peft_vit.config import MATRICES, BackboneConfig
from peft_vit.errors import UserError
from peft_vit.evaluation import measure_ablation
from peft_vit.quantization import QuantizationFormat, quantize

GATED = {"tiny_dinov3": ["fc1"], "tiny_eva02": ["gate", "up"], "tiny_eva02_fused": ["gate", "up"]}


def eva(name: str) -> nn.Module:
    """Return a model whose values are all random, biases and norms too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model(name, 32, 5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def adapted(name: str, fill_adapters) -> nn.Module:
    model = eva(name)
    sites = find_sites(model)
    attach_adapters(model, sites, dict.fromkeys((site.name for site in sites), 2), scale=1.5, seed=0)
    fill_adapters(model)
    return model


@pytest.mark.parametrize("name", TINY_EVAS)
def test_sites_are_named_in_order_and_cover_every_weight_of_the_blocks_once(name: str) -> None:
    model = eva(name)
    sites = find_sites(model)
    kinds = ["query", "key", "value", "out", *GATED[name], "fc2"]
    assert [site.kind for site in sites] == kinds * 2
    assert [site.name for site in sites[: len(kinds)]] == [
        f"blocks.0.{'attn' if kind in kinds[:4] else 'mlp'}.{kind}" for kind in kinds
    ]
    assert [site.role for site in sites] == (["attention"] * 4 + ["mlp"] * (len(kinds) - 4)) * 2
    assert {site.tokens for site in sites} == {4 * 4 + 1 + (4 if name == "tiny_dinov3" else 0)}
    covered: dict[str, Tensor] = {}
    for site in sites:
        weight = model.get_submodule(site.module).weight
        assert weight[site.span].shape == (site.out_features, site.in_features)
        covered.setdefault(site.module, torch.zeros(len(weight), dtype=torch.int))[site.span] += 1
    assert covered.keys() == {
        path for path, one in model.named_modules() if isinstance(one, nn.Linear) and path.startswith("blocks.")
    }
    assert all((rows == 1).all() for rows in covered.values())


@pytest.mark.parametrize("name", TINY_EVAS)
@pytest.mark.parametrize(("kind", "moved"), [("query", 0), ("key", 1), ("value", 2)])
def test_a_slice_is_the_matrix_it_is_called(name: str, kind: str, moved: int, monkeypatch, batch) -> None:
    model, seen = eva(name), []
    original = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        seen.append((q.clone(), k.clone(), v.clone()))
        return original(q, k, v, **options)

    monkeypatch.setattr(timm.models.eva.F, "scaled_dot_product_attention", spy)
    site = next(site for site in find_sites(model, (kind,)) if site.layer == 0)
    seen.clear()
    with torch.no_grad():
        model(batch[0])
        model.get_submodule(site.module).weight[site.span] += 0.1
        model(batch[0])
    assert [not torch.equal(a, b) for a, b in zip(seen[0], seen[2], strict=True)] == [i == moved for i in range(3)]


@pytest.mark.parametrize("name", ["tiny_eva02", "tiny_eva02_fused"])
def test_gate_and_up_are_what_they_are_called(name: str) -> None:
    model = eva(name)
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
    plain, model = eva(name), eva(name)
    sites = find_sites(model, MATRICES)
    assert sites == find_sites(model)  # the default of targets stands for all
    attach_adapters(model, sites, dict.fromkeys((site.name for site in sites), 2), scale=1.5, seed=0)
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
    model = eva("tiny_eva02_fused")
    own = copy.deepcopy(model)
    for block in own.blocks:
        assert block.attn.q_bias.abs().sum() > 0
        block.attn.qkv_bias_separate = False
    with torch.no_grad():
        torch.testing.assert_close(model(batch[0]), own(batch[0]))
        assert find_sites(own) == find_sites(model)
        sites = find_sites(own, ("query",))
        attach_adapters(own, sites, dict.fromkeys((site.name for site in sites), 1), scale=1.0, seed=0)
        before = own(batch[0])
        for adapter in site_adapters(own).values():
            adapter.lora_B.fill_(1.0)
        assert not torch.equal(own(batch[0]), before)


@pytest.mark.parametrize("name", TINY_EVAS)
def test_without_an_update_it_is_a_copy_with_zeros(name: str, batch, fill_adapters) -> None:
    model = adapted(name, fill_adapters)

    def loss(one: nn.Module) -> float:
        with torch.no_grad():
            return F.cross_entropy(one(batch[0]).double(), batch[1]).item()

    found = measure_ablation(model, [batch], device=torch.device("cpu"), precision="fp32")
    assert found.loss == pytest.approx(loss(model), abs=1e-6)
    assert list(found.group_loss_rise) == ["attention", "mlp", "all"]
    for site, rise in found.site_loss_rise.items():
        changed = copy.deepcopy(model)
        with torch.no_grad():
            site_adapters(changed)[site].lora_B.zero_()
        assert rise == pytest.approx(loss(changed) - found.loss, abs=1e-5)
    assert max(map(abs, found.site_loss_rise.values())) > 1e-3


@pytest.mark.parametrize("name", TINY_EVAS)
def test_the_loss_of_a_quantized_layer_is_that_of_a_model_with_its_weight(name: str, batch) -> None:
    model, low = eva(name), QuantizationFormat("int2", 16, True)
    head, _ = fit_head(model, *batch)
    layers = list(dict.fromkeys(site.module for site in find_sites(model)))
    found = layer_losses(model, {layer: [low] for layer in layers}, batch[0], head, by="loss", seed=0)

    def log_probabilities(one: nn.Module) -> Tensor:
        features = one.forward_head(one.forward_features(batch[0]), pre_logits=True)
        return head(features).double().log_softmax(1)

    with torch.no_grad():
        target = log_probabilities(model)
        for layer in layers:
            changed = copy.deepcopy(model)
            linear = changed.get_submodule(layer)
            linear.weight.copy_(quantize(linear.weight, low).dequantize())
            expected = F.kl_div(log_probabilities(changed), target, reduction="batchmean", log_target=True).item()
            assert found[layer] == [pytest.approx(expected, rel=1e-6, abs=1e-9)]
    assert max(loss for (loss,) in found.values()) > 1e-4


@pytest.mark.parametrize("name", TINY_EVAS)
def test_a_skeleton_has_what_no_file_holds(name: str, batch) -> None:
    model = eva(name)
    state = torch.get_rng_state()
    skeleton = create_skeleton(name, 32, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    skeleton.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(skeleton.eval()(batch[0]), model(batch[0]))


@pytest.mark.parametrize(
    ("name", "width", "sites", "tokens"),
    [
        ("vit_small_patch16_dinov3", 384, 72, 7 * 7 + 5),
        ("vit_large_patch16_dinov3", 1024, 144, 7 * 7 + 5),
        ("eva02_base_patch14_224", 768, 84, 8 * 8 + 1),
        ("eva02_tiny_patch14_224", 192, 84, 8 * 8 + 1),
    ],
)
def test_shapes_of_timms_own_models(name: str, width: int, sites: int, tokens: int) -> None:
    shape = describe(BackboneConfig(model=name, weights="random"), 112)
    assert (shape.width, len(shape.sites), shape.tokens) == (width, sites, tokens)
    assert np.prod([shape.sites[0].in_features, shape.sites[0].out_features]) == width**2


def test_a_matrix_that_it_lacks_is_named_with_those_that_it_has() -> None:
    with pytest.raises(UserError, match="unknown matrix 'fc1'; expected some of query, key, value, out, gate, up, fc2"):
        find_sites(eva("tiny_eva02"), ("fc1", "fc2"))
