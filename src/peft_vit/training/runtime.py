"""Where a model runs, and what images go through before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peft_vit.config import Precision


@dataclass(frozen=True)
class RuntimeConfig:
    """Where a model runs, and what images go through before it."""

    device: torch.device
    precision: Precision
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
