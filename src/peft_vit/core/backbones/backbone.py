"""A model, and what the package asks of any Vision Transformer: its sites, head, blocks, features and input size."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peft_vit.base.errors import UserError
from peft_vit.core.backbones.families import Family, family_of
from peft_vit.core.backbones.passes import capturing_inputs, evaluating
from peft_vit.core.backbones.site import LinearLayout, Site, select_sites
from peft_vit.core.config import Precision

_KNOWN = (
    "model of timm; one of transformers has to come from load_backbone(BackboneConfig(library='transformers', ...))"
)
_CLASS_TOKENS = {"cls_token", "class_token", "class_embedding"}  # as libraries call it
_SHORT = 300  # tokens, for `choose_attention`; 224 px in patches of 14 are 257, with registers 261
# What one pass has counted, by input size and module; it goes with its model.
_tokens: WeakKeyDictionary[nn.Module, dict[tuple[int, int, int], dict[str, int]]] = WeakKeyDictionary()


class AveragedHeads(nn.Module):
    """Several linear layers, each with features of its own, as one layer on all these features side by side.

    A distilled DeiT (arXiv 2012.12877, sec. 4) has one on its class token and one on its distillation token. With n
    layers the logits are sum_i (W_i x_i + b_i) / n.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.in_features = sum(layer.in_features for layer in layers)
        self.out_features = layers[0].out_features

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., sum of the layers' inputs) to (..., classes)."""
        parts = features.split([layer.in_features for layer in linear_layers(self)], dim=-1)
        logits = [layer(part) for layer, part in zip(self.layers, parts, strict=True)]
        return torch.stack(logits).mean(0)


Head: TypeAlias = nn.Linear | AveragedHeads


def linear_layers(head: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a head, one or several."""
    return [module for module in head.modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def fill_head(head: Head, weight: Tensor, bias: Tensor) -> None:
    """Let a head compute weight @ features + bias.

    Args:
        head: changed in place.
        weight: (classes, features).
        bias: (classes,).
    """
    layers = linear_layers(head)
    parts = weight.split([layer.in_features for layer in layers], dim=1)
    for layer, part in zip(layers, parts, strict=True):
        layer.weight.copy_(part * len(layers))
        layer.bias.copy_(bias)


@torch.no_grad()
def apply_temperature(head: Head, factor: float) -> None:
    """Divide the logits of a head by a factor, in place."""
    for layer in linear_layers(head):
        layer.weight.div_(factor)
        layer.bias.div_(factor)


class Backbone:
    """A view of a model. What finding its sites may change is how timm adds a bias, see `prepare`.

    Args:
        model: of a class that one of the families knows, with adapters or without.

    Raises:
        UserError: if the model is of another class.
    """

    def __init__(self, model: nn.Module) -> None:
        family = family_of(model)
        if family is None:
            raise UserError(f"{type(model).__name__} is not a {_KNOWN}")
        self.model = model
        self.family: Family = family

    @classmethod
    def within(cls, model: nn.Module) -> Backbone:
        """Return the view of the model of a known class that a model is, or wraps."""
        for module in model.modules():
            if family_of(module) is not None:
                return cls(module)
        raise UserError(f"{type(model).__name__} holds no {_KNOWN}")

    @property
    def heads(self) -> dict[str, nn.Linear]:
        """Return the linear layers that make logits, by name; none if the model has no head."""
        model: Any = self.model
        classifier = model.get_classifier()
        layers = classifier if isinstance(classifier, tuple | list | nn.ModuleList) else (classifier,)
        linears = {layer for layer in layers if isinstance(layer, nn.Linear)}
        return {name: layer for name, layer in self.model.named_modules() if layer in linears}

    @property
    def head(self) -> Head:
        """Return the classification head.

        Raises:
            UserError: if the model has none.
        """
        layers = list(self.heads.values())
        if not layers:
            message = "the model has no linear classification head; create it with num_classes"
            raise UserError(message, field="num_classes")
        return layers[0] if len(layers) == 1 else AveragedHeads(layers)

    def of_head(self, parameters: Iterable[str]) -> set[str]:
        """Return which of some parameters, by their names, are the head's."""
        prefixes = tuple(f"{name}." for name in self.heads)  # once: it looks through all modules
        return {parameter for parameter in parameters if parameter.startswith(prefixes)}

    @property
    def blocks(self) -> list[str]:
        """Return the names of the blocks, in the order of a forward pass."""
        return self.family.blocks(self.model)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Return channels, height and width of an image, in pixels."""
        return self.family.input_size(self.model)

    def features(self, images: Tensor) -> Tensor:
        """Return what the head sees, (B, width), of normalised images (B, 3, S, S); of several layers side by side.

        If the model makes other passes within its own, what counts is the head's last call. Other threads may do so
        at the same time.
        """
        layers = {str(place): layer for place, layer in enumerate(linear_layers(self.head))}
        _, inputs = self._watched(images, layers)
        return torch.cat([inputs[place] for place in layers], dim=-1)

    def logits_and_middle(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, classes) and features that show images of another kind, (B, D), of normalised images (B, 3,
        S, S).

        That is what comes to the middle block: the class token, or the tokens' mean where there is none. There images
        of other kinds lie farther from those of training than in front of the head, whose features leave out whatever
        does not tell pretraining's classes (docs/explanation/probabilities.md).
        """
        name = self.blocks[len(self.blocks) // 2]
        logits, inputs = self._watched(images, {name: self.model.get_submodule(name)})
        tokens = inputs[name]  # (B, T, D), or (B, H, W, D)
        known = {name.rpartition(".")[2] for name, _ in self.model.named_parameters()}
        if tokens.ndim == 3 and known & _CLASS_TOKENS:
            count = tokens.shape[1]
            if math.isqrt(count) ** 2 != count:  # more than the patches of a square
                return logits, tokens[:, 0]
        return logits, tokens.flatten(1, -2).mean(1)

    def _watched(self, images: Tensor, modules: Mapping[str, nn.Module]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the model's output, and what came to each of some modules, at its last call."""
        inputs: dict[str, Tensor] = {}
        thread = threading.get_ident()

        def record(name: str, x: Tensor) -> None:
            if threading.get_ident() == thread:
                inputs[name] = x

        with capturing_inputs(modules, record):
            output: Tensor = self.model(images)
        return output, inputs

    def prepare(self) -> bool:
        """Make the model compute each matrix by its module, so that what is there instead has an effect.

        Returns:
            Whether timm builds such a model otherwise.
        """
        return self.family.prepare(self.model)

    def layout(self) -> list[LinearLayout]:
        """Return the linear modules that may carry adapters, block by block."""
        return self.family.layout(self.model)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Return all target modules, block by block; tokens are counted in a forward pass of one image.

        Modules are read by their `in_features` and `out_features`, so replacing Linear layers by adapted ones
        leaves the target modules as they are.

        Raises:
            UserError: if a block lacks a matrix.
        """
        sites = [site for linear in self.layout() for site in self._sites_of(linear)]
        tokens = self._count_tokens(dict.fromkeys(site.module for site in sites))
        return tuple(replace(site, tokens=tokens[site.module]) for site in sites)

    def _sites_of(self, linear: LinearLayout) -> Iterator[Site]:
        """Yield the sites of a module, whose tokens are still to be counted."""
        names = linear.site_names()
        try:
            layer: Any = self.model.get_submodule(linear.module)
            in_features, out_features = int(layer.in_features), int(layer.out_features)
        except (AttributeError, TypeError):
            raise _missing(names[0], f"there is no linear module {linear.module}") from None
        rows = linear.rows or (out_features // len(names),) * len(names)
        if sum(rows) != out_features:
            named = f"{', '.join(linear.kinds[:-1])} and {linear.kinds[-1]}"
            raise _missing(names[0], f"{linear.module} has {out_features} rows, not {named} of one size")
        for name, kind, size, stop in zip(names, linear.kinds, rows, itertools.accumulate(rows), strict=True):
            span = (stop - size, stop)
            yield Site(name, linear.module, span, linear.layer, kind, linear.role, in_features, size, tokens=0)

    def _count_tokens(self, modules: Mapping[str, object]) -> dict[str, int]:
        """Return how many tokens of one image pass through each module; counted once for a model and an image size."""
        tokens = _tokens.setdefault(self.model, {}).setdefault(self.input_size, {})
        if tokens.keys() >= modules.keys():
            return tokens
        self.prepare()  # or a hook would miss a module that timm goes past

        def count(name: str, x: Tensor) -> None:
            tokens[name] = x.numel() // x.shape[-1]  # (1, T, in), or windows of it (W, T / W, in)

        watched = {name: self.model.get_submodule(name) for name in modules}
        with capturing_inputs(watched, count), evaluating(self.model), torch.no_grad():
            self.model(torch.zeros(1, *self.input_size).to(next(self.model.parameters())))
        for name in modules:
            if name not in tokens:
                raise _missing(name, "no forward pass calls its module")
        return tokens


def find_sites(model: nn.Module, targets: Sequence[str] | None = None) -> tuple[Site, ...]:
    """List the target modules of a model, block by block, in the model's order.

    Args:
        model: a Vision Transformer.
        targets: the kinds of matrices wanted, or patterns of names, in any order; None, or the six of a plain block:
            all.

    Raises:
        UserError: if the model is of another class, a target is unknown, or a block lacks a matrix.
    """
    sites = Backbone(model).sites
    return sites if targets is None else tuple(select_sites(sites, targets))


def freeze_batch_norm(model: nn.Module) -> None:
    """Let BatchNorm, as some convolutional stems have it, compute with the statistics of pretraining, and keep them.

    No method here trains them: a frozen backbone is to stay what it was, and batches of fine-tuning are small. After a
    model's `train()` it has to be called again.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def choose_attention(model: nn.Module, device: torch.device, precision: Precision) -> bool:
    """Let short sequences in bfloat16 on a CPU go through plain matrix products; say whether they do.

    torch's fused attention saves memory that grows with the square of the tokens: of a ViT-S at 224 px 13 MB a block.
    In bfloat16 its two passes on CPUs take two to four times as long as the products, at any length: see `attention`
    in benchmarks/. (In float32 the two are close, and the fused one holds less.) Both compute
    softmax(q k^T / sqrt(d)) v; they round differently.
    """
    if device.type != "cpu" or precision != "bf16" or max(site.tokens for site in Backbone(model).sites) > _SHORT:
        return False
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "fused_attn")]
    for layer in layers:
        layer.fused_attn = False
    return bool(layers)


def _missing(site: str, reason: str) -> UserError:
    return UserError(f"this model has no module {site}: {reason}; choose a model with plain blocks")
