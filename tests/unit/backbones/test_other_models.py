"""Models of timm that no family describes by hand: their layers are found where tokens pass."""

import pytest
from tiny_models import random_model
from torch import nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import attach_adapters, current_ranks
from peft_vit.core.backbones import Architecture, Backbone, describe, find_sites
from peft_vit.core.backbones.catalog import build_model
from peft_vit.core.backbones.families.by_tokens import token_layers
from peft_vit.core.config import BackboneConfig
from peft_vit.deploy.measures.check import check_architecture


def shape_of(name: str, image_size: int):
    return describe(BackboneConfig(model=name, weights="random"), image_size)


def test_what_is_found_in_a_plain_model_is_what_its_family_says() -> None:
    model = random_model("test_vit")
    layers = token_layers(model)
    assert list(layers.blocks) == [f"blocks.{layer}" for layer in range(len(model.blocks))]
    by_family = find_sites(random_model("test_vit"))
    assert [linear.module for linear in layers.linears] == list(dict.fromkeys(site.module for site in by_family))
    assert {(linear.module, linear.layer, linear.role) for linear in layers.linears} == {
        (site.module, site.layer, site.role) for site in by_family
    }


@pytest.mark.parametrize(
    ("name", "image_size", "sites", "blocks"),
    [
        # of each block: query, kv, out, fc1, fc2
        ("pvt_v2_b0", 64, 40, 8),
        # of 12 blocks qkv, out, fc1, fc2; of the two that attend to the class token fc1 and fc2 see that alone
        ("convit_tiny", 224, 58, 12),
        # MBConv is convolutional, then attention within blocks and along a grid: qkv, out, fc1, fc2 each
        ("maxvit_tiny_tf_224", 224, 88, 11),
    ],
)
def test_layers_of_other_classes_are_found(name: str, image_size: int, sites: int, blocks: int) -> None:
    shape = shape_of(name, image_size)
    assert (len(shape.sites), shape.sites[-1].layer + 1) == (sites, blocks)
    tokens = [site.tokens for site in shape.sites if site.kind == "fc1"]
    assert name != "pvt_v2_b0" or tokens == [256, 256, 64, 64, 16, 16, 4, 4]
    assert len({(site.layer, site.kind) for site in shape.sites}) == sites
    assert not [site for site in shape.sites if "pos" in site.name]


@pytest.mark.slow
def test_adapters_on_them_act_and_are_exported() -> None:
    checked = check_architecture(Architecture("timm", "pvt_v2_b0"), 64, formats=("onnx", "openvino"), peft=True)
    assert checked.effective == len(checked.sites) == 40
    assert checked.merged.error <= 1e-5
    assert checked.files["onnx"].error <= 1e-4
    assert checked.files["openvino"].error <= 1e-4
    assert checked.peft is not None
    assert checked.peft.error <= 1e-5
    assert not checked.peft_idle


@pytest.mark.parametrize(
    ("name", "image_size", "fault"),
    [
        ("resnet18", 224, "backbone.model: ResNet has no linear layer in a block that sees tokens, as a convolutional"),
        ("samvit_base_patch16", 1024, "backbone.model: samvit_base_patch16 can't be adapted: the model has no linear"),
        ("twins_svt_small", 65, "data.image_size: twins_svt_small can't compute images of 65 px"),
        ("maxvit_tiny_tf_224", 100, "data.image_size: MaxxVit can't compute images of 100 px"),
        ("vit_smal_patch16_224", 224, "backbone.model: unknown model 'vit_smal_patch16_224'; did you mean "),
        ("zzzz", 224, "backbone.model: unknown model 'zzzz'; `peft-vit models` lists some"),
        ("hf-hub:timm/vit_tiny_patch16_224", 224, "backbone.model: unknown model"),
        ("vit_small_patch14_dinov2.nope", 224, "backbone.model: unknown weights tag 'nope' .* lvd142m"),
        ("vit_small_patch14_dinov2.", 224, "backbone.model: unknown weights tag ''"),
        ("vit_small_patch14_dinov2", 100, "data.image_size: 100 is not a multiple of 14, .* use 98 or 112"),
        ("vit_small_patch14_dinov2", 13, "data.image_size: 13 is not a multiple of 14, .* use 14 or 28"),
        ("swin_tiny_patch4_window7_224", 112, "data.image_size: 112 is not a multiple of 32, .* use 96 or 128"),
        ("hiera_tiny_224", 100, "data.image_size: 100 is not a multiple of 32, .* use 96 or 128"),
        ("vit_base_r50_s16_224", 40, "data.image_size: 40 is not a multiple of 16, .* use 32 or 48"),
    ],
)
def test_what_can_not_be_adapted_is_refused_in_a_line(name: str, image_size: int, fault: str) -> None:
    with pytest.raises(UserError, match=f"^{fault}"):
        shape_of(name, image_size)


def test_targets_may_be_patterns() -> None:
    model = random_model("test_vit")
    names = [site.name for site in find_sites(model, ["blocks.0.*", "fc2"])]
    assert set(names) == {site.name for site in find_sites(model) if site.layer == 0 or site.kind == "fc2"}
    fused = find_sites(model, ["*.attn.qkv"])
    assert {site.kind for site in fused} == {"query", "key", "value"}
    attach_adapters(model, fused, 2, scale=1.0, seed=0)
    assert list(current_ranks(model)) == [site.name for site in fused]


def test_a_copy_with_adapters_knows_its_sites() -> None:
    model = build_model(Architecture("timm", "pvt_v2_b0"), 32, 3)
    sites = find_sites(model)
    attach_adapters(model, sites, 1, scale=1.0, seed=0, check=False)
    assert find_sites(model) == sites


def test_a_module_of_nobody_is_refused() -> None:
    with pytest.raises(UserError, match="Sequential is not a model of timm"):
        find_sites(nn.Sequential(nn.Linear(3, 3)))


def test_a_wrapper_that_hands_attributes_out_is_not_taken_for_the_model() -> None:
    peft = pytest.importorskip("peft")
    model = random_model("test_vit")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["qkv"]))
    assert Backbone.within(wrapped).model is model
