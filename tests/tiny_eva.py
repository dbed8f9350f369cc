"""Tiny models of timm's Eva class, by name as timm knows its own: the three ways in which its blocks hold matrices."""

from typing import Any

from timm.models import register_model
from timm.models.eva import Eva, _cfg, _create_eva, _dinov3_cfg

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
