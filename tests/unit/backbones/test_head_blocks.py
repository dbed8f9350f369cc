"""A head on the class tokens of the last four blocks: what it reads, and which models can have it."""

from pathlib import Path

import pytest
import tiny_models  # noqa: F401  registers tiny ones
import tiny_transformers
import torch

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import attach_adapters
from peft_vit.core.backbones import Architecture, Backbone, describe, find_sites, load_backbone, supports_head_blocks
from peft_vit.core.backbones.catalog import create_model, create_skeleton
from peft_vit.core.backbones.passes import class_token_alone
from peft_vit.core.config import BackboneConfig

ROPE = "vit_small_patch16_rope_224"  # of timm's Eva


def loaded(name: str, head_blocks: int = 4) -> Backbone:
    """Return a model whose head is drawn, for 32 px and 5 classes."""
    config = BackboneConfig(model=name, weights="random", head_blocks=head_blocks)
    backbone = load_backbone(config, image_size=32, num_classes=5, seed=0).backbone
    backbone.model.eval()
    return backbone


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch14_reg4_dinov2", ROPE])
def test_logits_are_those_of_class_tokens_that_hooks_see(name: str) -> None:
    size = 28 if "patch14" in name else 32
    config = BackboneConfig(model=name, weights="random", head_blocks=4)
    backbone = load_backbone(config, image_size=size, num_classes=5, seed=0).backbone
    model = backbone.model.eval()
    attach_adapters(model, find_sites(model), 2, scale=1.0, seed=0)
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    outputs: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    with torch.inference_mode():
        logits = model(images)
        norm = model.norm
        tokens = [x[:, 0] for x in outputs[-4:]]  # (B, D) each
        centred = [x - x.mean(-1, keepdim=True) for x in tokens]
        scaled = [x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() for x in centred]
        features = torch.cat([x * norm.weight + norm.bias for x in scaled], dim=-1)
        expected = features @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(backbone.features(images), features, rtol=1e-5, atol=1e-5)
        with class_token_alone(model):
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert describe(config, size).head_inputs == features.shape[1] == 4 * model.embed_dim


def test_all_but_the_head_is_as_without_it() -> None:
    one, four = loaded("test_vit", 1), loaded("test_vit")
    state, plain = four.model.state_dict(), one.model.state_dict()
    assert state.keys() == plain.keys()
    assert [name for name in state if not torch.equal(state[name], plain[name])] == ["head.weight"]
    assert [site.name for site in four.sites] == [site.name for site in one.sites]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(four.features(images)[:, -64:], one.features(images))
    skeleton = create_skeleton(Architecture("timm", "test_vit", head_blocks=4), 32, 5)
    assert {name: x.shape for name, x in skeleton.state_dict().items()} == {name: x.shape for name, x in state.items()}


POOLED = ("vit_small_patch16_dinov3", "test_vit3", "beit_base_patch16_224", "tiny_swin")
SHALLOW, TWO_HEADS = ("shallow_vit", "tiny_hybrid"), ("deit_tiny_distilled_patch16_224",)


@pytest.mark.parametrize("name", [*POOLED, *SHALLOW, *TWO_HEADS])
def test_a_model_that_can_not_have_it_is_refused_in_one_line(name: str) -> None:
    architecture = Architecture("timm", name, head_blocks=4)
    assert not supports_head_blocks(architecture)
    with pytest.raises(
        UserError, match=rf"4 takes a Vision Transformer of timm with 4 blocks.*{name} is not"
    ) as caught:
        create_model(architecture, 32, 5)
    assert caught.value.field == "backbone.head_blocks"
    with pytest.raises(UserError, match="head reads the class token alone"):
        describe(BackboneConfig(model=name, weights="random", head_blocks=4), 32)


def test_a_model_of_transformers_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tiny_transformers.folder_of("dinov2", tmp_path / "base")
    config = BackboneConfig(library="transformers", model=str(tmp_path / "base"), weights="file", head_blocks=4)
    with pytest.raises(UserError, match="4 takes a Vision Transformer of timm") as caught:
        describe(config, 32)
    assert caught.value.field == "backbone.head_blocks"
