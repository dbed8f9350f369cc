"""Vision models of transformers: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, SigLIP 2, BEiT, Swin and more.

Their layers are found by a forward pass, see `by_tokens`; query, key and value are layers of their own. Here the models
map images to logits, as timm's do, and are otherwise transformers': names, state dicts and configurations stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_vit.backbones.families.by_tokens import BY_TOKENS
from peft_vit.backbones.families.family import Family


class TransformersModel(nn.Module):
    """Mixin before a class of transformers whose outputs hold logits of a layer named `classifier`."""

    config: Any
    pretrained_cfg: dict[str, Any]  # as timm has it: input_size, mean, std, interpolation

    def get_classifier(self) -> nn.Module:
        """Return the head, as timm's models do."""
        return self.get_submodule("classifier")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of normalised images (B, 3, S, S)."""
        outputs: Any = super().forward(**inputs(self, images))
        return outputs.logits


class TowerClassifier(TransformersModel):
    """A vision tower of transformers, which has no head, with a linear layer on its pooled output.

    Args:
        tower: returns a `pooler_output` (B, width).
        num_classes: outputs of the head.
    """

    base_model_prefix = "tower"  # transformers' word, which PEFT asks for

    def __init__(self, tower: Any, num_classes: int) -> None:
        super().__init__()
        self.tower = tower
        self.config = tower.config
        self.classifier = nn.Linear(tower.config.hidden_size, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of normalised images (B, 3, S, S)."""
        pooled: Tensor = self.tower(**inputs(self, images)).pooler_output  # (B, width)
        return self.classifier(pooled)


def vision_config(config: Any) -> Any:
    """Return the configuration of a model's vision part."""
    return getattr(config, "vision_config", config)


def inputs(model: Any, images: Tensor) -> dict[str, Any]:
    """Return what a model of transformers takes for square images (B, 3, S, S), resampling positions if it has to."""
    config = vision_config(model.config)
    if config.model_type.startswith("siglip2"):  # takes patches of images of any shape, with their grid
        patch, (count, channels, side) = config.patch_size, images.shape[:3]
        grid = side // patch
        patches = images.reshape(count, channels, grid, patch, grid, patch).permute(0, 2, 4, 3, 5, 1)
        shapes = torch.full((count, 2), grid, device="cpu")  # whose values are looked at
        return {
            "pixel_values": patches.reshape(count, grid * grid, -1),  # (B, T, P * P * 3)
            "pixel_attention_mask": None,  # all count
            "spatial_shapes": shapes,
        }
    resampled = {} if images.shape[-1] == side_of(config) else {"interpolate_pos_encoding": True}
    return {"pixel_values": images, **resampled}


def side_of(config: Any) -> int:
    """Return the side of the images that a vision part has a position embedding for, in pixels."""
    if hasattr(config, "num_patches"):  # of SigLIP 2, which names the places of its grid
        return int(config.num_patches**0.5) * int(config.patch_size)
    size = getattr(config, "image_size", 224)
    return int(size if isinstance(size, int) else size[0])


def _size_step(model: Any) -> int:
    """Return the side of a patch; with stages of what becomes one token of the last one."""
    config = vision_config(model.config)
    patch = getattr(config, "patch_size", 1)
    patch = patch if isinstance(patch, int) else patch[0]
    return int(patch * 2 ** (len(getattr(config, "depths", [1])) - 1))


TRANSFORMERS_VISION = Family(
    TransformersModel, fit_weights=lambda tensors, _: tensors, size_step=_size_step, **BY_TOKENS
)
