"""Change a site's rank for real: tensors get smaller or larger, and the optimiser's moments follow their triplets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft_vit.adapters.adapted_model import Adapter, site_adapters
from peft_vit.adapters.resizable import check_resizable, unwrapped
from peft_vit.errors import UserError

_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}  # of the gradient in a moment


def resize_adapters(
    model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Mapping[str, int], triplet_scores: Mapping[str, Tensor]
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

    Returns:
        For each changed site the indices of the old triplets that were kept, (kept,) int64 in ascending order.

    Raises:
        UserError: before anything is changed, if model or optimiser can't follow, or ranks or scores don't fit.
    """
    check_resizable(model, optimizer)
    optimizer = unwrapped(optimizer)
    adapters = site_adapters(model)
    _check_ranks(adapters, optimizer, ranks)
    for name in ranks:
        if adapters[name].rank != ranks[name] and len(triplet_scores[name]) != adapters[name].rank:
            raise UserError(
                f"{len(triplet_scores[name])} scores for {adapters[name].rank} triplets; score again after a change",
                field=f"triplet_scores[{name}]",
            )
    kept = {}
    for name, rank in ranks.items():
        adapter = adapters[name]
        if rank != adapter.rank:
            kept[name] = _strongest(triplet_scores[name], rank)
            _resize(adapter, optimizer, kept[name], rank - len(kept[name]))
    return kept


def _check_ranks(adapters: Mapping[str, Adapter], optimizer: torch.optim.Optimizer, ranks: Mapping[str, int]) -> None:
    """Refuse what can't be done before anything is changed: half a change would leave optimiser and model apart."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, rank in ranks.items():
        if name not in adapters:
            raise UserError(f"the model has no adapter on {name}", field="ranks")
        adapter = adapters[name]
        least, most = adapter.smallest_rank, adapter.largest_rank
        if not least <= rank <= most:
            raise UserError(f"expected {least} to {most}, got {rank}", field=f"ranks[{name}]")
        if not all(id(parameter) in held for parameter in adapter.parameters()):
            raise UserError("does not hold the adapters' parameters; build it after attaching them", field="optimizer")


def _strongest(scores: Tensor, count: int) -> Tensor:
    order = torch.argsort(scores.detach().cpu(), descending=True, stable=True)
    return order[:count].sort().values


def _resize(adapter: Adapter, optimizer: torch.optim.Optimizer, keep: Tensor, grow: int) -> None:
    keep = keep.to(adapter.lora_A.device)
    fresh = adapter.fresh_triplets(grow, beside=len(keep))
    # A by this factor and B by its inverse: the update stays, and its steps fit the new rank.
    larger = adapter.start_size(len(keep) + grow) / adapter.start_size(adapter.rank)
    factors = {"lora_A": larger, "lora_B": 1 / larger, "lora_lambda": 1.0}
    for name, dim, new in zip(("lora_A", "lora_B", "lora_lambda"), (0, 1, 0), fresh, strict=True):
        old = getattr(adapter, name)
        if old is None or new is None:
            continue
        added = new.to(old)
        kept = old.detach().index_select(dim, keep) * factors[name]
        values = torch.cat([kept, added], dim).contiguous()
        parameter = nn.Parameter(values, requires_grad=old.requires_grad)
        setattr(adapter, name, parameter)
        _carry_state(optimizer, old, parameter, keep, dim, torch.zeros_like(added), factors[name])


def _carry_state(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    keep: Tensor,
    dim: int,
    zeros: Tensor,
    factor: float,
) -> None:
    """Let moments follow their triplets; of a value that is `factor` times as large they are those of 1 / factor."""
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][index] = new
    state = optimizer.state.pop(old, None)
    if state is None or not len(keep):  # nothing old is left: the optimiser starts anew, its step count too
        return
    optimizer.state[new] = {
        key: torch.cat([value.index_select(dim, keep) / factor ** _POWERS[key], zeros.to(value)], dim).contiguous()
        if isinstance(value, Tensor) and value.shape == old.shape
        else value
        for key, value in state.items()
    }
