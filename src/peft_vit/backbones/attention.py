"""Which of timm's two ways through attention is the faster one where a model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_vit.backbones.backbone import Backbone
from peft_vit.config import Precision

_SHORT = 200  # tokens


def choose_attention(model: nn.Module, device: torch.device, precision: Precision) -> bool:
    """Let short sequences in bfloat16 on a CPU go through plain matrix products; say whether they do.

    torch's fused attention saves memory that grows with the square of the tokens. Some dozen tokens leave little to
    save, and in bfloat16 its backward pass on CPUs costs several times what the products do: see `attention` in
    benchmarks/. (In float32 the two are close, and the fused one holds less.) Both compute
    softmax(q k^T / sqrt(d)) v; they round differently.
    """
    if device.type != "cpu" or precision != "bf16" or max(site.tokens for site in Backbone(model).sites) > _SHORT:
        return False
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "fused_attn")]
    for layer in layers:
        layer.fused_attn = False
    return bool(layers)
