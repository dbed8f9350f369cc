"""Inputs times an adapted weight whose frozen part is multiplied in integers, and the gradients.

    y = x^ W^T + s (x^ A^T) B^T + bias,  x^ = t q the inputs as they were rounded, row by row,

so that the adapters learn on what integer hardware computes, and of the inputs the codes are kept alone: a byte each.
Where x = f(s), see `remember_sources`, they are made again of s, which f keeps in any case. Rounding has the
derivative 1. Adapters and their gradients are float products of few rows. With g = dL/dy (N, out):

    dL/dx = g W + (g B) A, dL/dA = (g B)^T x^, dL/dB = g^T (x^ A^T).

All that goes over (N, out) or (N, in) is done a few rows at a time, which stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_vit.core.adapters.adapted_product import LEAST_VALUES, source_of_input
from peft_vit.core.adapters.low_rank import RowUpdate
from peft_vit.core.quantization.integers import Int8Weight, quantize_rows, reused_memory

_VALUES_AT_ONCE = 3 << 17  # of a product: 1.6 MB in float32


def int8_linear(
    x: Tensor, weight: Int8Weight, bias: Tensor | None, updates: Sequence[RowUpdate], *, pool: int = 1
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
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    source = source_of_input(x) if updates and x.numel() >= LEAST_VALUES else None
    # Of the source the function alone is held until the backward pass: its values hang on a graph.
    values, made_by = (None, None) if source is None else (source.values.detach(), source.function)

    def recomputed(part: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=autocast):
            return made_by(part)  # type: ignore[misc]

    function = None if made_by is None else recomputed
    with torch.autocast(device, enabled=False):
        factors = []
        for _, adapter in updates:
            left, right = adapter.factors()  # (out_s, r), (r, in / pool)
            factors += [left, right if pool == 1 else right.repeat_interleave(pool, 1)]  # (r, in)
        spans = tuple(span for span, _ in updates)
        result: Tensor = _IntegerProduct.apply(x, weight, bias, spans, dtype, values, function, *factors)
    return result


class _IntegerProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Int8Weight,
        bias: Tensor | None,
        spans: tuple[slice, ...],
        dtype: torch.dtype,
        source: Tensor | None,
        function: Callable[[Tensor], Tensor] | None,
        *factors: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        left, right, inner = None, None, None
        if factors:
            left, right = _concatenate(factors, spans, len(weight.codes), dtype)
            inner = torch.empty(len(right), len(rows), dtype=dtype, device=x.device)  # (R, N)
        codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)  # (N, in)
        scales = torch.empty(len(rows), 1, device=x.device)
        for part, values in _quantized_parts(rows, codes, scales, dtype):
            if inner is not None and right is not None:
                inner[:, part] = right @ values.to(dtype).T  # (R, in) @ (in, n)
        if inner is not None:
            inner.mul_(scales.T)
        outputs = torch.empty(*x.shape[:-1], len(weight.codes), dtype=dtype, device=x.device)  # (..., out)
        y = outputs.view(len(rows), len(weight.codes))  # (N, out), of the same memory
        for part in _parts(rows, y.shape[1]):
            product = weight.multiply(codes[part])  # (n, out)
            sums = y[part] if dtype == torch.float32 else product
            if bias is None:
                torch.mul(product, scales[part], out=sums)
            else:
                torch.addcmul(bias, product, scales[part], out=sums)
            if dtype != torch.float32:
                y[part] = sums
            if inner is not None and left is not None:
                y[part].addmm_(inner[:, part].T, left)  # (n, R) @ (R, out)
        saved = codes if factors and function is None else None
        ctx.save_for_backward(saved, scales, left, right, inner, source)
        ctx.weight, ctx.spans, ctx.shape, ctx.dtype, ctx.function = weight, spans, x.shape, x.dtype, function
        ctx.ranks = [len(factor) for factor in factors[1::2]]
        return outputs  # no view, since some models add to it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight = ctx.weight
        codes, scales, left, right, inner, source = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])  # (N, out)
        dtype, outer = gradient.dtype, None
        grad_factors: list[Tensor] = []
        if inner is not None:
            outer = left @ gradient.T  # (R, out) @ (out, N): the gradient of the inner products
            grad_lefts = (inner @ gradient).split(ctx.ranks)  # (R, N) @ (N, out)
            grad_rights = torch.zeros(len(outer), ctx.shape[-1], device=gradient.device)  # (R, in)
            scaled = outer * scales.T.to(dtype)
            if codes is None:
                source = source.reshape(-1, source.shape[-1])  # (N, in)
                codes = torch.empty(source.shape, dtype=torch.int8, device=source.device)
                parts = _quantized_parts(source, codes, torch.empty_like(scales), dtype, ctx.function)
            else:
                whole = _parts(codes, codes.shape[1]) if dtype == torch.float32 else [slice(None)]
                parts = ((part, codes[part]) for part in whole)
            for part, values in parts:
                grad_rights += scaled[:, part] @ values.to(dtype)  # (R, n) @ (n, in)
            for span, grad_left, grad_right in zip(ctx.spans, grad_lefts, grad_rights.split(ctx.ranks), strict=True):
                grad_factors += [grad_left[:, span].T.float(), grad_right]  # (out_s, r), (r, in)
        grad_x = None
        if ctx.needs_input_grad[0]:
            device = gradient.device
            grad_x = torch.empty(len(gradient), ctx.shape[-1], dtype=ctx.dtype, device=device)  # (N, in)
            if outer is not None:
                outer, right = outer.to(ctx.dtype), right.to(ctx.dtype)
            for part in _parts(gradient, max(gradient.shape[1], grad_x.shape[1])):
                shape = gradient[part].shape  # (n, out)
                scaled = reused_memory("values", shape, torch.float32, device)
                torch.mul(_in_float("values", gradient[part]), weight.scales, out=scaled)
                gradient_codes, gradient_scales = quantize_rows(
                    scaled, reused_memory("codes", shape, torch.int8, device), scaled
                )
                product = weight.multiply_back(gradient_codes)  # (n, in)
                if grad_x.dtype == torch.float32:
                    torch.mul(product, gradient_scales, out=grad_x[part])
                else:
                    grad_x[part] = product.mul_(gradient_scales)
                if outer is not None:
                    grad_x[part].addmm_(outer[:, part].T, right)  # (n, R) @ (R, in)
            grad_x = grad_x.view(ctx.shape)
        grad_bias = gradient.float().sum(0) if ctx.needs_input_grad[2] else None  # (out,)
        return grad_x, None, grad_bias, None, None, None, None, *grad_factors


def _quantized_parts(
    rows: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype, function: Callable[[Tensor], Tensor] | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Write codes (N, in) and scales (N, 1) of rows, or of what a function makes of them; yield codes to multiply with.

    For products in float32 they come some rows at a time, while they are in the processor's cache; for those in bf16
    all at once, since such products are so fast that their number counts.
    """
    for part in _parts(rows, rows.shape[1]):
        x = rows[part] if function is None else function(rows[part])
        values = reused_memory("values", x.shape, torch.float32, x.device)
        _, scales[part] = quantize_rows(_in_float("values", x), codes[part], values)
        if dtype == torch.float32:
            yield part, values
    if dtype != torch.float32:
        yield slice(None), codes


def _concatenate(
    factors: Sequence[Tensor], spans: Sequence[slice], outputs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the factors of all updates as one, (R, out) with zeros where an update has no rows, and (R, in)."""
    right = torch.cat(list(factors[1::2])).to(dtype) if len(spans) > 1 else factors[1].to(dtype)
    if len(spans) == 1 and len(factors[0]) == outputs:
        return factors[0].T.to(dtype), right
    left = torch.zeros(len(right), outputs, dtype=dtype, device=right.device)
    start = 0
    for span, of_update in zip(spans, factors[::2], strict=True):
        rank = of_update.shape[1]
        left[start : start + rank, span] = of_update.T
        start += rank
    return left, right


def _in_float(name: str, x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 else reused_memory(name, x.shape, torch.float32, x.device).copy_(x)


def _parts(x: Tensor, width: int) -> Iterator[slice]:
    """Yield the rows that are taken at a time, about as many each time; elsewhere than on a CPU all of them."""
    rows = len(x)
    count = max(1, round(rows * width / _VALUES_AT_ONCE)) if x.device.type == "cpu" else 1
    for part in range(count):
        yield slice(part * rows // count, (part + 1) * rows // count)
