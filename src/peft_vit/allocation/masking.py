"""Reversible pruning: triplets that lose are set to zero in place, keep receiving gradients, and may come back.

As published: the official AdaLoRA code and PEFT set lambda to zero at each allocation and let the optimiser move it
again until the next. The tensors are resized to what is left when the last decision is taken.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft_vit.adapters import Adapter, site_adapters


def strongest(scores: Tensor, count: int) -> Tensor:
    """Return which triplets have the highest scores (of equal ones the earlier), (rank,) bool, on the CPU."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[torch.argsort(scores.detach().cpu(), descending=True, stable=True)[:count]] = True
    return chosen


def silence_others(model: nn.Module, active: Mapping[str, Tensor]) -> None:
    """Set every triplet that is not active to zero: its lambda in the svd form, its column of B in the product form."""
    adapters = site_adapters(model)
    for name, chosen in active.items():
        _silence(adapters[name], ~chosen)


@torch.no_grad()
def _silence(adapter: Adapter, losers: Tensor) -> None:
    target = adapter.lora_B if adapter.lora_lambda is None else adapter.lora_lambda
    target.masked_fill_(losers.to(target.device), 0.0)  # of B (out, r) whole columns
