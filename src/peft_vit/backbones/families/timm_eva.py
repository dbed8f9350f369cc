"""timm's Eva: EVA-02, DINOv3, PE, RoPE-ViT, Sapiens 2 and other Vision Transformers with rotary position embeddings.

Blocks stand in one row as in VisionTransformer. Query, key and value are fused or three modules, and MLPs may be gated.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import nn

from peft_vit.backbones.families.family import Family, build
from peft_vit.backbones.families.timm_vit import row_layout, row_of_blocks


def _build(name: str, image_size: int, num_classes: int, **settings: Any) -> nn.Module:
    """Build a model; of Sapiens 2, which names the heads of each block, with the first and the middle block's heads."""
    if "depth" in settings and "sapiens" in name:
        with torch.device("meta"):
            blocks: Any = timm.create_model(name).blocks
        heads = (blocks[0].attn.num_kv_heads, blocks[len(blocks) // 2].attn.num_kv_heads)
        settings = {**settings, "num_kv_heads": heads}
    return build(name, image_size, num_classes, **settings)


TIMM_EVA = Family(Eva, row_layout, row_of_blocks, checkpoint_filter_fn, build=_build)
