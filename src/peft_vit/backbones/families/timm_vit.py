"""timm's models whose blocks stand in one row; some pool their tokens by attention, which counts as one more block.

- VisionTransformer: ViT, DeiT, DINO, DINOv2 with and without registers, CLIP, SigLIP, AIMv2, TIPSv2.
- VisionTransformerDistilled: DeiT with a second token and a head on each, whose logits are averaged.
- Eva: EVA-02, DINOv3, PE, RoPE-ViT, Sapiens 2 and others with rotary position embeddings. Query, key and value are
  fused or three modules, and MLPs may be gated.
- Beit: BEiT and BEiT v2, whose blocks hold relative position biases. They have a window per image size.
"""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from timm.layers import AttentionPoolLatent
from timm.models import beit, eva
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from peft_vit.backbones.families.family import Family, build
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


def _build_eva(name: str, image_size: int, num_classes: int, **settings: Any) -> nn.Module:
    """Build a model; of Sapiens 2, which names the heads of each block, with the first and the middle block's heads."""
    if "depth" in settings and "sapiens" in name:
        with torch.device("meta"):
            blocks: Any = timm.create_model(name).blocks
        heads = (blocks[0].attn.num_kv_heads, blocks[len(blocks) // 2].attn.num_kv_heads)
        settings = {**settings, "num_kv_heads": heads}
    return build(name, image_size, num_classes, **settings)


TIMM_DEIT = Family(VisionTransformerDistilled, row_layout, row_of_blocks, _fit_weights)
TIMM_VIT = Family(VisionTransformer, row_layout, row_of_blocks, _fit_weights)
TIMM_EVA = Family(eva.Eva, row_layout, row_of_blocks, eva.checkpoint_filter_fn, build=_build_eva)
TIMM_BEIT = Family(beit.Beit, row_layout, row_of_blocks, beit.checkpoint_filter_fn)
