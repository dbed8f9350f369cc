"""A model's classification head: one linear layer, or several whose logits are averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from peft_vit.backbones.watching import watching


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
def soften(head: Head, factor: float) -> None:
    """Divide the logits of a head by a factor, in place."""
    for layer in linear_layers(head):
        layer.weight.div_(factor)
        layer.bias.div_(factor)


def head_inputs(head: nn.Module, run: Callable[[], object]) -> Tensor:
    """Run a forward pass, and return what the layers of a head saw in it, side by side: (B, features).

    If other passes are run within it, what counts is the head's last call.
    """
    layers = linear_layers(head)
    seen: dict[str, Tensor] = {}
    with watching({str(place): layer for place, layer in enumerate(layers)}, seen.__setitem__):
        run()
    return torch.cat([seen[str(place)] for place in range(len(layers))], dim=-1)
