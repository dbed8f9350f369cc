"""A model as transformers' Trainer wants it."""

from torch import Tensor, nn
from torch.nn import functional as F


class WithLoss(nn.Module):
    """Returns the loss beside the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}
