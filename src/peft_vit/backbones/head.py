"""A model's classification head: one linear layer, or several whose logits are averaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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


def linear_layers(head: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a head, one or several."""
    return [module for module in head.modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def fill_head(head: nn.Module, weight: Tensor, bias: Tensor) -> None:
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


@contextmanager
def watched_head(head: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Gather what each layer of a head sees, (B, features), by layer and forward pass."""
    layers = linear_layers(head)
    seen: list[list[Tensor]] = [[] for _ in layers]
    handles = [
        layer.register_forward_pre_hook(lambda _, given, one=one: one.append(given[0].detach()))
        for layer, one in zip(layers, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
