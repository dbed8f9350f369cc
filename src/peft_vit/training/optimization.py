"""The task loss, the optimiser and one step of it, the same for every method; what a method adds comes in by hooks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_vit.config import TrainingConfig
from peft_vit.data import Data
from peft_vit.errors import DivergedError, UserError
from peft_vit.training.hooks import Hook, Overhead, call_each


def class_weights(labels: np.ndarray, classes: int) -> Tensor:
    """Return n / (classes * n_c) for each class c, (classes,); over the images they average to 1."""
    counts = np.bincount(labels, minlength=classes)  # (N,) -> (classes,)
    return torch.tensor(len(labels) / (classes * counts), dtype=torch.float32)


def loss_weights(config: TrainingConfig, data: Data, device: torch.device) -> Tensor | None:
    """Return the loss's weights (classes,) on the device, None where a study asks for none."""
    return class_weights(data.train.labels, len(data.class_names)).to(device) if config.class_weights else None


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


@dataclass(frozen=True)
class StepOutcome:
    """What one step did; `gradient_norm` is the norm before clipping."""

    loss: float
    gradient_norm: float
    penalties: dict[str, float]


def optimization_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    step: int,
    *,
    hooks: Sequence[Hook] = (),
    clip_norm: float | None = None,
    overhead: Overhead | None = None,
) -> StepOutcome:
    """Do backward, hooks, penalties, clipping, the optimiser's step and zero_grad.

    Args:
        model: trained model.
        optimizer: holds its trainable parameters.
        loss: scalar task loss with its graph.
        step: number of this step, from 1.
        hooks: called in order; one that scores gradients stands before one that scales them.
        clip_norm: largest gradient norm over all trainable parameters; None: no clipping.
        overhead: takes the seconds of the hooks.

    Raises:
        DivergedError: if the loss or the gradient norm is not finite; the optimiser has not stepped then.
        UserError: if a parameter that the optimiser should train is not in it.
    """
    overhead = Overhead() if overhead is None else overhead
    value = float(loss.detach())
    if not math.isfinite(value):
        raise DivergedError(f"the loss is {value} at step {step}; lower the learning rate")
    loss.backward()
    call_each(hooks, "after_backward", overhead, model, step)
    terms = call_each(hooks, "penalties", overhead, model)
    penalties: dict[str, Tensor] = {name: term for of_hook in terms for name, term in of_hook.items()}
    if penalties:
        torch.stack(list(penalties.values())).sum().backward()
    call_each(hooks, "before_step", overhead, model, step)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not parameters:
        raise UserError("no parameter received a gradient; attach adapters or unfreeze the head", field="model")
    _check_held(model, optimizer)
    norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm))
    if not math.isfinite(norm):
        raise DivergedError(f"the gradient norm is {norm} at step {step}; lower the learning rate")
    optimizer.step()
    call_each(hooks, "after_step", overhead, model, optimizer, step)
    optimizer.zero_grad(set_to_none=True)
    return StepOutcome(value, norm, {name: float(term.detach()) for name, term in penalties.items()})


def _check_held(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a trainable parameter that the optimiser lacks: it would stay as it is, silently."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and id(parameter) not in held:
            raise UserError("has a gradient but is not in the optimizer; build it after attaching adapters", field=name)


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimiser over everything that is trainable."""
    assert config.learning_rate is not None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, config.learning_rate, momentum=0.9, weight_decay=config.weight_decay)
    fused = {parameter.device.type for parameter in parameters} <= {"cpu", "cuda"}  # one kernel a tensor, not twelve
    return torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay, fused=fused)
