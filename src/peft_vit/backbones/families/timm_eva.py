"""timm's Eva: EVA-02, DINOv3, RoPE-ViT and other Vision Transformers with rotary position embeddings.

Blocks differ from VisionTransformer's in three ways. Query, key and value are fused or three modules. MLPs may be gated
(SwiGLU, arXiv 2002.05202), fc2(silu(gate(x)) * up(x)), with gate and up in two modules (fc1_g, fc1_x) or in one (fc1).
And a fused query, key and value may have its bias beside the module, which timm then adds in one product with the
module's weight, past whatever stands in the module's place: see `_prepare`.
"""

from __future__ import annotations

from typing import Any

from timm.layers import GluMlp, SwiGLU
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor, nn

from peft_vit.backbones.families.family import Family
from peft_vit.backbones.site import LinearLayout


def _layout(model: Any) -> list[LinearLayout]:
    linears = []
    for layer, block in enumerate(model.blocks):
        linears += _of_attention(f"blocks.{layer}.attn", layer, block.attn)
        linears += _of_mlp(f"blocks.{layer}.mlp", layer, block.mlp)
    return linears


def _of_attention(path: str, layer: int, attention: Any) -> list[LinearLayout]:
    """Return query, key and value, fused or not, and the output."""
    out = LinearLayout(f"{path}.proj", layer, ("out",), "attention")
    if attention.qkv is not None:
        return [LinearLayout(f"{path}.qkv", layer, ("query", "key", "value"), "attention"), out]
    parts = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    return [*(LinearLayout(f"{path}.{leaf}", layer, (kind,), "attention") for leaf, kind in parts.items()), out]


def _of_mlp(path: str, layer: int, mlp: Any) -> list[LinearLayout]:
    """Return the matrices of a gated MLP, its gate in a module of its own or fused, or of a plain one."""
    last = LinearLayout(f"{path}.fc2", layer, ("fc2",), "mlp")
    if isinstance(mlp, SwiGLU):
        parts = {"fc1_g": "gate", "fc1_x": "up"}
        return [*(LinearLayout(f"{path}.{leaf}", layer, (kind,), "mlp") for leaf, kind in parts.items()), last]
    if isinstance(mlp, GluMlp):
        kinds = ("up", "gate") if mlp.gate_last else ("gate", "up")
        return [LinearLayout(f"{path}.fc1", layer, kinds, "mlp"), last]
    return [LinearLayout(f"{path}.fc1", layer, ("fc1",), "mlp", feeds=f"{path}.fc2"), last]


def _blocks(model: Any) -> list[str]:
    return [f"blocks.{layer}" for layer in range(len(model.blocks))]


def _fit_weights(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Let timm rename other projects' tensors and resample the position embedding."""
    return checkpoint_filter_fn(tensors, model)


def _prepare(model: Any) -> bool:
    """Let timm add the bias of a fused query, key and value after the module's own forward pass.

    In one product with the module's weight it would go past an adapter, which then had no effect and no gradient. The
    two ways round differently.
    """
    fused = [block.attn for block in model.blocks if getattr(block.attn, "q_bias", None) is not None]
    for attention in fused:
        attention.qkv_bias_separate = True
    return bool(fused)


TIMM_EVA = Family(Eva, _layout, _blocks, _fit_weights, _prepare)
