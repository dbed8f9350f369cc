"""The task loss: cross entropy, with class weights where a study asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # of logits (N, classes) and labels (N,)


def class_weights(labels: np.ndarray, classes: int) -> Tensor:
    """Return n / (classes * n_c) for each class c, (classes,); over the images they average to 1."""
    counts = np.bincount(labels, minlength=classes)  # (N,) -> (classes,)
    return torch.tensor(len(labels) / (classes * counts), dtype=torch.float32)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Return sum_n w[y_n] l_n / N, with l_n the cross entropy of image n; plain cross entropy without weights.

    torch's weighted mean divides by the batch's own weights, sum_n w[y_n], in place of N: in a batch of one the weight
    cancels, and an image counts the less the more its batch weighs. Divided by N, an image's weight is the same in any
    batch.

    Args:
        logits: (N, classes).
        labels: (N,) int64.
        weights: (classes,), see `class_weights`, or None.
    """
    if weights is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, weight=weights, reduction="sum") / len(labels)
