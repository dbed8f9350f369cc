"""Sites: what they are called, which rows they hold, and which can be chosen."""

from __future__ import annotations

import pytest
import timm
import torch
from tiny_models import random_model
from torch import nn

from peft_vit.base.errors import UserError
from peft_vit.core.backbones import find_sites
from peft_vit.core.config import MATRICES

TINY = "test_vit"  # timm's smallest: width 64, 6 blocks, 2 heads
MODELS = {  # matrices of an MLP, and tokens that are no patches
    TINY: (["fc1", "fc2"], 1),
    "tiny_dinov3": (["fc1", "fc2"], 5),
    "tiny_eva02": (["gate", "up", "fc2"], 1),
    "tiny_eva02_fused": (["gate", "up", "fc2"], 1),
}


@pytest.fixture
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(TINY, img_size=32, num_classes=3).eval()


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_named_in_order(name: str) -> None:
    model = random_model(name)
    sites, (mlp, prefix) = find_sites(model), MODELS[name]
    kinds = ["query", "key", "value", "out", *mlp]
    places = ["attn"] * 4 + ["mlp"] * len(mlp)
    expected = [
        (f"blocks.{layer}.{place}.{kind}", layer, kind, "attention" if place == "attn" else "mlp")
        for layer in range(len(model.blocks))
        for place, kind in zip(places, kinds, strict=True)
    ]
    assert [(site.name, site.layer, site.kind, site.role) for site in sites] == expected
    assert {site.tokens for site in sites} == {model.patch_embed.num_patches + prefix}
    assert find_sites(model, MATRICES) == sites  # the default of targets stands for all


def test_replaced_modules_have_the_same_sites(tiny: nn.Module) -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.in_features, self.out_features = base, base.in_features, base.out_features

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x)

    before = find_sites(tiny)
    for module in {site.module for site in before}:
        tiny.set_submodule(module, Adapted(tiny.get_submodule(module)))
    assert find_sites(tiny) == before


def test_tokens_are_those_of_a_forward_pass(tiny: nn.Module) -> None:
    with torch.device("meta"):
        registers = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56)
    assert {site.tokens for site in find_sites(registers)} == {4 * 4 + 1 + 4}
    tiny.train()
    tiny.blocks[1].eval()
    patches, prefix = tiny.patch_embed.num_patches, tiny.num_prefix_tokens
    assert {site.tokens for site in find_sites(tiny, ("out",))} == {patches + prefix}
    modes = [(module.training, module in [*tiny.blocks[1].modules()]) for module in tiny.modules()]
    assert all(training != inner for training, inner in modes)  # each module is in the mode that it was in


def test_a_site_that_is_missing_is_named(tiny: nn.Module) -> None:
    tiny.blocks[4].attn.qkv = nn.Sequential(tiny.blocks[4].attn.qkv)
    with pytest.raises(UserError, match=r"no module blocks\.4\.attn\.query: there is no linear module"):
        find_sites(tiny, ("key", "out"))


@pytest.mark.parametrize(
    ("model", "targets", "fault"),
    [
        (TINY, ("querry",), "expected some of query, key"),
        (TINY, (), "expected some of query, key"),
        ("tiny_eva02", ("fc1", "fc2"), "unknown matrix 'fc1'; expected some of query, key, value, out, gate, up, fc2"),
        (TINY, ("blocks.0.attn.qvk",), r"targets: no target module matches .* the nearest are blocks\.\d\.attn\.qkv"),
        (TINY, ("block.*.attn.qkv",), r"targets: no target module matches .* the nearest are blocks\.\d\.attn\.qkv"),
    ],
)
def test_unknown_or_no_targets_are_refused(model: str, targets: tuple[str, ...], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        find_sites(random_model(model), targets)
