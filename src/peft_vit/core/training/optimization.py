"""The loss's weights, the optimiser and its rates, one step of it, and activation checkpointing.

They are the same for every method; what one adds comes in by hooks. Activation checkpointing (Chen et al., arXiv
1604.06174) computes blocks again for their gradients. Where not all blocks are, it is the first ones. A step needs the
most memory when its backward pass begins, and then that of one block after the other falls away. What the first blocks
take when they are computed again comes once the later ones are gone; the last block's would come on top of all that the
others have kept, so that computing it again saves nothing. Where stages differ, as in Swin and Hiera, the first blocks
also keep the most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LRScheduler, OneCycleLR
from torch.utils.checkpoint import checkpoint

from peft_vit.base.errors import DivergedError, UserError
from peft_vit.core.adapters import site_adapters
from peft_vit.core.adapters.adapted_product import saving_first
from peft_vit.core.backbones import Backbone
from peft_vit.core.backbones.passes import replaced_forwards
from peft_vit.core.config import TrainingConfig
from peft_vit.core.training.hooks import Hook, Overhead, call_each
from peft_vit.core.training.images import Data
from peft_vit.core.training.processes import sum_gradients

_WARMUP_STEPS = 20  # of warmup_stable_decay, or a tenth of the run
_ONE_CYCLE_SHARE = 0.3  # of the steps, for the way up
_DECAY_SHARE = 0.25  # of the steps before the decay


def loss_weights(config: TrainingConfig, data: Data, device: torch.device) -> Tensor | None:
    """Return the loss's weights (classes,) on the device, None where a study asks for none."""
    if config.class_weights == "none":
        return None
    counts = data.task.counts(data.train.labels, len(data.class_names))
    weights = data.task.loss_weights(counts, config.class_weights)
    return torch.tensor(weights, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class StepOutcome:
    """Loss, gradient norm before clipping, and penalties of a step."""

    loss: float
    gradient_norm: float
    penalties: dict[str, float]


def optimization_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Tensor | Iterable[Tensor],
    step: int,
    *,
    hooks: Sequence[Hook] = (),
    clip_norm: float | None = None,
    overhead: Overhead | None = None,
) -> StepOutcome:
    """Do backward, hooks, penalties, clipping, the optimiser's step and zero_grad.

    Where several processes train the model, hooks and all that follows get the sums of their gradients.

    Args:
        model: trained model.
        optimizer: holds its trainable parameters.
        loss: scalar task loss with its graph; of a batch in micro-batches, or in several processes, the part of
            each, which add up to the batch's loss. A part is asked for once the backward pass of the one before is
            done, so one graph is held.
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
        part.backward()
    value = sum_gradients(_leaves(model), value)
    if not math.isfinite(value):
        raise DivergedError(f"the loss is {value} at step {step}; lower the learning rate")
    call_each(hooks, "after_backward", overhead, model, step)
    terms = call_each(hooks, "penalties", overhead, model)
    penalties: dict[str, Tensor] = {name: term for of_hook in terms for name, term in of_hook.items()}
    if penalties:
        torch.stack(list(penalties.values())).sum().backward()
    call_each(hooks, "before_step", overhead, model, step)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not parameters:
        raise UserError("no parameter received a gradient; attach adapters or unfreeze the head", field="model")
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and id(parameter) not in optimized:  # it would stay as it is, silently
            raise UserError("has a gradient but is not in the optimizer; build it after attaching adapters", field=name)
    norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm))
    if not math.isfinite(norm):
        raise DivergedError(f"the gradient norm is {norm} at step {step}; lower the learning rate")
    optimizer.step()
    call_each(hooks, "after_step", overhead, model, optimizer, step)
    optimizer.zero_grad(set_to_none=True)
    return StepOutcome(value, norm, {name: float(term.detach()) for name, term in penalties.items()})


def _leaves(model: nn.Module) -> Iterator[Tensor]:
    """Yield all that a backward pass may give gradients to: parameters, and probes, which are none."""
    yield from model.parameters()
    for adapter in site_adapters(model).values():
        if adapter.probe is not None:
            yield adapter.probe.lambdas


def build_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
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
    """
    backbone = Backbone.within(model)
    blocks = backbone.blocks
    of_head = backbone.of_head(name for name, _ in backbone.model.named_parameters())
    layers: dict[int, list[nn.Parameter]] = {}
    depth = 0  # of the latest block: parameters come in the order of a forward pass
    for name, parameter in backbone.model.named_parameters():
        place = next((place for place, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        if place is not None:
            layer = depth = place + 1
        else:  # before the next block; before the first one stand embeddings
            layer = depth + 1 if depth else 0
        if name in of_head:
            layer = len(blocks) + 1
        if parameter.requires_grad:
            layers.setdefault(layer, []).append(parameter)
    return [
        {"params": layers[layer], "lr": learning_rate * decay ** (len(blocks) + 1 - layer)}
        for layer in sorted(layers, reverse=True)
    ]


class WarmupStableDecay:
    """Factor on the learning rate: up to 1 in a line, 1 for as long as it takes, down to 0 in a line.

    For trainings whose length is not known before (arXiv 2404.06395): the way down may begin at any step. It takes a
    quarter of the steps before it, so a fifth of the run, and begins in time for the last step that there may be.

    Args:
        total_steps: that there may be.
        warmup_share: of them for the way up; None: 20 steps, or a tenth if that is less.
    """

    def __init__(self, total_steps: int, warmup_share: float | None = None) -> None:
        usual = min(_WARMUP_STEPS, total_steps // 10)
        self.warmup_steps = max(1, usual if warmup_share is None else round(warmup_share * total_steps))
        self.end = total_steps
        self.decay_from = total_steps - max(1, round(total_steps * _DECAY_SHARE / (1 + _DECAY_SHARE)))

    def least_end(self, step: int) -> int:
        """Return the step that the training ends with if the way down begins after a step, or has begun."""
        return min(self.end, step + max(1, round(step * _DECAY_SHARE))) if step < self.decay_from else self.end

    def bring_down(self, step: int) -> int:
        """Begin the way down after a step, unless it has begun; return the step that the training ends with."""
        self.end, self.decay_from = self.least_end(step), min(step, self.decay_from)
        return self.end

    def __call__(self, step: int) -> float:
        """Return the factor of the step that follows `step` steps."""
        up = (step + 1) / self.warmup_steps
        down = (self.end - step) / (self.end - self.decay_from + 1)
        return max(0.0, min(1.0, up, down))


def one_cycle(optimizer: Optimizer, config: TrainingConfig, total_steps: int, done: int = 0) -> OneCycleLR:
    """Return a cycle of the learning rate, from what follows `done` steps on; there may have been a longer one."""
    share = _ONE_CYCLE_SHARE if config.warmup_share is None else config.warmup_share
    peaks = [group.get("max_lr", group["lr"]) for group in optimizer.param_groups]
    return OneCycleLR(
        optimizer, peaks, total_steps=total_steps, pct_start=share, cycle_momentum=False, last_epoch=done - 1
    )


def build_scheduler(
    optimizer: Optimizer, config: TrainingConfig, total_steps: int
) -> tuple[LRScheduler, WarmupStableDecay | None]:
    """Return the scheduler, and with warmup_stable_decay its factor, which can begin the decay early.

    one_cycle (arXiv 1708.07120, as torch's OneCycleLR) warms up over `warmup_share`, 30 % of the steps by default, and
    decays by cosine.
    """
    if config.schedule == "one_cycle":
        return one_cycle(optimizer, config, total_steps), None
    if config.schedule == "constant":
        return ConstantLR(optimizer, factor=1.0), None
    decay = WarmupStableDecay(total_steps, config.warmup_share)
    return LambdaLR(optimizer, decay), decay


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of the backbone that a model is, or wraps, whatever its family."""
    backbone = Backbone.within(model)
    return [backbone.model.get_submodule(name) for name in backbone.blocks]


def recomputed(blocks: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Let a forward pass within keep each block's inputs alone; its backward pass, wherever it is, computes the rest.

    The gradients are those without, bit for bit: the same operations on the same values, with torch's generators as
    they were, so that a dropout drops the same. Modules, their names and their hooks stay: for a while a block has a
    `forward` of its own. Calls under `no_grad` compute as always.
    """
    return replaced_forwards(
        {block: partial(checkpoint, partial(saving_first, block.forward), use_reentrant=False) for block in blocks}
    )
