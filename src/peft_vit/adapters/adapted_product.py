"""Inputs times an adapted weight, y = x (W + dW)^T + bias, with W frozen; and the gradients.

W + dW is formed once for the forward pass, so that the large product stays one product. A packed W is unpacked there
and once more for the backward pass, and nothing of W's size is kept in between: that takes a few percent of a step, and
keeping it would take four bytes a weight (docs/methods.md has the numbers). Where a float W alone stands, the sum is
kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_vit.adapters.low_rank import GradientProbe, SiteAdapter
from peft_vit.errors import UserError
from peft_vit.quantization import QuantizedTensor


@dataclass(frozen=True, eq=False)
class FrozenWeight:
    """The weight under adapters, (1 - share) * float + share * quantized, of shape (out, in).

    Attributes:
        floating: the float weight; None once it has been freed, and then the share counts as 1.
        quantized: the packed weight; None if there is none, and then the share counts as 0.
        share: 0 to 1.
    """

    floating: Tensor | None
    quantized: QuantizedTensor | None = None
    share: float = 0.0

    @property
    def rows(self) -> int:
        """Return the number of outputs."""
        if self.floating is not None:
            return self.floating.shape[0]
        assert self.quantized is not None
        return self.quantized.shape[0]

    @property
    def is_float(self) -> bool:
        """Whether the float weight alone is in use."""
        return self.quantized is None or (self.floating is not None and self.share == 0)

    def unpack(self, added: Tensor | None = None) -> Tensor:
        """Return the weight in float, (out, in), without a gradient and in memory of its own.

        Args:
            added: (out, groups), added to every weight of the group of inputs.
        """
        if self.floating is None or (self.quantized is not None and self.share == 1):
            assert self.quantized is not None
            return self.quantized.dequantize(added=added)
        weight = self.floating.detach()
        if self.is_float:
            weight = weight.clone()
        else:
            assert self.quantized is not None
            weight = self.quantized.dequantize(weight.dtype).lerp_(weight, 1 - self.share)
        if added is not None:
            weight.unflatten(1, (added.shape[1], -1)).add_(added.detach().unsqueeze(-1))
        return weight


def adapted_product(
    x: Tensor,
    frozen: FrozenWeight,
    bias: Tensor | None,
    updates: Sequence[tuple[slice, SiteAdapter | GradientProbe]],
    *,
    pool: int = 1,
) -> Tensor:
    """Apply a frozen linear layer with low-rank updates on slices of its rows.

    Under autocast the product runs in autocast's type; W and the updates are summed in float32 before.

    Args:
        x: inputs (..., in).
        frozen: the weight (out, in).
        bias: (out,) or None.
        updates: the rows of each site that has a rank above 0, and its adapter; likewise of its probe.
        pool: inputs per group on which the updates are constant, the same for all of them.

    Returns:
        Outputs (..., out).
    """
    if not updates and frozen.is_float:
        assert frozen.floating is not None
        return F.linear(x, frozen.floating, bias)
    if frozen.floating is not None and frozen.floating.requires_grad and torch.is_grad_enabled():
        raise UserError("a weight under an adapter is frozen; it can't be trained as well", field="weight")
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    result: Tensor
    with torch.autocast(device, enabled=False):
        spans = tuple(span for span, _ in updates)
        factors = [adapter.factors() for _, adapter in updates]
        if updates and pool == 1:
            result = _LowRankProduct.apply(x, frozen, bias, spans, dtype, *(part for pair in factors for part in pair))
            return result
        added = None
        if updates:
            added = factors[0][0].new_zeros(frozen.rows, x.shape[-1] // pool)  # (out, groups)
            for span, (left, right) in zip(spans, factors, strict=True):
                added[span] += left @ right
        result = _GroupedProduct.apply(x, added, frozen, bias, dtype)
    return result


class _GroupedProduct(torch.autograd.Function):
    """The update is constant on each group of inputs: dW[o, i] = added[o, group of i]; or there is none.

    So it joins the offsets when W is unpacked. With g = dL/dy (N, out) and p (N, groups) the inputs summed over their
    groups: dL/dx = g (W + dW), dL/dadded = g^T p. The factors' gradients follow from the latter, at no cost worth
    counting. Neither x nor a weight is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, frozen: FrozenWeight, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        x = x.to(dtype)
        pooled = None
        if added is not None and ctx.needs_input_grad[1]:
            pooled = x.reshape(-1, added.shape[1], x.shape[-1] // added.shape[1]).sum(-1)  # (N, groups)
        # The float weight is saved, not held, so that the backward pass lets go of it.
        ctx.save_for_backward(pooled, added, frozen.floating)
        ctx.quantized, ctx.share = frozen.quantized, frozen.share
        return F.linear(x, frozen.unpack(added).to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        pooled, added, floating = ctx.saved_tensors
        gradient = gradients[0]
        to_input = to_added = None
        if ctx.needs_input_grad[0]:
            weight = FrozenWeight(floating, ctx.quantized, ctx.share).unpack(added)
            to_input = gradient @ weight.to(gradient.dtype)
        gradient = gradient.reshape(-1, gradient.shape[-1])  # (N, out)
        if ctx.needs_input_grad[1]:
            to_added = (pooled.T @ gradient).T  # (out, groups)
        to_bias = gradient.sum(0) if ctx.needs_input_grad[3] else None
        return to_input, to_added, None, to_bias, None


class _LowRankProduct(torch.autograd.Function):
    """The update is any sum of left @ right on slices of rows.

    Only the skinny products of the factors' gradients are added in the backward pass. With g = dL/dy (N, out), x
    (N, in): dL/dx = g (W + dW), dL/dleft = g^T (x right^T), dL/dright = (g left)^T x.

    Every skinny product is written with the r rows on the left, (r, N) or (r, out): BLAS then streams the large
    factor once in its own order. With r columns on the right the same product takes three to five times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: FrozenWeight,
        bias: Tensor | None,
        rows: tuple[slice, ...],
        dtype: torch.dtype,
        *factors: Tensor,
    ) -> Tensor:
        total = _with_updates(frozen, rows, factors, dtype)
        x = x.to(dtype)
        again = not frozen.is_float
        ctx.save_for_backward(x, frozen.floating if again else total, *factors)
        ctx.rows, ctx.again, ctx.quantized, ctx.share = rows, again, frozen.quantized, frozen.share
        return F.linear(x, total, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, *factors = ctx.saved_tensors
        lefts, rights = factors[::2], factors[1::2]
        gradient = gradients[0].to(x.dtype)
        to_input = None
        if ctx.needs_input_grad[0]:
            if ctx.again:
                weight = _with_updates(FrozenWeight(weight, ctx.quantized, ctx.share), ctx.rows, factors, x.dtype)
            to_input = gradient @ weight
        x = x.reshape(-1, x.shape[-1])  # (N, in)
        gradient = gradient.reshape(-1, gradient.shape[-1])  # (N, out)
        inner = _stack(rights).to(x.dtype) @ x.T  # (sum of ranks, N)
        outer = _stack(
            [left.T.to(x.dtype) @ gradient[:, span].T for span, left in zip(ctx.rows, lefts, strict=True)]
        )  # (sum of ranks, N)
        to_rights = outer @ x  # (sum of ranks, in)
        to_factors: list[Tensor] = []
        start = 0
        for span, right in zip(ctx.rows, rights, strict=True):
            stop = start + right.shape[0]
            to_left = (inner[start:stop] @ gradient[:, span]).T  # (out_s, r)
            to_factors += [to_left, to_rights[start:stop]]
            start = stop
        to_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        return to_input, None, to_bias, None, None, *to_factors


def _with_updates(
    frozen: FrozenWeight, rows: tuple[slice, ...], factors: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    total = frozen.unpack()
    for span, left, right in zip(rows, factors[::2], factors[1::2], strict=True):
        total[span].addmm_(left.to(total.dtype), right.to(total.dtype))  # (out_s, in)
    return total.to(dtype)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
