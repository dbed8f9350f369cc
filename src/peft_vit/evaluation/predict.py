"""Logits of a model over batches, without gradients."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_vit.config import Precision


@torch.inference_mode()
def predict(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device, precision: Precision
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return logits (N, classes) and labels (N,) over all batches, in their order."""
    was_training = model.training
    model.eval()
    logits, labels = [], []
    for images, targets in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = model(images.to(device))
        logits.append(output.float().cpu().numpy())
        labels.append(targets.numpy())
    model.train(was_training)
    return np.concatenate(logits), np.concatenate(labels)
