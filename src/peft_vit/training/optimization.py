"""The task loss, the optimiser and one step of it, the same for every method; what a method adds comes in by hooks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_vit.backbones import Backbone
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


def weighted_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None, label_smoothing: float = 0.0
) -> Tensor:
    """Return sum_n sum_c w[c] t[n, c] (-log p[n, c]) / N, the cross entropy with class weights w and targets t.

    With a label y_n, t[n, y_n] is 1; smoothing (arXiv 1512.00567) makes it (1 - s) t + s / classes. A mixed image has
    shares of two classes, and each share has the weight of its class.

    torch's weighted mean divides by the batch's own weights, sum_n w[y_n], in place of N: in a batch of one the weight
    cancels, and an image counts the less the more its batch weighs. Divided by N, an image's weight is the same in any
    batch.

    Args:
        logits: (N, classes).
        labels: (N,) int64, or shares of each class (N, classes) that add up to 1.
        weights: (classes,), see `class_weights`, or None: all 1.
        label_smoothing: s, from 0 to below 1.
    """
    if weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    total = F.cross_entropy(logits, labels, weight=weights, reduction="sum", label_smoothing=label_smoothing)
    return total / len(labels)


@dataclass(frozen=True)
class StepOutcome:
    """What one step did; `gradient_norm` is the norm before clipping."""

    loss: float
    gradient_norm: float
    penalties: dict[str, float]


def optimization_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Tensor | Iterable[Tensor],
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
        loss: scalar task loss with its graph; of a batch in micro-batches the part of each, which add up to the
            batch's loss. A part is asked for once the backward pass of the one before is done, so one graph is held.
        step: number of this step, from 1.
        hooks: called in order, once a step, on the gradient of the whole batch; one that scores gradients stands
            before one that scales them.
        clip_norm: largest gradient norm over all trainable parameters; None: no clipping.
        overhead: takes the seconds of the hooks.

    Raises:
        DivergedError: if the loss or the gradient norm is not finite; the optimiser has not stepped then.
        UserError: if a parameter that the optimiser should train is not in it.
    """
    overhead = Overhead() if overhead is None else overhead
    value = 0.0
    for part in [loss] if isinstance(loss, Tensor) else loss:
        value += float(part.detach())
        if not math.isfinite(value):
            raise DivergedError(f"the loss is {value} at step {step}; lower the learning rate")
        part.backward()
    call_each(hooks, "after_backward", overhead, model, step)
    terms = call_each(hooks, "penalties", overhead, model)
    penalties: dict[str, Tensor] = {name: term for of_hook in terms for name, term in of_hook.items()}
    if penalties:
        torch.stack(list(penalties.values())).sum().backward()
    call_each(hooks, "before_step", overhead, model, step)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not parameters:
        raise UserError("no parameter received a gradient; attach adapters or unfreeze the head", field="model")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and id(parameter) not in held:  # it would stay as it is, silently
            raise UserError("has a gradient but is not in the optimizer; build it after attaching adapters", field=name)
    norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm))
    if not math.isfinite(norm):
        raise DivergedError(f"the gradient norm is {norm} at step {step}; lower the learning rate")
    optimizer.step()
    call_each(hooks, "after_step", overhead, model, optimizer, step)
    optimizer.zero_grad(set_to_none=True)
    return StepOutcome(value, norm, {name: float(term.detach()) for name, term in penalties.items()})


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimiser over everything that is trainable; its first group has the whole learning rate."""
    assert config.learning_rate is not None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[Any] = parameters
    if config.layer_decay is not None:
        groups = layer_groups(model, config.learning_rate, config.layer_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.learning_rate, momentum=0.9, weight_decay=config.weight_decay)
    fused = {parameter.device.type for parameter in parameters} <= {"cpu", "cuda"}  # one kernel a tensor, not twelve
    return torch.optim.AdamW(groups, config.learning_rate, weight_decay=config.weight_decay, fused=fused)


def layer_groups(model: nn.Module, learning_rate: float, decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters by layer, from the head down, with their learning rates.

    Layer l of L blocks has learning_rate * decay^(L + 1 - l): embeddings are layer 0, the blocks 1 to L, the head and
    the norm before it L + 1, as in BEiT (arXiv 2106.08254, `optim_factory.py`) and MAE (arXiv 2111.06377,
    `util/lr_decay.py`). What joins two stages, as in Swin, goes with the block that it feeds.

    Raises:
        UserError: if the model is of no family that is known.
    """
    backbone = Backbone.within(model)
    blocks = backbone.blocks
    layers: dict[int, list[nn.Parameter]] = {}
    reached = 0  # blocks that have been seen: parameters come in the order of a forward pass
    for name, parameter in backbone.model.named_parameters():
        own = next((place for place, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        if own is not None:
            layer = reached = own + 1
        else:  # before the next block; before the first one stand embeddings
            layer = reached + 1 if reached else 0
        if backbone.is_of_head(name):
            layer = len(blocks) + 1
        if parameter.requires_grad:
            layers.setdefault(layer, []).append(parameter)
    return [
        {"params": layers[layer], "lr": learning_rate * decay ** (len(blocks) + 1 - layer)}
        for layer in sorted(layers, reverse=True)
    ]
