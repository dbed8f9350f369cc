"""timm's Hiera: stages of blocks in one row; the first block of a stage widens the tokens and pools its queries.

Where the width changes, the block's shortcut has a matrix of its own.
"""

from __future__ import annotations

from typing import Any

from timm.layers import resample_abs_pos_embed
from timm.models.hiera import Hiera, checkpoint_filter_fn
from torch import Tensor

from peft_vit.backbones.families.family import Family, image_channels
from peft_vit.backbones.families.timm_blocks import linears_of_block
from peft_vit.backbones.families.timm_vit import row_of_blocks
from peft_vit.backbones.site import LinearLayout


def _layout(model: Any) -> list[LinearLayout]:
    linears: list[LinearLayout] = []
    for layer, (path, block) in enumerate(zip(row_of_blocks(model), model.blocks, strict=True)):
        linears += linears_of_block(path, layer, block)
        if block.proj is not None:
            linears.append(LinearLayout(f"{path}.proj", layer, ("shortcut",), "other"))
    return linears


def _input_size(model: Any) -> tuple[int, int, int]:
    height, width = (
        tokens * stride for tokens, stride in zip(model.tokens_spatial_shape, model.patch_stride, strict=True)
    )
    return image_channels(model.patch_embed), height, width


def _fit_weights(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Resample the position embedding, which timm leaves as it is."""
    fitted = checkpoint_filter_fn(tensors, model)
    known = fitted.get("pos_embed")
    if known is not None and "pos_embed_win" not in fitted and known.shape != model.pos_embed.shape:
        fitted["pos_embed"] = resample_abs_pos_embed(known, model.tokens_spatial_shape, num_prefix_tokens=0)
    return fitted


def _size_step(model: Any) -> int:
    """Return the side of a mask unit, within which blocks of early stages attend."""
    return int(model.patch_stride[0] * model.mask_unit_size[0])


TIMM_HIERA = Family(
    Hiera,
    _layout,
    row_of_blocks,
    _fit_weights,
    input_size=_input_size,
    size_step=_size_step,
    shallow={"stages": (2, 2, 2, 2)},
)
