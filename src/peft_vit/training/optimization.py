"""The optimiser and one step of it, the same for every method; what a method adds comes in through hooks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peft_vit.config import TrainingConfig
from peft_vit.errors import DivergedError, UserError
from peft_vit.records import StepRow
from peft_vit.training.checkpoint_state import State


class StepHook(Protocol):
    """What a method may do around a step. The loop knows no method by name.

    Its seconds count under `name`, those of calls that an attribute `purposes` names ({"after_backward": "scoring"})
    under what it says of them.
    """

    name: str

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Prepare, and refuse what can't work; called once, before the first step."""
        ...

    def penalties(self, model: nn.Module) -> dict[str, Tensor]:
        """Return terms to add to the loss, weighted, by name."""
        ...

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Look at the gradients of the task loss; penalties are added later."""
        ...

    def before_step(self, model: nn.Module, step: int) -> None:
        """Look at, or scale, the whole gradient, penalties included; it is not clipped yet. Who scores comes first."""
        ...

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Change ranks or weights once the optimiser has stepped."""
        ...

    def notes(self) -> dict[str, float]:
        """Return what the step's row in the record should hold, by its field's name; asked before the step."""
        ...

    def deployable(self, step: int) -> bool:
        """Say whether the state after this step meets the method's budget, so that it may be chosen."""
        ...

    def start_deployable(self) -> bool:
        """Say whether the model without any update, as it is before the first step, may be chosen in the end."""
        ...

    def state(self) -> State:
        """Return what the hook needs to go on, between two steps, beside model and optimiser."""
        ...

    def load_state(self, model: nn.Module, state: State) -> None:
        """Go on from such a state. The model and its adapters are as they were then; `attach` is called after this."""
        ...


class AfterTraining(Protocol):
    """What a run lets its hooks use once training is over; nothing of it comes from validation or test images."""

    @property
    def steps(self) -> Sequence[StepRow]:
        """Return the rows of the steps that were taken."""
        ...

    @property
    def class_weights(self) -> Tensor | None:
        """Return the loss's weights (classes,), None if all are 1."""
        ...

    def calibration_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the first training images (count, C, H, W) in an order of their own, and their labels (count,)."""
        ...

    def float_weights(self) -> Mapping[str, Tensor]:
        """Return the backbone's weights by name, read again as they were before anything was quantized."""
        ...


class RunHook(StepHook, Protocol):
    """A hook that knows what a run's record should hold."""

    def finish(self, model: nn.Module, after: AfterTraining) -> dict[str, float]:
        """Check what can be checked once training is over, measure, and return the seconds of it by purpose.

        Called once; the model stands in the state that was chosen, and its adapter file is made.
        """
        ...

    def record(self, model: nn.Module) -> dict[str, Any]:
        """Return what this hook knows of the run, by field of the record; called after `finish`."""
        ...


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
    hooks: Sequence[StepHook] = (),
    clip_norm: float | None = None,
) -> StepOutcome:
    """Do backward, hooks, penalties, clipping, the optimiser's step and zero_grad.

    Args:
        model: trained model.
        optimizer: holds its trainable parameters.
        loss: scalar task loss with its graph.
        step: number of this step, from 1.
        hooks: called in order; one that scores gradients stands before one that scales them.
        clip_norm: largest gradient norm over all trainable parameters; None: no clipping.

    Raises:
        DivergedError: if the loss or the gradient norm is not finite; the optimiser has not stepped then.
        UserError: if a parameter that the optimiser should train is not in it.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise DivergedError(f"the loss is {value} at step {step}; lower the learning rate")
    loss.backward()
    for hook in hooks:
        hook.after_backward(model, step)
    penalties = {name: term for hook in hooks for name, term in hook.penalties(model).items()}
    if penalties:
        torch.stack(list(penalties.values())).sum().backward()
    for hook in hooks:
        hook.before_step(model, step)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not parameters:
        raise UserError("no parameter received a gradient; attach adapters or unfreeze the head", field="model")
    _check_held(model, optimizer)
    norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm))
    if not math.isfinite(norm):
        raise DivergedError(f"the gradient norm is {norm} at step {step}; lower the learning rate")
    optimizer.step()
    for hook in hooks:
        hook.after_step(model, optimizer, step)
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
