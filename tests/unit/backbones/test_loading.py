"""Loading: the head, the random backbone, the position embedding, and the generators left as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from peft_vit.core.backbones import Architecture, LoadedBackbone, load_backbone
from peft_vit.core.backbones.catalog import create_model
from peft_vit.core.config import BackboneConfig

RANDOM = BackboneConfig(model="test_vit", weights="random")


def _load(config: BackboneConfig = RANDOM, seed: int = 0, image_size: int = 32, **options: bool) -> LoadedBackbone:
    return load_backbone(config, image_size=image_size, num_classes=3, seed=seed, **options)


def _head(loaded: LoadedBackbone) -> torch.Tensor:
    head = loaded.model.head
    assert torch.equal(head.bias, torch.zeros(3))
    return head.weight.detach()


def _backbone(loaded: LoadedBackbone) -> dict[str, torch.Tensor]:
    return {name: t for name, t in loaded.model.state_dict().items() if not name.startswith("head.")}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def weights_file(tmp_path: Path) -> BackboneConfig:
    torch.manual_seed(5)
    save_file(
        create_model(Architecture("timm", "test_vit"), 160, num_classes=7).state_dict(), tmp_path / "w.safetensors"
    )
    return BackboneConfig(model="test_vit", weights="file", file=str(tmp_path / "w.safetensors"))


def test_head_depends_on_the_seed_alone(weights_file: BackboneConfig) -> None:
    first = _head(_load(seed=0))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    for other in (_load(), _load(weights_file), _load(image_size=64), _load(weights_file, smoke=True)):
        assert torch.equal(_head(other), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(_head(_load(seed=1)), first)
    weight = load_backbone(RANDOM, image_size=32, num_classes=1000, seed=0).model.head.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)  # timm's, in 64,000 draws
    assert weight.mean().item() == pytest.approx(0, abs=3e-4)


def test_random_backbone_is_the_same_in_every_seed() -> None:
    first = _load(seed=0)
    torch.manual_seed(99)
    assert _same(_backbone(first), _backbone(_load(seed=7)))
    assert _backbone(first)["blocks.0.attn.qkv.weight"].std().item() > 0.01
    assert first.weights_sha256 is None
    assert first.weights_name == "random (as configured)"
    nowhere = _load(BackboneConfig(model="test_vit", weights="file", file="/nowhere.pth"), smoke=True)
    assert nowhere.weights_sha256 is None
    assert nowhere.weights_name == "random (smoke run)"
    assert _same(_backbone(nowhere), _backbone(first))


def test_mean_and_std_are_timm_s() -> None:
    imagenet = _load(BackboneConfig(model="deit_tiny_patch16_224", weights="random"))
    assert imagenet.mean == (0.485, 0.456, 0.406)
    assert imagenet.std == (0.229, 0.224, 0.225)
    inception = _load(BackboneConfig(model="vit_tiny_patch16_224", weights="random"))
    assert inception.mean == inception.std == (0.5, 0.5, 0.5)


def test_position_embedding_equals_pillow_s_resampling(tmp_path: Path) -> None:
    """At 84 px a 37 x 37 grid becomes 6 x 6. Pillow's bicubic filter on float images is antialiased too."""
    config = BackboneConfig(model="vit_small_patch14_dinov2", weights="file", file=str(tmp_path / "w.safetensors"))
    native = create_model(Architecture("timm", config.model), 518, num_classes=1)
    save_file(native.state_dict(), tmp_path / "w.safetensors")
    loaded = _load(config, image_size=84).model.pos_embed.detach()  # (1, 1 + 36, 384)
    assert torch.equal(loaded[:, :1], native.pos_embed[:, :1])  # the class token's stays
    grid = native.pos_embed[0, 1:].detach().reshape(37, 37, 384).numpy()
    for channel in (0, 17, 383):
        image = Image.fromarray(np.ascontiguousarray(grid[..., channel]))
        expected = np.asarray(image.resize((6, 6), Image.Resampling.BICUBIC))
        actual = loaded[0, 1:, channel].reshape(6, 6).numpy()
        np.testing.assert_allclose(actual, expected, atol=1e-6)
        assert np.abs(expected).max() > 1e-3
