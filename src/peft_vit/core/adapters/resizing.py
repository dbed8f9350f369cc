"""Change a site's rank for real: tensors get smaller or larger, and the optimiser's moments follow their triplets.

A change of rank replaces parameters. What would continue with the old ones, or lose moments silently, is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters.adapted_model import Adapter, site_adapters
from peft_vit.core.adapters.low_rank import TRIPLETS
from peft_vit.core.adapters.peft_layers import peft_sites

_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}  # of the gradient in a moment
_OPTIMIZERS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)

# Classes of torch by name: they come from modules that are slow to import, and not in every build of torch.
_HOLD_TENSORS = {
    "DistributedDataParallel": "DistributedDataParallel",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "FSDPModule": "fully_shard",
    "OptimizedModule": "torch.compile",
    "DTensor": "a DTensor",
}


def resize_adapters(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Mapping[str, int],
    triplet_scores: Mapping[str, Tensor],
    *,
    generators: Mapping[str, torch.Generator] | None = None,
) -> dict[str, Tensor]:
    """Give each named site its new rank.

    A site that shrinks loses exactly its triplets with the lowest scores (of equal ones the later); the others keep
    their order and their updates. Under a reference rank A of those that stay changes its size with the rank, and B
    the other way, see `SiteAdapter.start_size`. A site that grows gets triplets that leave the function as it was, with
    moments of zero. Their first steps under Adam are larger than those of a parameter that starts: torch counts steps
    of the whole parameter, and corrects the zero start of what has just grown no more.

    Args:
        model: carries the adapters.
        optimizer: holds their parameters.
        ranks: new rank by site.
        triplet_scores: score of each present triplet by site, (rank,).
        generators: sources of what grows, by site, instead of the adapters' own.

    Returns:
        For each changed site the indices of the old triplets that were kept, (kept,) int64 in ascending order.

    Raises:
        UserError: before anything is changed, if model or optimiser can't follow, or ranks or scores don't fit.
    """
    check_resizable(model, optimizer)
    optimizer = unwrap_optimizer(optimizer)
    adapters = site_adapters(model)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, rank in ranks.items():
        if name not in adapters:
            raise UserError(f"the model has no adapter on {name}", field="ranks")
        least, most = adapters[name].smallest_rank, adapters[name].largest_rank
        if not least <= rank <= most:
            raise UserError(f"expected {least} to {most}, got {rank}", field=f"ranks[{name}]")
        if not all(id(parameter) in held for parameter in adapters[name].parameters()):
            raise UserError("does not hold the adapters' parameters; build it after attaching them", field="optimizer")
        if adapters[name].rank != rank and len(triplet_scores[name]) != adapters[name].rank:
            raise UserError(
                f"{len(triplet_scores[name])} scores for {adapters[name].rank} triplets; score again after a change",
                field=f"triplet_scores[{name}]",
            )
    kept = {}
    for name, rank in ranks.items():
        adapter = adapters[name]
        if rank != adapter.rank:
            order = torch.argsort(triplet_scores[name].detach().cpu(), descending=True, stable=True)  # (old rank,)
            kept[name] = order[:rank].sort().values
            adapter.generator = (generators or {}).get(name, adapter.generator)
            _resize(adapter, optimizer, kept[name], rank - len(kept[name]))
    return kept


def _resize(adapter: Adapter, optimizer: torch.optim.Optimizer, keep: Tensor, grow: int) -> None:
    """Keep some triplets and add fresh ones; the optimiser's moments follow their triplets."""
    keep = keep.to(adapter.lora_A.device)
    fresh = adapter.fresh_triplets(grow, beside=len(keep))
    # A by this factor and B by its inverse: the update stays, and its steps fit the new rank.
    larger = adapter.start_size(len(keep) + grow) / adapter.start_size(adapter.rank)
    factors = {"lora_A": larger, "lora_B": 1 / larger, "lora_lambda": 1.0}
    for name, dim, new in zip(TRIPLETS, (0, 1, 0), fresh, strict=True):
        old = getattr(adapter, name)
        if old is None or new is None:
            continue
        added = new.to(old)
        staying = old.detach().index_select(dim, keep) * factors[name]  # A (kept, in / pool), B (out, kept), (kept,)
        values = torch.cat([staying, added], dim).contiguous()  # A (rank, in / pool), B (out, rank), lambda (rank,)
        parameter = nn.Parameter(values, requires_grad=old.requires_grad)
        setattr(adapter, name, parameter)
        for group in optimizer.param_groups:
            group["params"][:] = [parameter if present is old else present for present in group["params"]]
        state = optimizer.state.pop(old, None)
        if state is None or not len(keep):  # nothing old is left: the optimiser starts again, its step count too
            continue
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == old.shape:
                # Of a value that is `factor` times as large the moments are those of 1 / factor.
                staying = value.index_select(dim, keep) / factors[name] ** _POWERS[key]  # those triplets' moments
                state[key] = torch.cat([staying, torch.zeros_like(added).to(value)], dim).contiguous()
        optimizer.state[parameter] = state


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimiser that does the steps: transformers' Trainer hands out one that accelerate has wrapped."""
    if type(optimizer).__module__.startswith("accelerate."):
        inner: torch.optim.Optimizer = optimizer.optimizer  # type: ignore[attr-defined]
        return inner
    return optimizer


_TOGETHER = ContextVar("together", default=False)


@contextmanager
def resizing_together() -> Iterator[None]:
    """Let ranks change although several processes train: within, all step by the same sums, and decide alike."""
    token = _TOGETHER.set(True)
    try:
        yield
    finally:
        _TOGETHER.reset(token)


def check_resizable(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what can't follow a change of rank.

    Raises:
        UserError: for another optimiser, for a model that is distributed, sharded or compiled, or one that PEFT has
            wrapped with more than plain LoRA.
    """
    optimizer = unwrap_optimizer(optimizer)
    if type(optimizer) not in _OPTIMIZERS:
        known = ", ".join(kind.__name__ for kind in _OPTIMIZERS)
        raise UserError(
            f"{type(optimizer).__name__} can't follow a change of rank; use one of {known}", field="optimizer"
        )
    if any(group.get("momentum") and group.get("dampening") for group in optimizer.param_groups):
        # torch takes a parameter's first gradient undamped; a triplet that joins later would be damped.
        raise UserError("SGD with dampening can't follow a change of rank; set dampening=0", field="optimizer")
    peft_sites(model)
    for name, part in itertools.chain(model.named_modules(), model.named_parameters()):
        kinds = [kind.__name__ for kind in type(part).__mro__ if kind.__module__.startswith("torch.")]
        if getattr(part, "_compiled_call_impl", None) is not None:  # Module.compile() leaves the class as it is
            kinds.append("OptimizedModule")
        for holder in (_HOLD_TENSORS[kind] for kind in kinds if kind in _HOLD_TENSORS):
            message = (
                f"ranks can't change here: {holder} continues with the old tensors; train without it, in one process"
            )
            raise UserError(message, field=name or "model")
    distributed = torch.distributed
    if _TOGETHER.get():
        return
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        # A trainer may wrap the model out of our sight; the wrapped one is then not what we were given.
        raise UserError(
            f"{distributed.get_world_size()} processes train together, and none would learn of another's new tensors; "
            "train in one",
            field="torch.distributed",
        )
