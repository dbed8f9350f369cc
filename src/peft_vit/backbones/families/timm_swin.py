"""timm's Swin and Swin V2: attention within windows, and a matrix between stages that merges patches.

Tokens differ from stage to stage. The matrix that merges patches counts as part of the block before it. The small
network of Swin V2 that makes position biases sees no tokens and carries no adapter.
"""

from __future__ import annotations

from typing import Any

from timm.models import swin_transformer, swin_transformer_v2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2

from peft_vit.backbones.families.family import Family
from peft_vit.backbones.families.timm_blocks import linears_of_block
from peft_vit.backbones.site import LinearLayout


def _layout(model: Any) -> list[LinearLayout]:
    linears: list[LinearLayout] = []
    layer = 0
    for number, stage in enumerate(model.layers):
        if hasattr(stage.downsample, "reduction"):
            linears.append(LinearLayout(f"layers.{number}.downsample.reduction", layer - 1, ("reduction",), "other"))
        for place, block in enumerate(stage.blocks):
            linears += linears_of_block(f"layers.{number}.blocks.{place}", layer, block)
            layer += 1
    return linears


def _blocks(model: Any) -> list[str]:
    return [f"layers.{stage}.blocks.{i}" for stage, one in enumerate(model.layers) for i in range(len(one.blocks))]


TIMM_SWIN = Family(SwinTransformer, _layout, _blocks, swin_transformer.checkpoint_filter_fn)
TIMM_SWIN_V2 = Family(SwinTransformerV2, _layout, _blocks, swin_transformer_v2.checkpoint_filter_fn)
