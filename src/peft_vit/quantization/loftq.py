"""A start of low-rank updates at the quantization error, so that W is close to Wq + D before training (LoftQ).

Source: LoftQ, arXiv 2310.08659, algorithm 1: quantize what the update leaves, D <- SVD_r(W - Wq), and again. Here D may
be constant on groups of g inputs, D[o, i] = P[o, i // g], as QA-LoRA has it (arXiv 2309.14717). With R = W - Wq and M
the means of R over its groups, (out, in / g), the cross terms vanish and

    ||R - D||_F^2 = ||R - M repeated||_F^2 + g ||M - P||_F^2

so the best P of rank r is M's truncated singular value decomposition (Eckart and Young 1936). At g = 1 it is LoftQ's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from peft_vit.quantization.tensor import QuantizedTensor

Factors = tuple[Tensor, Tensor]


@torch.no_grad()
def loftq(
    weight: Tensor,
    rounded: Callable[[Tensor], QuantizedTensor],
    parts: Sequence[tuple[slice, int]],
    *,
    pool: int = 1,
    iterations: int = 1,
) -> tuple[QuantizedTensor, list[Factors]]:
    """Return a quantized weight, and updates that come close to its error.

    The error need not fall from one iteration to the next, so the best of them is returned. It is never above that of
    quantizing alone. Computed in float64 on the CPU.

    Args:
        weight: (out, in).
        rounded: quantizes a matrix of that shape.
        parts: rows and rank of each update; query, key and value have their own.
        pool: g, inputs per group on which an update is constant.
        iterations: at least 1.

    Returns:
        The quantized weight, and for each part left (rows, r) and right (r, in / g), float32: left @ right is P.
    """
    exact = weight.detach().cpu().double()
    update = exact.new_zeros(len(exact), exact.shape[1] // pool)  # (out, in / g)
    least, best = math.inf, None
    for _ in range(iterations):
        quantized = rounded((exact - update.repeat_interleave(pool, 1)).to(weight))
        residual = exact - quantized.dequantize().cpu().double()
        means = residual.unflatten(1, (-1, pool)).mean(-1)  # (out, in) -> (out, in / g)
        factors = [_truncated(means[rows], rank) for rows, rank in parts]
        update = torch.zeros_like(means)
        for (rows, _), (left, right) in zip(parts, factors, strict=True):
            update[rows] = left @ right
        error = float(torch.linalg.vector_norm(residual - update.repeat_interleave(pool, 1)))
        if error < least:
            least, best = error, (quantized, factors)
    assert best is not None
    there = partial(Tensor.to, device=weight.device, dtype=torch.float32)
    return best[0], [(there(left), there(right)) for left, right in best[1]]


def _truncated(matrix: Tensor, rank: int) -> Factors:
    """Return left (out, r) and right (r, in) of the best approximation of a rank, of equal size."""
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    root = sizes[:rank].sqrt()
    return left[:, :rank] * root, root.unsqueeze(1) * right[:rank]
