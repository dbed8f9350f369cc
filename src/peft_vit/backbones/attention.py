"""Which of timm's two ways through attention is the faster one where a model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_vit.backbones.sites import tokens_per_image

_SHORT = 200  # tokens


def choose_attention(model: nn.Module, device: torch.device) -> bool:
    """Let short sequences on a CPU go through plain matrix products; say whether they do.

    torch's fused attention saves memory that grows with the square of the tokens. A few dozen tokens leave none to
    save, and its backward pass on CPUs costs more than the products do: see `attention` in benchmarks/. Both compute
    softmax(q k^T / sqrt(d)) v; they round differently.

    Args:
        model: a timm VisionTransformer, changed in place.
        device: where it will run.
    """
    if device.type != "cpu" or tokens_per_image(model) > _SHORT:
        return False
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "fused_attn")]
    for layer in layers:
        layer.fused_attn = False
    return bool(layers)
