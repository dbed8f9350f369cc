"""Each way in which timm's families hold matrices: every one is a site, acts, and is what it is called."""

import pytest
import timm
import torch
from qa_lora_settings import config
from tiny_models import TINY_FAMILIES, random_model
from torch import Tensor, nn
from torch.nn import functional as F

from peft_vit import QALoRATrainer
from peft_vit.base.errors import UserError
from peft_vit.core.adapters import attach_adapters, effects
from peft_vit.core.backbones import (
    Architecture,
    Backbone,
    capturing_inputs,
    describe,
    fill_head,
    find_sites,
    native_size,
)
from peft_vit.core.config import BackboneConfig

NO_TARGETS = {"cpb_mlp", "embeds", "head", "head_dist"}  # networks of positions, patches, classes
WHOLE = ("tiny_swin_v2", "tiny_difference", "tiny_branches")  # attention of another form, or a fused matrix as one site


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_every_matrix_on_tokens_is_covered_by_sites_once_and_tokens_are_its_rows(name: str) -> None:
    model = random_model(name)
    sites = find_sites(model)
    assert len({site.name for site in sites}) == len(sites)
    assert [site.layer for site in sites if site.kind != "reduction"] == sorted(
        site.layer for site in sites if site.kind != "reduction"
    )
    covered: dict[str, Tensor] = {}
    for site in sites:
        weight = model.get_submodule(site.module).weight
        assert weight[site.span].shape == (site.out_features, site.in_features)
        covered.setdefault(site.module, torch.zeros(len(weight), dtype=torch.int))[site.span] += 1
    assert all((rows == 1).all() for rows in covered.values())
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert covered.keys() == {path for path in linear if not NO_TARGETS & set(path.split("."))}
    rows: dict[str, int] = {}
    with capturing_inputs(
        {module: model.get_submodule(module) for module in covered},
        lambda module, given: rows.update({module: given.numel() // given.shape[-1]}),
    ):
        model(torch.randn(3, 3, 32, 32))
    learnt = {"attn_pool.q"} & rows.keys()  # a query, the same for every image
    assert {site.module: site.tokens * 3 for site in sites} == rows | dict.fromkeys(learnt, 3)


@pytest.mark.parametrize("name", [name for name in TINY_FAMILIES if name not in WHOLE])
def test_query_key_and_value_are_what_attention_gets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(name)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    seen: list[tuple[Tensor, ...]] = []
    whole = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        seen.append((q.clone(), k.clone(), v.clone()))
        return whole(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    images = torch.randn(2, 3, 32, 32)
    model(images)
    before = seen[0]
    for place, kind in enumerate(("query", "key", "value")):
        site = next(site for site in find_sites(model) if site.kind == kind)
        weight = model.get_submodule(site.module).weight
        with torch.no_grad():
            plain = weight.clone()
            weight[site.span] *= 1.5
            seen.clear()
            model(images)
            weight.copy_(plain)
        assert [not torch.equal(a, b) for a, b in zip(before, seen[0], strict=True)] == [i == place for i in range(3)]


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_every_site_acts_and_none_does_before_timm_is_told_to_call_its_module(name: str) -> None:
    model = random_model(name)
    sites = find_sites(model)
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attach_adapters(model, sites, 2, scale=1.0, seed=0)
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-5)
    assert all(effect.fault is None and effect.gradient > 0 for effect in effects(model).values())
    plain = {key.replace(".sites.", "."): value for key, value in model.state_dict().items()}
    assert all(torch.equal(plain[key], value) for key, value in state.items())
    past = [module for module in model.modules() if getattr(module, "q_bias", None) is not None]
    for module in past:
        module.qkv_bias_separate = False
    idle = {name: effect for name, effect in effects(model).items() if effect.fault}
    assert set(idle) == ({site.name for site in sites if site.module.endswith("qkv")} if past else set())
    assert all("never calls the module" in effect.fault and effect.gradient == 0 for effect in idle.values())
    model.train()
    assert torch.equal(model(images), model(images))  # nothing is drawn at random


@pytest.mark.parametrize(
    "adapt",
    [
        lambda model: attach_adapters(model, find_sites(model), 2, scale=1.0, seed=0),
        lambda model: QALoRATrainer(model, config(rank=2), 8),
    ],
)
def test_of_one_token_query_and_key_have_no_effect(adapt) -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, depths=(1, 1, 1, 1))
    model.set_input_size(32)  # windows of one token
    with pytest.raises(UserError, match=r"no effect on layers\.0\.blocks\.0\.attn\.query, .* at this image size"):
        adapt(model)


def test_two_heads_are_one_on_their_features_side_by_side() -> None:
    model = random_model("tiny_distilled").double()
    backbone = Backbone(model)
    images = torch.randn(3, 3, 32, 32).double()
    features = backbone.features(images)  # (3, 2 x 64)
    assert features.shape == (3, 128)
    assert list(backbone.heads) == ["head", "head_dist"]
    torch.testing.assert_close(backbone.head(features), model(images))
    weight, bias = torch.randn(5, 128).double(), torch.randn(5).double()
    fill_head(backbone.head, weight, bias)
    torch.testing.assert_close(model(images), features @ weight.T + bias)


def test_the_size_of_pretraining_is_always_taken() -> None:
    """27 patches of 14 pixels leave 6 of 384 over, as timm has it."""
    name = "vit_so400m_patch14_siglip_384"
    assert (
        describe(BackboneConfig(model=name, weights="random"), native_size(Architecture("timm", name))).tokens == 27**2
    )
