"""timm's Swin and Swin V2: attention within windows, and a matrix between stages that merges patches.

Tokens differ from stage to stage. The matrix that merges patches counts as part of the block before it. The small
network of Swin V2 that makes position biases sees no tokens and carries no adapter.
"""

from __future__ import annotations

from typing import Any

import timm
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


def _build(name: str, image_size: int, num_classes: int, **settings: Any) -> Any:
    """Build a model whose windows grow and shrink with the image, so that none is filled up with nothing."""
    model: Any = timm.create_model(name, num_classes=num_classes, **settings)
    if image_size != model.patch_embed.img_size[0]:
        model.set_input_size(image_size)
    return model


def _size_step(model: Any) -> int:
    """Return the side of an image of which the last stage has one token: multiples of it fill all windows."""
    return int(model.patch_embed.patch_size[0]) * 2 ** (len(model.layers) - 1)


_WAYS: dict[str, Any] = {"build": _build, "size_step": _size_step, "shallow": {"depths": (2, 2, 2, 2)}}
TIMM_SWIN = Family(SwinTransformer, _layout, _blocks, swin_transformer.checkpoint_filter_fn, **_WAYS)
TIMM_SWIN_V2 = Family(SwinTransformerV2, _layout, _blocks, swin_transformer_v2.checkpoint_filter_fn, **_WAYS)
