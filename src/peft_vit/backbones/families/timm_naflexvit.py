"""timm's NaFlexViT, which takes images of any shape. Here all have the square size that was asked for."""

from __future__ import annotations

from typing import Any

from timm.models.naflexvit import NaFlexVit, checkpoint_filter_fn

from peft_vit.backbones.families.family import Family
from peft_vit.backbones.families.timm_vit import row_layout, row_of_blocks


def _input_size(model: Any) -> tuple[int, int, int]:
    channels, height, width = model.pretrained_cfg["input_size"]
    return channels, height, width


TIMM_NAFLEXVIT = Family(NaFlexVit, row_layout, row_of_blocks, checkpoint_filter_fn, input_size=_input_size)
