"""A model in transformers' Trainer, on one batch that comes again at each step."""

from pathlib import Path
from typing import Any

import pytest
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


def trainer_of(model: nn.Module, batch: tuple[Tensor, Tensor], folder: Path, steps: int, **options: Any) -> Any:
    """Return a Trainer that neither clips nor saves; `options` are further TrainingArguments."""
    transformers = pytest.importorskip("transformers")
    arguments = {
        "max_steps": steps,
        "per_device_train_batch_size": len(batch[1]),
        "learning_rate": 1e-2,
        "max_grad_norm": 0,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **options,
    }
    return transformers.Trainer(
        model=WithLoss(model),
        args=transformers.TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=[{"pixel_values": x, "labels": y} for x, y in zip(*batch, strict=True)],
    )
