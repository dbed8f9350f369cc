"""timm's NaFlexViT, which takes images of any shape. Here all have the square size that was asked for."""

from __future__ import annotations

from typing import Any

from timm.models.naflexvit import NaFlexVit, checkpoint_filter_fn
from torch import Tensor

from peft_vit.backbones.families.family import Family
from peft_vit.backbones.families.timm_vit import row_layout, row_of_blocks


def _input_size(model: Any) -> tuple[int, int, int]:
    height, width = model.embeds.default_img_size or model.pretrained_cfg["input_size"][1:]
    return int(model.embeds.in_chans), int(height), int(width)


def _fit_weights(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Let timm rename the tensors of plain Vision Transformers; the model resamples positions as it computes."""
    return checkpoint_filter_fn(tensors, model)


def _size_step(model: Any) -> int:
    return int(model.embeds.patch_size[0])


TIMM_NAFLEXVIT = Family(
    NaFlexVit, row_layout, row_of_blocks, _fit_weights, input_size=_input_size, size_step=_size_step
)
