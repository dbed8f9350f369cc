"""A head on the class tokens of a model's last four blocks, as in DINOv2's linear evaluation (arXiv 2304.07193).

With x_i the class token after block i of L, and D its width, the logits are

    W [norm(x_(L-3)), ..., norm(x_L)] + b,    W: (classes, 4 D),

where norm is the model's last one. All else stays as timm has it: blocks, parameters and their names.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

HEAD_BLOCKS = 4


class _ReadsLastBlocks:
    """Mixin before a class of timm."""

    def forward(self: Any, images: Tensor) -> Tensor:
        """Return logits (B, classes) of normalised images (B, 3, S, S)."""
        blocks = self.forward_intermediates(
            images, indices=HEAD_BLOCKS, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        tokens = torch.stack([prefix[:, 0] for _, prefix in blocks], dim=1)  # (B, 4, D)
        logits: Tensor = self.head(self.norm(tokens).flatten(1))  # (B, 4 D) -> (B, classes)
        return logits


class VitOnLastBlocks(_ReadsLastBlocks, VisionTransformer):  # type: ignore[misc]
    """timm's VisionTransformer with such a head."""


class EvaOnLastBlocks(_ReadsLastBlocks, Eva):  # type: ignore[misc]
    """timm's Eva with such a head."""


_CLASSES: dict[type, type] = {VisionTransformer: VitOnLastBlocks, Eva: EvaOnLastBlocks}


def can_read_last_blocks(model: Any) -> bool:
    """Tell whether a model is of a class that can have such a head, and its own head reads the class token alone."""
    if type(model) not in _CLASSES or len(model.blocks) < HEAD_BLOCKS:
        return False
    return model.cls_token is not None and model.global_pool == "token" and isinstance(model.fc_norm, nn.Identity)


def read_last_blocks(model: Any) -> nn.Module:
    """Give a model that can have it such a head, in place."""
    model.head = nn.Linear(HEAD_BLOCKS * model.head.in_features, model.head.out_features)
    model.__class__ = _CLASSES[type(model)]
    changed: nn.Module = model
    return changed


def reads_last_blocks(model: nn.Module) -> bool:
    """Tell whether a model has such a head."""
    return isinstance(model, _ReadsLastBlocks)
