"""Inputs times an adapted weight, y = x (W + dW)^T + bias, with W frozen; and the gradients.

There are two ways to add an update, and the shapes choose (`_Layer.forms_sum`). With many rows of x, W + dW is formed for the
forward pass and again for the backward pass, so that the large products stay one each, and nothing of W's size is kept
in between. With few rows, as with one image, forming it would take as long as the product itself; then the update is
two skinny products beside W's. A packed W is unpacked in any case, and the update joins it there.

Of the inputs, what the gradient of the update needs is kept: x, or what x was made from (`layer_input`), or the inputs
summed over groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_vit.adapters.frozen_weight import FrozenWeight
from peft_vit.adapters.layer_input import source_of
from peft_vit.adapters.low_rank import GradientProbe, SiteAdapter
from peft_vit.errors import UserError

_LEAST_VALUES = 1 << 17  # of an input: below, keeping it costs less than what computing it again takes to call
_VALUES_AT_ONCE = 1 << 21  # of an input that is computed again: 8 MB in float32


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
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    source = source_of(x) if x.numel() >= _LEAST_VALUES else None
    with torch.autocast(device, enabled=False):
        spans = tuple(span for span, _ in updates)
        factors = [adapter.factors() for _, adapter in updates]
        parameters = [part for pair in factors for part in pair]
        if pool > 1 and updates:
            added = factors[0][0].new_zeros(frozen.shape[0], x.shape[-1] // pool)  # (out, groups)
            for span, (left, right) in zip(spans, factors, strict=True):
                added[span] += left @ right
            parameters = [added]
        layer = _Layer(spans, pool, dtype, autocast, None if source is None else source.module)
        kept = x if source is None else source.values
        result: Tensor = _AdaptedProduct.apply(kept, x.detach(), frozen, layer, bias, *parameters)
    return result


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer during one pass.

    Attributes:
        spans: the rows of each update.
        pool: inputs per group on which the updates are constant.
        dtype: of the products.
        autocast: whether what makes its inputs runs under autocast to that type.
        module: makes its inputs x from what is kept; None if x itself is.
    """

    spans: tuple[slice, ...]
    pool: int
    dtype: torch.dtype
    autocast: bool
    module: nn.Module | None

    def forms_sum(self, frozen: FrozenWeight, rows: int) -> bool:
        """Whether W + dW is formed, once for the forward pass and once for the backward pass.

        That touches 2 in out values; two skinny products touch rows (in + out).
        """
        outputs, inputs = frozen.shape
        return self.pool > 1 or not frozen.is_float or rows * (inputs + outputs) > 2 * inputs * outputs

    def weight(self, frozen: FrozenWeight, parameters: Sequence[Tensor], *, summed: bool) -> Tensor:
        """Return W + dW, or W, (out, in) in the type of the products."""
        if self.pool > 1:
            return frozen.unpack(parameters[0] if parameters else None).to(self.dtype)
        if not summed:
            assert frozen.floating is not None
            return frozen.floating.detach().to(self.dtype)
        total = frozen.unpack()
        for span, left, right in zip(self.spans, parameters[::2], parameters[1::2], strict=True):
            total[span].addmm_(left.to(total.dtype), right.to(total.dtype))  # (out_s, in)
        return total.to(self.dtype)

    def inputs(self, kept: Tensor) -> Tensor:
        """Return x in the type of the products, as the forward pass had it."""
        if self.module is None:
            return kept.to(self.dtype)
        with torch.autocast(kept.device.type, self.dtype, enabled=self.autocast):
            made: Tensor = self.module(kept)
        return made.to(self.dtype)

    def needed(self, x: Tensor) -> Tensor:
        """Return what the gradients of the updates need of inputs (N, in): all, or sums over groups (N, groups)."""
        return x if self.pool == 1 else x.unflatten(-1, (-1, self.pool)).sum(-1)

    def gradients(
        self, needed: Tensor, gradient: Tensor, weight: Tensor | None, parameters: Sequence[Tensor], *, beside: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the gradients of the parameters and of x (N, in).

        Args:
            needed: of x, see there; (N, in) or (N, groups).
            gradient: of y, (N, out).
            weight: W + dW, or W alone with the update `beside`; None: x needs no gradient.
            parameters: the factors, or their product on groups.
            beside: whether the update is no part of the weight.
        """
        to_x = None if weight is None else gradient @ weight
        if not parameters:
            return [], to_x
        if self.pool > 1:
            return [(needed.T @ gradient).T], to_x  # (out, groups)
        lefts, rights = parameters[::2], _stack(parameters[1::2]).to(needed.dtype)
        inner = _by_update(rights @ needed.T, parameters)  # (r, N) each
        outer = _stack(
            [left.T.to(needed.dtype) @ gradient[:, span].T for span, left in zip(self.spans, lefts, strict=True)]
        )  # (sum of ranks, N)
        to_lefts = [(part @ gradient[:, span]).T for span, part in zip(self.spans, inner, strict=True)]  # (out_s, r)
        to_rights = _by_update(outer @ needed, parameters)  # (r, in)
        if beside and to_x is not None:
            to_x.addmm_(outer.T, rights)
        return [one for pair in zip(to_lefts, to_rights, strict=True) for one in pair], to_x


class _AdaptedProduct(torch.autograd.Function):
    """y = x (W + dW)^T + bias.

    With g = dL/dy (N, out), x (N, in), left (out, r), right (r, in):

        dL/dx = g (W + dW), dL/dleft = g^T (x right^T), dL/dright = (g left)^T x,

    and where the update is constant on groups of inputs, dW[o, i] = added[o, group of i], dL/dadded = g^T p with
    p (N, groups) the inputs summed over their groups.

    Every skinny product is written with the r rows on the left, (r, N) or (r, out): BLAS then streams the large
    factor once in its own order. With r columns on the right the same product takes three to five times as long.

    Where x = f(kept), what is returned for `kept` is dL/dkept: f's own backward pass is part of this one, some rows at
    a time, so that neither x nor dL/dx is there whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kept: Tensor,
        x: Tensor,
        frozen: FrozenWeight,
        layer: _Layer,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        x = x.to(layer.dtype)
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        summed = layer.forms_sum(frozen, len(rows))
        weight = layer.weight(frozen, parameters, summed=summed)
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        if not summed:
            inner = _stack(parameters[1::2]).to(x.dtype) @ rows.T  # (sum of ranks, N)
            flat = y.view(len(rows), -1)  # (N, out)
            for span, left, part in zip(layer.spans, parameters[::2], _by_update(inner, parameters), strict=True):
                flat[:, span].addmm_(part.T, left.T.to(x.dtype))  # (N, out_s)
        if layer.module is None:
            kept = layer.needed(rows) if parameters else x.new_empty(0)
        # The float weight is saved, not held, so that the backward pass lets go of it.
        ctx.save_for_backward(kept, frozen.floating, *parameters)
        ctx.quantized, ctx.share = frozen.quantized, frozen.share
        ctx.layer, ctx.summed, ctx.shape = layer, summed, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        kept, floating, *parameters = ctx.saved_tensors
        layer: _Layer = ctx.layer
        frozen = FrozenWeight(floating, ctx.quantized, ctx.share)
        gradient = gradients[0].reshape(-1, frozen.shape[0]).to(layer.dtype)  # (N, out)
        weight = layer.weight(frozen, parameters, summed=ctx.summed) if ctx.needs_input_grad[0] else None
        beside = not ctx.summed
        if layer.module is None:
            to_parameters, to_kept = layer.gradients(kept, gradient, weight, parameters, beside=beside)
        else:
            to_parameters, to_kept = _whole(layer, kept.reshape(len(gradient), -1), gradient, weight, parameters, beside)
        to_kept = None if to_kept is None else to_kept.view(ctx.shape)
        to_bias = gradient.sum(0) if ctx.needs_input_grad[4] else None
        return to_kept, None, None, None, to_bias, *to_parameters


def _whole(
    layer: _Layer, kept: Tensor, gradient: Tensor, weight: Tensor | None, parameters: Sequence[Tensor], beside: bool
) -> tuple[list[Tensor], Tensor | None]:
    """Return the gradients of the parameters and of what is kept, (N, in), in pieces of some rows.

    Args:
        layer: whose inputs are computed again.
        kept: what they are made from, (N, in).
        gradient: of y, (N, out).
        weight: see `_Layer.gradients`; so for `parameters` and `beside`.
    """
    pieces = -(-kept.numel() // _VALUES_AT_ONCE)
    if pieces == 1:
        return _piece(layer, kept, gradient, weight, parameters, beside)
    to_kept = None if weight is None else torch.empty_like(kept)
    totals = [torch.zeros_like(one) for one in parameters]
    step = -(-len(kept) // pieces)
    for start in range(0, len(kept), step):
        rows = slice(start, start + step)
        found, to_rows = _piece(layer, kept[rows], gradient[rows], weight, parameters, beside)
        for total, part in zip(totals, found, strict=True):
            total += part
        if to_kept is not None:
            to_kept[rows] = to_rows
    return totals, to_kept


def _piece(
    layer: _Layer, kept: Tensor, gradient: Tensor, weight: Tensor | None, parameters: Sequence[Tensor], beside: bool
) -> tuple[list[Tensor], Tensor | None]:
    with torch.enable_grad():
        leaf = kept.detach().requires_grad_(weight is not None)
        x = layer.inputs(leaf)  # (n, in)
    found, to_x = layer.gradients(layer.needed(x.detach()), gradient, weight, parameters, beside=beside)
    if to_x is not None:
        (to_x,) = torch.autograd.grad(x, leaf, to_x)
    return found, to_x


def _by_update(stacked: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Split (sum of ranks, ...) at each update."""
    return stacked.split([right.shape[0] for right in factors[1::2]])


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
