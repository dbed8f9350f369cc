"""Inputs times an adapted weight whose frozen part is multiplied in integers, and the gradients.

    y = x^ W^T + s (x^ A^T) B^T + bias,  x^ = t q the inputs as they were rounded, row by row,

so that the adapters learn on what integer hardware computes, and of the inputs the codes are kept alone: a byte each.
Rounding has the derivative 1. Adapters and their gradients are float products of few rows. With g = dL/dy (N, out):

    dL/dx = g W + (g B) A, dL/dA = (g B)^T x^, dL/dB = g^T (x^ A^T).

All that goes over (N, out) or (N, in) is done a few rows at a time, which stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_vit.adapters.low_rank import GradientProbe, SiteAdapter
from peft_vit.quantization.integers import IntegerWeight, quantize_rows

_VALUES_AT_ONCE = 3 << 17  # of a product: 1.6 MB in float32


def integer_product(
    x: Tensor,
    weight: IntegerWeight,
    bias: Tensor | None,
    updates: Sequence[tuple[slice, SiteAdapter | GradientProbe]],
    *,
    pool: int = 1,
) -> Tensor:
    """Apply a linear layer whose frozen weight is multiplied in integers, with low-rank updates on slices of its rows.

    Under autocast the updates' products run in autocast's type, which the outputs have.

    Args:
        x: inputs (..., in).
        weight: (out, in).
        bias: (out,) or None.
        updates: the rows of each site that has a rank above 0, and its adapter; likewise of its probe.
        pool: inputs per group on which the updates are constant, the same for all of them.

    Returns:
        Outputs (..., out).
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        factors = []
        for _, adapter in updates:
            left, right = adapter.factors()  # (out_s, r), (r, in / pool)
            factors += [left, right if pool == 1 else right.repeat_interleave(pool, 1)]  # (r, in)
        spans = tuple(span for span, _ in updates)
        result: Tensor = _IntegerProduct.apply(x, weight, bias, spans, dtype, *factors)
    return result


class _IntegerProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: IntegerWeight,
        bias: Tensor | None,
        spans: tuple[slice, ...],
        dtype: torch.dtype,
        *factors: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
        scales = torch.empty(len(rows), 1, device=x.device)
        for part in _parts(len(rows), rows.shape[1]):
            codes[part], scales[part] = quantize_rows(rows[part])
        inner: tuple[Tensor, ...] = ()
        if factors:
            rights = torch.cat(factors[1::2]).to(dtype)  # (sum of ranks, in)
            inner = (rights @ codes.to(dtype).T).mul_(scales.T).split([len(right) for right in factors[1::2]])  # (r, N)
        lefts = [left.T.to(dtype) for left in factors[::2]]  # (r, out_s)
        y = torch.empty(len(rows), len(weight.codes), dtype=dtype, device=x.device)  # (N, out)
        for part in _parts(len(rows), y.shape[1]):
            product = torch._int_mm(codes[part], weight.codes.T).float().mul_(scales[part])  # (n, out)
            if bias is None:
                product.mul_(weight.scales)
            else:
                torch.addcmul(bias.float(), product, weight.scales, out=product)
            y[part] = product
            for span, left, of_update in zip(spans, lefts, inner, strict=True):
                y[part, span].addmm_(of_update[:, part].T, left)  # (n, r) @ (r, out_s)
        ctx.save_for_backward(codes, scales, *inner, *factors)
        ctx.weight, ctx.spans, ctx.shape, ctx.dtype = weight, spans, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        count, weight = len(ctx.spans), ctx.weight
        codes, scales, *rest = ctx.saved_tensors
        inner, factors = rest[:count], rest[count:]
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])  # (N, out)
        dtype = gradient.dtype
        to_factors: list[Tensor] = []
        if factors:
            outer = torch.cat(  # (sum of ranks, N): the gradients of the inner products
                [left.T.to(dtype) @ gradient[:, span].T for span, left in zip(ctx.spans, factors[::2], strict=True)]
            )
            to_rights = ((outer * scales.T.to(dtype)) @ codes.to(dtype)).split([len(part) for part in inner])  # (r, in)
            for span, of_update, to_right in zip(ctx.spans, inner, to_rights, strict=True):
                to_factors += [(of_update @ gradient[:, span]).T.float(), to_right.float()]  # (out_s, r), (r, in)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = torch.empty(codes.shape, dtype=ctx.dtype, device=codes.device)  # (N, in)
            rights = torch.cat(factors[1::2]).to(dtype) if factors else None  # (sum of ranks, in)
            for part in _parts(len(gradient), max(gradient.shape[1], to_x.shape[1])):
                scaled, of_rows = quantize_rows(gradient[part].float() * weight.scales)  # (n, out), (n, 1)
                product = torch._int_mm(scaled, weight.codes).float().mul_(of_rows).to(dtype)  # (n, in)
                to_x[part] = product if rights is None else product.addmm_(outer[:, part].T, rights)
            to_x = to_x.view(ctx.shape)
        to_bias = gradient.float().sum(0) if ctx.needs_input_grad[2] else None  # (out,)
        return to_x, None, to_bias, None, None, *to_factors


def _parts(rows: int, width: int) -> Iterator[slice]:
    """Yield the rows that are taken at a time."""
    step = max(32, _VALUES_AT_ONCE // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
