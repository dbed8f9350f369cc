"""How far an exported file of the tiny model is from the model that it was made of."""

from pathlib import Path

import torch
from torch import nn

from peft_vit.deployment import open_exported


def compared(model: nn.Module, file: Path, batch: int) -> tuple[float, float]:
    """Return the largest relative difference of the logits and the share of equal predictions."""
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model(images)
    found = open_exported(file).logits(images)
    same = (found.argmax(1) == expected.argmax(1)).float().mean()
    return float((found - expected).abs().max() / expected.abs().max()), float(same)
