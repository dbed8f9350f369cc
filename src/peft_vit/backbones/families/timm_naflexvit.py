"""timm's NaFlexViT, which takes images of any shape. Here all have the square size that was asked for."""

from __future__ import annotations

from typing import Any

import timm
from timm.models.naflexvit import NaFlexVit, checkpoint_filter_fn
from torch import Tensor, nn

from peft_vit.backbones.families.by_tokens import noted_input_size
from peft_vit.backbones.families.family import Family
from peft_vit.backbones.families.timm_vit import row_layout, row_of_blocks


def _build(name: str, image_size: int, num_classes: int, **settings: Any) -> nn.Module:
    """Build a model, and note for which images: its weights are the same for all sizes."""
    model: Any = timm.create_model(name, num_classes=num_classes, **settings)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, image_size, image_size)}
    return model


def _fit_weights(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Let timm rename the tensors of plain Vision Transformers; the model resamples positions as it computes."""
    return checkpoint_filter_fn(tensors, model)


def _size_step(model: Any) -> int:
    return int(model.embeds.patch_size[0])


TIMM_NAFLEXVIT = Family(
    NaFlexVit, row_layout, row_of_blocks, _fit_weights, input_size=noted_input_size, build=_build, size_step=_size_step
)
