"""The loss of a training step, and all that lets it need less time or memory and leaves its result alone.

That is lower precision, micro-batches, halves of a batch on two threads, the class token alone in the last block, and
blocks and codes that the backward pass computes again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import remember_sources
from peft_vit.core.backbones import freeze_batch_norm
from peft_vit.core.backbones.passes import class_token_alone
from peft_vit.core.config import TrainingConfig
from peft_vit.core.training.halves import loss_in_halves, takes_halves
from peft_vit.core.training.hooks import Calibration, Hook, HookContext, Overhead, RuntimeConfig
from peft_vit.core.training.images import Data
from peft_vit.core.training.metrics import autocast
from peft_vit.core.training.optimization import blocks_of, loss_weights, recomputed


class StepEngine:
    """Computes the training loss of a model on batches.

    Args:
        model: with adapters attached, on the runtime's device.
        data: whose task and class counts make the loss.
        config: of the training.
        runtime: device, precision and normalisation.

    Raises:
        UserError: if a `memory_limit` has not been replaced by what keeps within it.
    """

    def __init__(self, model: nn.Module, data: Data, config: TrainingConfig, runtime: RuntimeConfig) -> None:
        if config.is_undecided:
            message = "is for studies alone; here, give micro_batch_size or activation_checkpointing"
            raise UserError(message, field="training.memory_limit")
        self._model, self._data, self._config, self._runtime = model, data, config, runtime
        weights, smoothing = loss_weights(config, data, runtime.device), config.label_smoothing  # (classes,)
        self._loss = partial(data.task.loss, weights=weights, label_smoothing=smoothing, name=config.loss)
        if config.activation_checkpointing in ("light", "adaptive"):
            remember_sources(model)
        blocks = blocks_of(model)
        self._recomputed = blocks[: config.recomputed_of(len(blocks))]
        self._halves = takes_halves(model, runtime.device)

    def begin(self, hooks: Sequence[Hook], seed: int, overhead: Overhead) -> None:
        """Let hooks begin."""
        context = HookContext(Calibration(self._data, self._runtime, seed).images, overhead=overhead)
        for hook in hooks:
            hook.begin(self._model, context)

    def train_mode(self) -> None:
        """Let the model be in training, but for statistics of batches."""
        self._model.train()
        freeze_batch_norm(self._model)

    def losses(self, images: Tensor, labels: Tensor, share: float = 1.0) -> Iterator[Tensor]:
        """Yield the part of each micro-batch of M images in the loss of a batch of B: its mean times share * M / B.

        The last batch of an epoch may be smaller, and its last micro-batch too.

        Args:
            images: (B, 3, S, S).
            labels: (B,), or shares of each class (B, classes).
            share: of these images in a batch that several processes have.
        """
        device, at_once = self._runtime.device, self._config.images_at_once

        def loss_of(x: Tensor, targets: Tensor) -> Tensor:
            with autocast(device, self._runtime.precision):
                logits = self._model(x.to(device))  # (M, classes)
            mean = self._loss(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.to(device))
            return mean * (share * len(x) / len(images))

        for x, targets in zip(images.split(at_once), labels.split(at_once), strict=True):  # (M, 3, S, S), (M, ...)
            with class_token_alone(self._model), recomputed(self._recomputed):
                loss = loss_in_halves(loss_of, x, targets) if self._halves and len(x) > 1 else loss_of(x, targets)
            yield loss
