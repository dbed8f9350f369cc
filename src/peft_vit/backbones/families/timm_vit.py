"""timm's VisionTransformer: ViT, DeiT, DINO, DINOv2 with and without registers, CLIP, SigLIP, AIMv2, TIPSv2.

All blocks stand in one row. Some models pool their tokens by attention, which counts as one more block.
"""

from __future__ import annotations

from typing import Any, cast

from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from peft_vit.backbones.families.family import Family
from peft_vit.backbones.families.timm_blocks import linears_of_block, linears_of_pool
from peft_vit.backbones.site import LinearLayout

POOL = "attn_pool"
_ALIGNED_RADIO = ("base_patch16_radio_v3", "huge_patch16_radio_v3")  # timm 1.0.31, _create_vision_transformer


def row_layout(model: Any) -> list[LinearLayout]:
    """Return the linear modules of blocks in one row, and of pooling by attention."""
    blocks = [name for name in row_of_blocks(model) if name != POOL]
    linears = [one for layer, path in enumerate(blocks) for one in linears_of_block(path, layer, model.blocks[layer])]
    if _has_pool(model):
        linears += linears_of_pool(POOL, len(blocks), model.attn_pool)
    return linears


def row_of_blocks(model: Any) -> list[str]:
    """Return the names of blocks in one row, and of pooling by attention."""
    names = [f"blocks.{layer}" for layer in range(len(model.blocks))]
    return [*names, POOL] if _has_pool(model) else names


def _has_pool(model: Any) -> bool:
    return isinstance(getattr(model, POOL, None), AttentionPoolLatent)


def _fit_weights(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Let timm rename other projects' tensors and resample positions, as it does for each architecture."""
    architecture = str(model.pretrained_cfg.get("architecture", ""))
    how: dict[str, Any] = {}
    if "flexi" in architecture or "radio" in architecture:
        how = {"interpolation": "bilinear", "antialias": False}
    if "radio" in architecture:
        how["align_corners"] = any(name in architecture for name in _ALIGNED_RADIO)
    return checkpoint_filter_fn(tensors, cast(VisionTransformer, model), adapt_layer_scale=True, **how)


TIMM_VIT = Family(VisionTransformer, row_layout, row_of_blocks, _fit_weights)
