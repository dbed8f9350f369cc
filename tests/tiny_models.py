"""Tiny models: timm's Eva in the three ways in which its blocks hold matrices, random values, a site, a card."""

from typing import Any

import torch
from timm.models import register_model
from timm.models.eva import Eva, _cfg, _create_eva, _dinov3_cfg
from torch import nn

from peft_vit.backbones import Site
from peft_vit.backbones.catalog import create_model
from peft_vit.deployment import ModelCard

TINY_EVAS = ("tiny_dinov3", "tiny_eva02", "tiny_eva02_fused")
_TINY = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "use_rot_pos_emb": True}
_EVA02 = {**_TINY, "mlp_ratio": 2, "swiglu_mlp": True, "ref_feat_shape": (4, 4)}


@register_model
def tiny_dinov3(pretrained: bool = False, **kwargs: Any) -> Eva:
    """Make a model as timm's DINOv3: fused query, key and value without bias, registers, rotary positions."""
    settings = {
        "mlp_ratio": 2,
        "dynamic_img_size": True,
        "qkv_bias": False,
        "init_values": 1.0,
        "rope_type": "dinov3",
        "rope_temperature": 100,
        "rope_rotate_half": True,
        "use_abs_pos_emb": False,
        "num_reg_tokens": 4,
        "use_fc_norm": False,
    }
    return _create_eva("tiny_dinov3", pretrained, **_TINY | settings | kwargs | {"pretrained_cfg": _dinov3_cfg()})


@register_model
def tiny_eva02(pretrained: bool = False, **kwargs: Any) -> Eva:
    """Make a model as timm's EVA-02 base: query, key, value, gate and up are modules of their own."""
    settings = {"qkv_fused": False, "scale_mlp": True}
    return _create_eva("tiny_eva02", pretrained, **_EVA02 | settings | kwargs | {"pretrained_cfg": _cfg()})


@register_model
def tiny_eva02_fused(pretrained: bool = False, **kwargs: Any) -> Eva:
    """Make a model as timm's EVA-02 small: query, key and value fused with the bias beside, gate and up fused too."""
    return _create_eva("tiny_eva02_fused", pretrained, **_EVA02 | kwargs | {"pretrained_cfg": _cfg()})


def random_model(name: str) -> nn.Module:
    """Make a model of timm by name, for 32 px and 5 classes; all its values are random, biases and norms too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = create_model(name, 32, 5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


CARD = ModelCard(  # of random_model("test_vit")
    run="study/experiment/seed_0",
    model="test_vit",
    weights_name="none",
    weights_sha256=None,
    image_size=32,
    channels=3,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.25),
    class_names=("a", "b", "c", "d", "e"),
)


def loose_site(kind: str, rows: tuple[int, int], in_features: int) -> Site:
    """Return a site on rows of a layer that is no part of a model."""
    name = f"blocks.0.attn.{kind}"
    return Site(name, "blocks.0.attn.qkv", rows, 0, kind, "attention", in_features, rows[1] - rows[0], tokens=5)
