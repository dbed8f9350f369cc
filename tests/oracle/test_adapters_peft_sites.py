"""LoRA layers of PEFT change their rank, and PEFT agrees: it computes, saves and loads them as if they were made so."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import (
    attach_adapters,
    check_resizable,
    current_ranks,
    peft_sites,
    resize_adapters,
    set_ranks,
    site_adapters,
)
from peft_vit.core.backbones import find_sites

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.part("controller")

TARGETS = ["qkv", "attn.proj", "fc1", "fc2"]
LAYERS = {"attn.qkv": "attn.qkv", "attn.out": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
NAMES = [f"blocks.{block}.{name}" for block in range(2) for name in LAYERS]


def wrapped(base, **options):
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "modules_to_save": ["head"], **options}
    return peft.get_peft_model(base, peft.LoraConfig(**options))


def layer_of(model, site):
    block, name = site.split(".", 2)[1:]
    return model.base_model.model.get_submodule(f"blocks.{block}.{LAYERS[name]}")


def trained(model, batch, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return optimizer


def scores_of(model):
    generator = torch.Generator().manual_seed(2)
    return {name: torch.rand(rank, generator=generator) for name, rank in current_ranks(model).items()}


def logits(model, images):
    model.eval()
    with torch.no_grad():
        return model(images)


def test_the_fused_matrix_is_one_site(tiny_vit) -> None:
    model = wrapped(tiny_vit())
    assert list(site_adapters(model)) == [site.name for site in peft_sites(model)] == NAMES
    first = peft_sites(model)[0]
    assert (first.layer, first.kind, first.in_features, first.out_features) == (0, "qkv", 64, 192)
    adapter = site_adapters(model)["blocks.1.attn.out"]
    assert (adapter.rank, adapter.largest_rank, adapter.scale, adapter.pool) == (4, 64, 2.0, 1)
    assert list(adapter.parameters()) == [adapter.lora_A, adapter.lora_B]
    assert adapter.lora_A is layer_of(model, "blocks.1.attn.out").lora_A.default.weight
    assert peft_sites(tiny_vit()) == ()


def test_peft_is_not_imported_for_models_without_it() -> None:
    program = (
        "import sys, timm; from peft_vit.core.adapters import peft_sites; "
        "print(peft_sites(timm.create_model('test_vit')), 'peft' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "() False\n"


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init_lora_weights": False}])
def test_growing_keeps_the_logits_and_shrinking_the_strongest(tiny_vit, batch, options) -> None:
    model = wrapped(tiny_vit(), **options)
    optimizer = trained(model, batch)
    scales = {name: adapter.scale for name, adapter in site_adapters(model).items()}
    before = logits(model, batch[0])
    wider = {name: 5 + index for index, name in enumerate(NAMES)}
    resize_adapters(model, optimizer, wider, scores_of(model))
    torch.testing.assert_close(logits(model, batch[0]), before, rtol=1e-6, atol=1e-6)
    old = {name: (adapter.lora_A.detach(), adapter.lora_B.detach()) for name, adapter in site_adapters(model).items()}
    moments = {name: optimizer.state[adapter.lora_B]["exp_avg"] for name, adapter in site_adapters(model).items()}
    kept = resize_adapters(model, optimizer, dict.fromkeys(NAMES, 2), scores_of(model) | {NAMES[0]: torch.arange(5.0)})
    assert kept[NAMES[0]].tolist() == [3, 4]
    for name, adapter in site_adapters(model).items():
        layer = layer_of(model, name)
        assert torch.equal(layer.lora_A.default.weight, old[name][0][kept[name]])
        assert torch.equal(layer.lora_B.default.weight, old[name][1][:, kept[name]])
        assert torch.equal(optimizer.state[adapter.lora_B]["exp_avg"], moments[name][:, kept[name]])
        torch.testing.assert_close(adapter.delta(), layer.get_delta_weight("default"))
        assert layer.r == {"default": 2}
        assert (layer.lora_A.default.out_features, layer.lora_B.default.in_features) == (2, 2)
        assert layer.scaling["default"] == adapter.scale == scales[name]
        layer.set_scale("default", 1)  # PEFT works the scale out again, from alpha and r
        assert layer.scaling["default"] == pytest.approx(scales[name])
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    trained(model, batch, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.3, "bias": "lora_only"},
        # Keys that PEFT would prefer to full names: its file sorts them, and the first that fits wins.
        {"rank_pattern": {"attn.qkv": 6, r".*\.fc1": 3}, "alpha_pattern": {"attn.qkv": 3}},
    ],
)
def test_what_peft_saves_it_loads(tiny_vit, batch, tmp_path, options) -> None:
    model = wrapped(tiny_vit(), **options)
    optimizer = trained(model, batch)
    scales = {name: adapter.scale for name, adapter in site_adapters(model).items()}
    ranks = {name: 1 + 3 * (index % 4) for index, name in enumerate(NAMES)}
    resize_adapters(model, optimizer, ranks, scores_of(model))
    trained(model, batch, 2)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_vit(), tmp_path)
    assert current_ranks(loaded) == ranks
    assert {name: adapter.scale for name, adapter in site_adapters(loaded).items()} == pytest.approx(scales)
    torch.testing.assert_close(logits(loaded, batch[0]), logits(model, batch[0]), rtol=0, atol=1e-6)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged, batch[0]), logits(model, batch[0]), rtol=0, atol=1e-5)


def test_wrapped_in_other_modules(tiny_vit, batch, tmp_path) -> None:
    """PEFT on a model around the VisionTransformer, and a model around PEFT's."""
    inside = nn.ModuleDict({"backbone": tiny_vit()})
    model = nn.Sequential(wrapped(inside, modules_to_save=None))
    assert list(current_ranks(model)) == NAMES
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    resize_adapters(model, optimizer, {NAMES[5]: 7}, scores_of(model))
    assert model[0].peft_config["default"].rank_pattern["backbone.blocks.1.attn.proj"] == 7
    model[0].save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(nn.ModuleDict({"backbone": tiny_vit()}), tmp_path)
    assert current_ranks(loaded) == current_ranks(model)


def test_rank_zero_has_no_place_in_peft(tiny_vit, batch) -> None:
    model = wrapped(tiny_vit())
    optimizer = trained(model, batch)
    with pytest.raises(UserError, match=rf"ranks\[{NAMES[1]}\]: expected 1 to 64, got 0"):
        resize_adapters(model, optimizer, {NAMES[0]: 3, NAMES[1]: 0}, scores_of(model))
    assert set(current_ranks(model).values()) == {4}
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv: PEFT has no layer of rank 0"):
        set_ranks(model, dict.fromkeys(NAMES, 0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "blocks.0.attn.qkv: DoraLinearVariant is more than plain LoRA"),
        ({"lora_bias": True}, "blocks.0.attn.qkv: lora_bias does not belong to a rank"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: ranks can't change after a start that depends on them"),
        ({"target_modules": ["qkv", "proj"]}, "patch_embed.proj: PEFT has adapted it too"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused(tiny_vit, options, words) -> None:
    model = wrapped(tiny_vit(), **options)
    with pytest.raises(UserError) as refused:
        check_resizable(model, torch.optim.AdamW(model.parameters()))
    assert str(refused.value).startswith(words)


def test_other_uses_of_peft_are_refused(tiny_vit) -> None:
    model = wrapped(tiny_vit())
    optimizer = torch.optim.AdamW(model.parameters())
    model.merge_adapter()
    with pytest.raises(UserError, match="call unmerge_adapter first"):
        check_resizable(model, optimizer)
    model.unmerge_adapter()
    check_resizable(model, optimizer)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(UserError, match="more there than one plain LoRA or AdaLoRA named 'default'; keep one"):
        check_resizable(model, optimizer)
    other = peft.get_peft_model(
        tiny_vit(), peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, tinit=2, tfinal=2, target_modules=TARGETS)
    )
    with pytest.raises(UserError, match=r"blocks.0.attn.qkv: PEFT's SVDLinear can't change its rank here"):
        check_resizable(other, torch.optim.AdamW(other.parameters()))
    base = wrapped(nn.ModuleDict({"backbone": tiny_vit()}), modules_to_save=None)
    with pytest.raises(UserError, match="hand over the model that get_peft_model returned"):
        peft_sites(base.base_model.model["backbone"])


def test_our_adapters_do_not_go_on_top_of_pefts(tiny_vit) -> None:
    base = tiny_vit()
    wrapped(base, modules_to_save=None)
    sites = find_sites(base)
    with pytest.raises(UserError, match="already carries adapters"):
        attach_adapters(base, sites, 1, scale=1.0, seed=0)


def test_a_frozen_adapter_is_refused(tiny_vit, batch) -> None:
    model = wrapped(tiny_vit(), inference_mode=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad] or [nn.Parameter(torch.ones(1))])
    with pytest.raises(UserError, match="does not hold the adapters' parameters"):
        resize_adapters(model, optimizer, {NAMES[0]: 2}, scores_of(model))
