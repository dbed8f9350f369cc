"""timm's classes whose matrices are known by name, and what their blocks are made of.

- VisionTransformer: ViT, DeiT, DINO, DINOv2 with and without registers, CLIP, SigLIP, AIMv2, TIPSv2. Some models pool
  their tokens by attention, which counts as one more block.
- VisionTransformerDistilled: DeiT with a second token and a head on each, whose logits are averaged.
- Eva: EVA-02, DINOv3, PE, RoPE-ViT, Sapiens 2 and others with rotary position embeddings. Query, key and value are
  fused or three modules, and MLPs may be gated.
- Beit: BEiT and BEiT v2, whose blocks hold relative position biases. They have a window per image size.
- Swin and Swin V2: attention within windows, and a matrix between stages that merges patches and counts as part of the
  block before it. Tokens differ from stage to stage. The small network of Swin V2 that makes position biases sees no
  tokens and carries no adapter.
- Hiera: stages of blocks in one row; the first block of a stage widens the tokens and pools its queries. Where the
  width changes, the block's shortcut has a matrix of its own.
- NaFlexViT, which takes images of any shape. Here all have the square size that was asked for.

MLPs may be gated (SwiGLU, arXiv 2002.05202), fc2(silu(gate(x)) * up(x)), with gate and up in two modules (fc1_g, fc1_x)
or in one (fc1).
"""

from __future__ import annotations

from typing import Any, cast

import timm
from timm.layers import AttentionPoolLatent, GluMlp, SwiGLU, resample_abs_pos_embed
from timm.models import beit, eva, hiera, naflexvit, swin_transformer, swin_transformer_v2
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    VisionTransformer,
    checkpoint_filter_fn,
)
from torch import Tensor, nn

from peft_vit.core.backbones.families.family import Family, image_channels, noted_input_size
from peft_vit.core.backbones.site import LinearLayout

_QKV = ("query", "key", "value")
POOL = "attn_pool"
_ALIGNED_RADIO = ("base_patch16_radio_v3", "huge_patch16_radio_v3")  # timm 1.0.31, _create_vision_transformer


# --- what blocks are made of ---


def linears_of_block(path: str, layer: int, block: Any) -> list[LinearLayout]:
    """Return the linear modules of a block that may carry adapters, in the block's order.

    Args:
        path: of the block in its model.
        layer: its number.
        block: of any of timm's classes with attention and an MLP.
    """
    if isinstance(block, ParallelScalingBlock | DiffParallelScalingBlock):
        # ViT-22B's (arXiv 2302.05442), whose attention and MLP share one input product
        first = LinearLayout(f"{path}.in_proj", layer, ("fc1", *_QKV), "other", rows=tuple(block.in_split))
        if block.out_proj is not None:  # of attention and MLP side by side
            return [first, LinearLayout(f"{path}.out_proj", layer, ("out",), "other")]
        out = LinearLayout(f"{path}.attn_out_proj", layer, ("out",), "attention")
        return [first, out, LinearLayout(f"{path}.mlp_out_proj", layer, ("fc2",), "mlp")]
    linears = [*_of_attention(f"{path}.attn", layer, block.attn), *_of_mlp(f"{path}.mlp", layer, block.mlp)]
    if isinstance(block, hiera.HieraBlock) and block.proj is not None:
        linears.append(LinearLayout(f"{path}.proj", layer, ("shortcut",), "other"))
    return linears


def _of_attention(path: str, layer: int, attention: Any) -> list[LinearLayout]:
    """Return query, key and value, fused or not, and the output."""
    out = LinearLayout(f"{path}.proj", layer, ("out",), "attention")
    if attention.qkv is not None:
        return [LinearLayout(f"{path}.qkv", layer, _QKV, "attention"), out]
    parts = zip(("q_proj", "k_proj", "v_proj"), _QKV, strict=True)
    return [*(LinearLayout(f"{path}.{leaf}", layer, (kind,), "attention") for leaf, kind in parts), out]


def _of_mlp(path: str, layer: int, mlp: Any) -> list[LinearLayout]:
    """Return the matrices of a gated MLP, its gate in a module of its own or fused, or of a plain one."""
    last = LinearLayout(f"{path}.fc2", layer, ("fc2",), "mlp")
    if isinstance(mlp, SwiGLU):
        gate = LinearLayout(f"{path}.fc1_g", layer, ("gate",), "mlp")
        return [gate, LinearLayout(f"{path}.fc1_x", layer, ("up",), "mlp"), last]
    if isinstance(mlp, GluMlp):
        kinds = ("up", "gate") if mlp.gate_last else ("gate", "up")
        return [LinearLayout(f"{path}.fc1", layer, kinds, "mlp"), last]
    return [LinearLayout(f"{path}.fc1", layer, ("fc1",), "mlp"), last]


# --- blocks in one row ---


def row_layout(model: Any) -> list[LinearLayout]:
    """Return the linear modules of blocks in one row, and of pooling by attention."""
    linears: list[LinearLayout] = []
    for layer, block in enumerate(model.blocks):
        linears += linears_of_block(f"blocks.{layer}", layer, block)
    if _has_pool(model):  # a learnt query for all images, keys and values of the tokens
        layer, pool = len(model.blocks), model.attn_pool
        linears += [
            LinearLayout(f"{POOL}.q", layer, ("query",), "attention"),
            LinearLayout(f"{POOL}.kv", layer, ("key", "value"), "attention"),
            LinearLayout(f"{POOL}.proj", layer, ("out",), "attention"),
            *([] if pool.mlp is None else _of_mlp(f"{POOL}.mlp", layer, pool.mlp)),
        ]
    return linears


def row_of_blocks(model: Any) -> list[str]:
    """Return the names of blocks in one row, and of pooling by attention."""
    names = [f"blocks.{layer}" for layer in range(len(model.blocks))]
    return [*names, POOL] if _has_pool(model) else names


def _has_pool(model: Any) -> bool:
    return isinstance(getattr(model, POOL, None), AttentionPoolLatent)


def _fit_vit(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Let timm rename other projects' tensors and resample positions, as it does for each architecture."""
    architecture = str(model.pretrained_cfg.get("architecture", ""))
    options: dict[str, Any] = {}
    if "flexi" in architecture or "radio" in architecture:
        options = {"interpolation": "bilinear", "antialias": False}
    if "radio" in architecture:
        options["align_corners"] = any(name in architecture for name in _ALIGNED_RADIO)
    return checkpoint_filter_fn(tensors, cast(VisionTransformer, model), adapt_layer_scale=True, **options)


def _build_naflexvit(name: str, image_size: int, num_classes: int) -> nn.Module:
    """Build a model, and note for which images: its weights are the same for all sizes."""
    model: Any = timm.create_model(name, num_classes=num_classes)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, image_size, image_size)}
    return model


# --- Swin ---


def _swin_layout(model: Any) -> list[LinearLayout]:
    linears: list[LinearLayout] = []
    for layer, name in enumerate(_swin_blocks(model)):
        stage, _, place = name.rpartition(".blocks.")
        if place == "0" and hasattr(model.get_submodule(stage).downsample, "reduction"):
            linears.append(LinearLayout(f"{stage}.downsample.reduction", layer - 1, ("reduction",), "other"))
        linears += linears_of_block(name, layer, model.get_submodule(name))
    return linears


def _swin_blocks(model: Any) -> list[str]:
    return [f"layers.{n}.blocks.{place}" for n, stage in enumerate(model.layers) for place in range(len(stage.blocks))]


def _build_swin(name: str, image_size: int, num_classes: int) -> Any:
    """Build a model whose windows grow and shrink with the image, so that none is filled up with nothing."""
    model: Any = timm.create_model(name, num_classes=num_classes)
    if image_size != model.patch_embed.img_size[0]:
        model.set_input_size(image_size)
    return model


# --- Hiera ---


def _hiera_input_size(model: Any) -> tuple[int, int, int]:
    height, width = (
        tokens * stride for tokens, stride in zip(model.tokens_spatial_shape, model.patch_stride, strict=True)
    )
    return image_channels(model.patch_embed), height, width


def _fit_hiera(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Resample the position embedding, which timm leaves as it is."""
    fitted = hiera.checkpoint_filter_fn(tensors, model)
    known = fitted.get("pos_embed")  # (1, T, D)
    if known is not None and "pos_embed_win" not in fitted and known.shape != model.pos_embed.shape:
        fitted["pos_embed"] = resample_abs_pos_embed(known, model.tokens_spatial_shape, num_prefix_tokens=0)
    return fitted


_SWIN: dict[str, Any] = {
    "build": _build_swin,
    # The side of an image of which the last stage has one token: multiples of it fill all windows.
    "size_step": lambda model: int(model.patch_embed.patch_size[0]) * 2 ** (len(model.layers) - 1),
}
# A class stands before the one that it derives from.
TIMM_FAMILIES = (
    Family(VisionTransformerDistilled, row_layout, row_of_blocks, _fit_vit),
    Family(VisionTransformer, row_layout, row_of_blocks, _fit_vit),
    Family(eva.Eva, row_layout, row_of_blocks, eva.checkpoint_filter_fn),
    Family(beit.Beit, row_layout, row_of_blocks, beit.checkpoint_filter_fn),
    Family(
        swin_transformer.SwinTransformer, _swin_layout, _swin_blocks, swin_transformer.checkpoint_filter_fn, **_SWIN
    ),
    Family(
        swin_transformer_v2.SwinTransformerV2,
        _swin_layout,
        _swin_blocks,
        swin_transformer_v2.checkpoint_filter_fn,
        **_SWIN,
    ),
    Family(
        hiera.Hiera,
        row_layout,
        row_of_blocks,
        _fit_hiera,
        input_size=_hiera_input_size,
        # The side of a mask unit, within which blocks of early stages attend.
        size_step=lambda model: int(cast(Any, model).patch_stride[0] * cast(Any, model).mask_unit_size[0]),
    ),
    Family(
        naflexvit.NaFlexVit,
        row_layout,
        row_of_blocks,
        lambda tensors, model: naflexvit.checkpoint_filter_fn(tensors, cast(Any, model)),
        input_size=noted_input_size,
        build=_build_naflexvit,
        size_step=lambda model: int(cast(Any, model).embeds.patch_size[0]),
    ),
)
