"""What timm's blocks are made of, whichever family stacks them: attention, MLP, pooling by attention.

MLPs may be gated (SwiGLU, arXiv 2002.05202), fc2(silu(gate(x)) * up(x)), with gate and up in two modules (fc1_g, fc1_x)
or in one (fc1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from timm.layers import GluMlp, SwiGLU
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, ParallelThingsBlock
from torch import nn

from peft_vit.backbones.site import LinearLayout

_QKV = ("query", "key", "value")


def linears_of_block(path: str, layer: int, block: Any) -> list[LinearLayout]:
    """Return the linear modules of a block that may carry adapters, in the block's order.

    Args:
        path: of the block in its model.
        layer: its number.
        block: of any of timm's classes with attention and an MLP.
    """
    if isinstance(block, ParallelScalingBlock | DiffParallelScalingBlock):
        return _of_scaled_parallel(path, layer, block)
    if isinstance(block, ParallelThingsBlock):
        return _of_branches(path, layer, block)
    return [*linears_of_attention(f"{path}.attn", layer, block.attn), *linears_of_mlp(f"{path}.mlp", layer, block.mlp)]


def linears_of_attention(path: str, layer: int, attention: Any) -> list[LinearLayout]:
    """Return query, key and value, fused or not, and the output."""
    out = LinearLayout(f"{path}.proj", layer, ("out",), "attention")
    if attention.qkv is not None:
        return [LinearLayout(f"{path}.qkv", layer, _QKV, "attention"), out]
    parts = zip(("q_proj", "k_proj", "v_proj"), _QKV, strict=True)
    return [*(LinearLayout(f"{path}.{leaf}", layer, (kind,), "attention") for leaf, kind in parts), out]


def linears_of_mlp(path: str, layer: int, mlp: Any) -> list[LinearLayout]:
    """Return the matrices of a gated MLP, its gate in a module of its own or fused, or of a plain one."""
    last = LinearLayout(f"{path}.fc2", layer, ("fc2",), "mlp")
    if isinstance(mlp, SwiGLU):
        parts = {"fc1_g": "gate", "fc1_x": "up"}
        return [*(LinearLayout(f"{path}.{leaf}", layer, (kind,), "mlp") for leaf, kind in parts.items()), last]
    if isinstance(mlp, GluMlp):
        kinds = ("up", "gate") if mlp.gate_last else ("gate", "up")
        return [LinearLayout(f"{path}.fc1", layer, kinds, "mlp"), last]
    return [LinearLayout(f"{path}.fc1", layer, ("fc1",), "mlp", feeds=f"{path}.fc2"), last]


def linears_of_pool(path: str, layer: int, pool: Any) -> list[LinearLayout]:
    """Return the matrices of pooling by attention: a learnt query for all images, keys and values of the tokens."""
    linears = [
        LinearLayout(f"{path}.q", layer, ("query",), "attention"),
        LinearLayout(f"{path}.kv", layer, ("key", "value"), "attention"),
        LinearLayout(f"{path}.proj", layer, ("out",), "attention"),
    ]
    return linears if pool.mlp is None else [*linears, *linears_of_mlp(f"{path}.mlp", layer, pool.mlp)]


def _of_scaled_parallel(path: str, layer: int, block: Any) -> list[LinearLayout]:
    """Return the matrices of ViT-22B's blocks (arXiv 2302.05442), whose attention and MLP share one input product."""
    first = LinearLayout(f"{path}.in_proj", layer, ("fc1", *_QKV), "other", rows=tuple(block.in_split))
    if block.out_proj is not None:  # of attention and MLP side by side
        return [first, LinearLayout(f"{path}.out_proj", layer, ("out",), "other")]
    out = LinearLayout(f"{path}.attn_out_proj", layer, ("out",), "attention")
    return [first, out, LinearLayout(f"{path}.mlp_out_proj", layer, ("fc2",), "mlp")]


def _of_branches(path: str, layer: int, block: Any) -> list[LinearLayout]:
    """Return the matrices of blocks of several attentions and MLPs side by side (arXiv 2203.09795)."""
    linears = []
    for branch, one in enumerate(block.attns):
        linears += _numbered(linears_of_attention(f"{path}.attns.{branch}.attn", layer, one.attn), branch)
    for branch, one in enumerate(block.ffns):
        linears += _numbered(linears_of_mlp(f"{path}.ffns.{branch}.mlp", layer, one.mlp), branch)
    return linears


def _numbered(linears: list[LinearLayout], branch: int) -> list[LinearLayout]:
    """Tell the matrices of later branches from the first one's: query, query_2."""
    if branch == 0:
        return linears
    return [replace(one, kinds=tuple(f"{kind}_{branch + 1}" for kind in one.kinds)) for one in linears]


def add_bias_apart(model: nn.Module) -> bool:
    """Let attention call a fused query, key and value, and add its bias after that; say whether timm does otherwise.

    Where the bias is no part of the module, timm adds it in one product with the module's weight, past whatever stands
    in the module's place: an adapter there had no effect and no gradient. The two ways round differently.
    """
    layers: list[Any] = [one for one in model.modules() if getattr(one, "q_bias", None) is not None]
    layers = [one for one in layers if getattr(one, "qkv", None) is not None]
    for attention in layers:
        attention.qkv_bias_separate = True
    return bool(layers)
