"""timm's VisionTransformer with plain blocks: ViT, DeiT, DINOv2 with and without registers."""

from __future__ import annotations

from typing import Any, cast

from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from peft_vit.backbones.families.family import Family
from peft_vit.backbones.site import LinearLayout


def _layout(model: Any) -> list[LinearLayout]:
    return [linear for layer, block in enumerate(_blocks(model)) for linear in _of_block(layer, block)]


def _of_block(layer: int, block: str) -> list[LinearLayout]:
    """Return fused query, key and value, the attention's output, and the two matrices of a plain MLP."""
    return [
        LinearLayout(f"{block}.attn.qkv", layer, ("query", "key", "value"), "attention"),
        LinearLayout(f"{block}.attn.proj", layer, ("out",), "attention"),
        LinearLayout(f"{block}.mlp.fc1", layer, ("fc1",), "mlp", feeds=f"{block}.mlp.fc2"),
        LinearLayout(f"{block}.mlp.fc2", layer, ("fc2",), "mlp"),
    ]


def _blocks(model: Any) -> list[str]:
    return [f"blocks.{layer}" for layer in range(len(model.blocks))]


def _fit_weights(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Let timm rename other projects' tensors and resample the position embedding."""
    return checkpoint_filter_fn(tensors, cast(VisionTransformer, model), adapt_layer_scale=True)


def _prepare(_: nn.Module) -> bool:
    """Do nothing: every matrix computes by its own module."""
    return False


TIMM_VIT = Family(VisionTransformer, _layout, _blocks, _fit_weights, _prepare)
