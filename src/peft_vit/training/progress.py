"""What a watcher is told after each step, read off the live model; no method is known here by name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peft_vit.adapters import adapted_modules, site_adapters
from peft_vit.adapters.peft_layers import peft_layers, peft_ranks
from peft_vit.training.training_state import TrainingResult


@dataclass(frozen=True)
class Progress:
    """What a watcher is told after each step.

    Attributes:
        step: done so far.
        total_steps: of the run.
        loss: of this step's batch, without penalties.
        validation_accuracy: at the latest validation; None before the first.
        mean_rank: over the adapted sites; None without any.
        mean_bits: stored bits a weight of the quantized layers, scales, offsets and, as long as the schedule keeps it,
            the float weight included; None without any.
    """

    step: int
    total_steps: int
    loss: float
    validation_accuracy: float | None
    mean_rank: float | None = None
    mean_bits: float | None = None


class Gauges:
    """Ranks and bits of a model that is ready to be trained; what does not move is looked up once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._adapters = list(site_adapters(model).values())
        self._masked_by_peft = bool(peft_layers(model)) and not self._adapters
        self._quantized = [layer for _, layer in adapted_modules(model) if layer.quantized is not None]
        self._weights = sum(layer.in_features * layer.out_features for layer in self._quantized)
        self._packed_bytes = sum(layer.quantized.nbytes for layer in self._quantized if layer.quantized is not None)

    def progress(self, result: TrainingResult, total_steps: int) -> Progress:
        """Return what a watcher is told after the last step of a training."""
        return Progress(
            step=len(result.steps),
            total_steps=total_steps,
            loss=result.steps[-1].loss,
            validation_accuracy=result.evaluations[-1].metrics.accuracy if result.evaluations else None,
            mean_rank=self.mean_rank(),
            mean_bits=self.mean_bits(),
        )

    def mean_rank(self) -> float | None:
        """Return the mean rank over the adapted sites now; PEFT's AdaLoRA only masks triplets, so masks are counted."""
        ranks = [adapter.rank for adapter in self._adapters]
        if self._masked_by_peft:
            ranks = list(peft_ranks(self._model).values())
        return sum(ranks) / len(ranks) if ranks else None

    def mean_bits(self) -> float | None:
        """Return the stored bits a weight of the quantized layers now."""
        if not self._quantized:
            return None
        floats = sum(layer.weight.nbytes for layer in self._quantized if layer.weight is not None)
        return 8 * (self._packed_bytes + floats) / self._weights
