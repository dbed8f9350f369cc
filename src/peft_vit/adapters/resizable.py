"""What can follow a change of rank, which replaces parameters, and what would lose them silently."""

from __future__ import annotations

import torch
from torch import nn

from peft_vit.adapters.peft_sites import peft_sites
from peft_vit.errors import UserError

_OPTIMIZERS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)

# Classes of torch by name: they come from modules that are slow to import, and not in every build of torch.
_WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel goes on synchronizing the old tensors; train in one process",
    "FullyShardedDataParallel": "FullyShardedDataParallel shards fixed tensors; train without it",
    "FSDPModule": "fully_shard shards fixed tensors; train without it",
    "OptimizedModule": "torch.compile has fixed the tensors' shapes; train the model that is not compiled",
}


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimiser that does the steps: transformers' Trainer hands out one that accelerate has wrapped."""
    if type(optimizer).__module__.startswith("accelerate."):
        inner: torch.optim.Optimizer = optimizer.optimizer  # type: ignore[attr-defined]
        return inner
    return optimizer


def check_resizable(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what can't follow a change of rank.

    Raises:
        UserError: for another optimiser, for a model that is distributed, sharded or compiled, or one that PEFT has
            wrapped with more than plain LoRA.
    """
    _check_optimizer(optimizer)
    peft_sites(model)
    for name, module in model.named_modules():
        where = name or "model"
        for kind in type(module).__mro__:
            if kind.__module__.startswith("torch.") and kind.__name__ in _WRAPPERS:
                raise UserError(f"ranks can't change here: {_WRAPPERS[kind.__name__]}", field=where)
        if module._compiled_call_impl is not None:  # Module.compile() leaves the class as it is
            raise UserError(f"ranks can't change here: {_WRAPPERS['OptimizedModule']}", field=where)
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor":
            raise UserError("ranks can't change here: it is a DTensor, sharded over a mesh; train without", field=name)
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        # A trainer may wrap the model out of our sight; the wrapped one is then not what we were given.
        raise UserError(
            f"{distributed.get_world_size()} processes train together, and none would learn of another's new tensors; "
            "train in one",
            field="torch.distributed",
        )


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser whose state can't be carried through a change of rank."""
    optimizer = unwrapped(optimizer)
    if type(optimizer) not in _OPTIMIZERS:
        known = ", ".join(kind.__name__ for kind in _OPTIMIZERS)
        raise UserError(
            f"{type(optimizer).__name__} can't follow a change of rank; use one of {known}", field="optimizer"
        )
    if any(group.get("momentum") and group.get("dampening") for group in optimizer.param_groups):
        # torch takes a parameter's first gradient undamped; a triplet that joins later would be damped.
        raise UserError("SGD with dampening can't follow a change of rank; set dampening=0", field="optimizer")
