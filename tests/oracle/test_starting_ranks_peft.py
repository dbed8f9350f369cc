"""The rule eva against PEFT's own EVA: incremental PCA of each layer's inputs, one ranking of all components."""

from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from peft_vit.adapters import attach_adapters
from peft_vit.adapters.peft_layers import peft_ranks
from peft_vit.adapters.peft_tuner import attach_peft
from peft_vit.allocation import CalibrationBatch, choose_starting_ranks
from peft_vit.backbones import find_sites
from peft_vit.config import StartingRanksConfig

pytest.importorskip("peft")
pytestmark = pytest.mark.part("controller")


@pytest.mark.parametrize("rank", [1, 3])
def test_eva_gives_the_ranks_that_peft_gives(tiny_vit: Callable[..., VisionTransformer], rank: int) -> None:
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    plain, theirs = tiny_vit(depth=3).eval(), tiny_vit(depth=3).eval()
    modules = ["attn.proj", "mlp.fc1", "mlp.fc2"]  # PEFT has one rank for a fused query, key and value
    targets = [f"blocks.{block}.{name}" for block in range(3) for name in modules]
    settings = {"r": rank, "target_modules": targets, "eva_config": {"rho": 16 // rank, "tau": 0.999}}
    attach_peft(theirs, "eva", settings, seed=0, images=images)
    expected = peft_ranks(theirs)

    sites = find_sites(plain, ("out", "fc1", "fc2"))
    attach_adapters(plain, sites, 0, scale=1.0, seed=0)
    config = StartingRanksConfig(rule="eva", budget=rank * len(sites))
    batch = CalibrationBatch(images, torch.zeros(12, dtype=torch.int64), torch.nn.functional.cross_entropy)
    ranks, _ = choose_starting_ranks(plain, sites, config, seed=0, batch=batch)
    assert len(set(expected.values())) > 1
    assert {name: rank for name, rank in ranks.items() if rank} == {
        name: rank for name, rank in expected.items() if rank
    }
