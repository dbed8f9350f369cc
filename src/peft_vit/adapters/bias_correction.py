"""Adam's bias correction for triplets that joined late.

Adam (arXiv 1412.6980, algorithm 1; AdamW, arXiv 1711.05101, algorithm 2, differs in the decay alone) starts its moments
at zero and divides that start out of them. After t steps, with learning rate lr::

    w <- w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
       = w - lr * s(t) * m / (sqrt(v) + eps * d(t)),    d(t) = sqrt(1 - beta2^t),  s(t) = d(t) / (1 - beta1^t)

torch keeps one t for a whole parameter. A triplet that has grown into it starts from zero moments too, at an age of its
own: late in a run s(t) is 1 where s(1) is 0.32 (betas 0.9, 0.999), so its first update would be 3.2 times too large.

So the optimiser's state keeps, beside the moments of a parameter that has grown, the step count at each triplet's
birth, and after each step the part of the update that torch made with t is replaced by that with the triplet's own age.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_vit.adapters.resizable import unwrapped

# {"dim": the one that counts triplets, "births": a tuple of ints, ascending, for new triplets come last}. No tensor:
# load_state_dict casts tensors to the parameter's type, and bfloat16 can't count beyond 256.
TRIPLETS = "triplets"
_NEGLIGIBLE = 1e-6  # of an update: a step is far smaller than its weight, of which float32 holds 1e-7


def triplets_after(state: dict[str, Any], dim: int, keep: Sequence[int], grow: int) -> dict[str, Any]:
    """Return the entry that belongs into a parameter's state after a change of rank; none if all are as old as it.

    Args:
        state: the optimiser's, of the parameter before the change; without a step count there is nothing to correct.
        dim: the parameter's dimension that counts triplets.
        keep: indices of the triplets that stay, ascending.
        grow: number of triplets that are added at the end.
    """
    if "step" not in state:
        return {}
    old = state[TRIPLETS]["births"] if TRIPLETS in state else None
    births = tuple(0 if old is None else old[index] for index in keep) + (int(state["step"]),) * grow
    return {TRIPLETS: {"dim": dim, "births": births}} if any(births) else {}


def correct_young_triplets(optimizer: torch.optim.Optimizer) -> None:
    """Make every later step of an Adam or AdamW correct its bias by each triplet's own age; once is enough.

    `load_state_dict` brings the births but not this: call it on an optimiser that was built anew.
    """
    optimizer = unwrapped(optimizer)
    if isinstance(optimizer, torch.optim.Adam) and _correct not in optimizer._optimizer_step_post_hooks.values():
        optimizer.register_step_post_hook(_correct)


class _Cohort(NamedTuple):
    """Triplets of one parameter and one birth."""

    weight: Tensor
    mean: Tensor  # m
    square: Tensor  # v


class _Factors(NamedTuple):
    """What triplets of many parameters share: lr * s and eps * d, with torch's step count and with their own."""

    made_rate: float
    made_epsilon: float
    due_rate: float
    due_epsilon: float
    kind: tuple[torch.device, torch.dtype]


@torch.no_grad()
def _correct(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Take back what torch made of the step count, and give what the ages ask for."""
    overflow = getattr(optimizer, "found_inf", None)  # GradScaler leaves it to a fused kernel to make no step
    if overflow is not None and float(overflow):
        return
    alike: dict[_Factors, list[_Cohort]] = {}
    for group in optimizer.param_groups:
        for factors, cohort in _cohorts(optimizer, group):
            alike.setdefault(factors, []).append(cohort)
    for factors, cohorts in alike.items():
        _add_difference(factors, cohorts)


def _add_difference(factors: _Factors, cohorts: Sequence[_Cohort]) -> None:
    """Correct many small slices in one go: one by one the calls would cost more than the arithmetic."""
    mean = torch.cat([cohort.mean.reshape(-1) for cohort in cohorts])
    root = torch.cat([cohort.square.reshape(-1) for cohort in cohorts]).sqrt_()
    change = mean / (root + factors.made_epsilon) * factors.made_rate
    change.addcdiv_(mean, root.add_(factors.due_epsilon), value=-factors.due_rate)
    weights = [cohort.weight for cohort in cohorts]
    parts = change.split([weight.numel() for weight in weights])
    torch._foreach_add_(weights, [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)])


def _cohorts(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Iterator[tuple[_Factors, _Cohort]]:
    """Yield the triplets that this step has moved at a rate that was not theirs."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    lr, eps = float(group["lr"]), float(group["eps"])

    def rate_and_epsilon(steps: int) -> tuple[float, float]:
        root: float = (1 - beta2**steps) ** 0.5
        return lr * root / (1 - beta1**steps), eps * root

    for parameter in group["params"]:
        state = optimizer.state.get(parameter, {})
        if TRIPLETS not in state or parameter.grad is None:  # without a gradient torch has made no step
            continue
        step, dim = int(state["step"]), state[TRIPLETS]["dim"]
        square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        start = 0
        for birth, members in groupby(state[TRIPLETS]["births"]):
            count, age = len(list(members)), step - birth
            if birth and max(beta1, beta2) ** age > _NEGLIGIBLE:
                kind = parameter.device, parameter.dtype
                factors = _Factors(*rate_and_epsilon(step), *rate_and_epsilon(age), kind)
                slices = (tensor.narrow(dim, start, count) for tensor in (parameter, state["exp_avg"], square))
                yield factors, _Cohort(*slices)
            start += count
