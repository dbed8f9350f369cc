"""Methods without settings: the linear probe, a head on features of the frozen backbone, and full fine-tuning.

How a probe is fitted is told in `training.linear_probe`.
"""

from __future__ import annotations

from torch import nn

from peft_vit.adapters import freeze_backbone
from peft_vit.config import ExperimentConfig
from peft_vit.methods.method import Method, PrepareContext
from peft_vit.training import Hook


def _freeze(model: nn.Module, experiment: ExperimentConfig, context: PrepareContext) -> list[Hook]:
    freeze_backbone(model)
    return []


LINEAR = Method(prepare=_freeze, forward_passes=1, bytes_per_weight=4)
FULL = Method(
    learning_rate=2e-5,
    forward_passes=3,
    bytes_per_weight=16,
    why_not_peft="full fine-tuning changes every weight, so there is no adapter to export",
)
