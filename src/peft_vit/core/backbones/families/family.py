"""Which model is meant, and what the package has to know of its class to adapt it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
from torch import Tensor, nn

from peft_vit.core.backbones.site import LinearLayout
from peft_vit.core.config import HeadBlocks, Library


@dataclass(frozen=True)
class Architecture:
    """Which model, in whose library: what one without weights is built from.

    Attributes:
        library: timm or transformers.
        name: timm's, or of transformers the hub's name, a folder, or a type of models; for people then.
        config: of transformers, as JSON, see `transformers_models`; timm's models follow from their name.
        config_sha256: of the files that config was read from; None: of none.
        head_blocks: of how many of the last blocks the head reads the class tokens, see `head_blocks`.
    """

    library: Library
    name: str
    config: str | None = None
    config_sha256: str | None = None
    head_blocks: HeadBlocks = 1


def input_of_patches(model: Any) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a model's patch embedding takes."""
    height, width = model.patch_embed.img_size
    return image_channels(model.patch_embed), int(height), int(width)


def noted_input_size(model: Any) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a model was built for, as its `pretrained_cfg` says."""
    channels, height, width = model.pretrained_cfg["input_size"]
    return int(channels), int(height), int(width)


def image_channels(stem: nn.Module) -> int:
    """Return the channels that the first convolution of a model takes."""
    return next(module.in_channels for module in stem.modules() if isinstance(module, nn.Conv2d))


def build(name: str, image_size: int, num_classes: int) -> nn.Module:
    """Build a model for images of a size, as timm initialises it."""
    return timm.create_model(name, img_size=image_size, num_classes=num_classes)


def patch_size(model: Any) -> int:
    """Return the side of a model's patches, in pixels; with a convolutional stem, of what becomes a token."""
    return int(model.patch_embed.feat_ratio())


def add_bias_apart(model: nn.Module) -> bool:
    """Let attention call a fused query, key and value, and add its bias after that; say whether timm does otherwise.

    Where the bias is not a part of the module, timm adds it in one product with the module's weight, past whatever
    stands in the module's place: an adapter there had no effect and no gradient. The two ways round differently.
    """
    apart = False
    for module in model.modules():
        if getattr(module, "q_bias", None) is not None and getattr(module, "qkv", None) is not None:
            module.qkv_bias_separate = True  # type: ignore[assignment]
            apart = True
    return apart


@dataclass(frozen=True)
class Family:
    """A class of models whose blocks hold their matrices in one way.

    Attributes:
        model_class: of the models.
        layout: lists the linear modules of a model that may carry adapters, block by block, in the model's order.
        blocks: names the blocks of a model, in the order in which a forward pass calls them.
        fit_weights: takes the tensors of a checkpoint to a model's own names and image size.
        prepare: makes a model compute each matrix by the forward pass of its module, where an adapter can be; says
            whether timm builds such a model otherwise.
        input_size: channels, height and width of an image, in pixels.
        build: makes a model of a name for images of a side, in pixels, with so many classes.
        in_turn: the blocks are called one after the other, each with what the one before has returned.
        size_step: what the side of an image has to be a multiple of, in pixels.
        sizes_are_tried: other sides may do too, and a forward pass shows it; those of `size_step` do in any case.
    """

    model_class: type[nn.Module]
    layout: Callable[[nn.Module], list[LinearLayout]]
    blocks: Callable[[nn.Module], list[str]]
    fit_weights: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]
    prepare: Callable[[nn.Module], bool] = add_bias_apart
    input_size: Callable[[nn.Module], tuple[int, int, int]] = input_of_patches
    build: Callable[[str, int, int], nn.Module] = build
    size_step: Callable[[nn.Module], int] = patch_size
    sizes_are_tried: bool = False

    in_turn: bool = True
