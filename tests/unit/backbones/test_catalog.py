"""The catalog: shapes without weights."""

from __future__ import annotations

import pytest
import timm

from peft_vit.backbones import MODELS, describe
from peft_vit.config import BackboneConfig


def _config(model: str) -> BackboneConfig:
    return BackboneConfig(model=model, weights="random")


@pytest.mark.parametrize("name", list(MODELS))
def test_every_listed_model_can_be_adapted_and_has_hub_weights(name: str) -> None:
    shape = describe(_config(name), 112)
    blocks = shape.sites[-1].layer + 1
    assert len(shape.sites) == (7 if name.startswith("eva02") else 6) * blocks  # a gated MLP has three matrices
    assert timm.get_pretrained_cfg(name).hf_hub_id.startswith(f"timm/{name}.")


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
