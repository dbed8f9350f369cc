"""A model as transformers' Trainer wants it."""

import torch
from torch.nn import functional as F


class WithLoss(torch.nn.Module):
    """Returns the loss beside the logits."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels):
        logits = self.model(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}
