"""Rows of a small matrix in 1 to 8 bits with a scale each: what adapters and heads are stored in.

With b bits, a row w becomes codes c of 0 to 2^b - 1 and a scale s, and stands for s u with

    u = c - (2^b - 1) / 2                   ..., -3/2, -1/2, 1/2, 3/2, ...

No level is zero, so one bit is a sign; with s / 2 the mean of |w| its squared error is the least (XNOR-Net, arXiv
1603.05279, eq. 6; adapters of one bit: 2307.16867). With more bits, codes and scale are made the best for each other in
turn (Lloyd 1982): c that is nearest to w / s, then s = <w, u> / <u, u>. The first s is the best one for a normal
distribution (Max 1960, table II), or where no value lies outside, if that is less.

256 s is stored as float16, which holds s from 2.4e-7 to 255 in full precision.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_vit.base.errors import DivergedError, UserError
from peft_vit.core.quantization.packing import pack_codes, row_bytes, unpack_codes

_STEPS = 8  # of turns; afterwards scales of normal rows move by less than a hundredth
_OF_NORMAL = {1: 1.596, 2: 0.9957, 4: 0.3352, 8: 0.0308}  # the best scale over the standard deviation, by bits
_UNIT = 256.0


@torch.no_grad()
def round_rows(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the codes of rows (rows, n), uint8, and 256 times their scales (rows,), float16.

    Raises:
        DivergedError: if a value is not finite, or above 127 in magnitude.
    """
    rows = rows.detach().float()
    middle = (2**bits - 1) / 2
    scales = torch.minimum(rows.abs().amax(1) / middle, _OF_NORMAL[bits] * rows.square().mean(1).sqrt())  # (rows,)
    codes = torch.empty(0)
    for _ in range(_STEPS if bits > 1 else 1):
        codes = _codes(rows, scales, bits)
        levels = codes - middle  # (rows, n)
        scales = (rows * levels).sum(1) / levels.square().sum(1)
    stored = (scales * _UNIT).half()
    if not bool(stored.isfinite().all()):
        raise DivergedError("values are not finite or above 127, too large for few bits; lower the learning rate")
    return (codes if bits == 1 else _codes(rows, stored.float() / _UNIT, bits)).to(torch.uint8), stored


def _codes(rows: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the nearest codes, (rows, n) of floats; of a row of zeros any."""
    least = torch.finfo(torch.float32).tiny
    return (rows / scales.clamp(min=least).unsqueeze(1) + 2 ** (bits - 1)).floor().clamp(0, 2**bits - 1)


def row_values(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the values of codes and 256 times their scales, which are of one shape or broadcast to it; float32."""
    return (codes.float() - (2**bits - 1) / 2) * (scales.float() / _UNIT)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bits: int) -> Tensor:
        if bits == 16:
            return rows.half().float()
        codes, scales = round_rows(rows, bits)
        return row_values(codes, scales.unsqueeze(1), bits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def rounded_rows(rows: Tensor, bits: int) -> Tensor:
    """Return rows (rows, n) as `bits` store them; 16: as float16.

    Their gradient is that of what was rounded (straight-through estimator, arXiv 1308.3432).
    """
    rounded: Tensor = _Rounded.apply(rows, bits)
    return rounded


def pack_rows(matrices: list[Tensor], bits: int) -> dict[str, Tensor]:
    """Return matrices (rows, n), whose rows may differ in length, as two tensors of one dimension.

    Of 1 to 8 bits "codes", packed one after the other, and "scales", one a row; of 16 and 32 "codes" are floats.
    """
    if bits > 8:
        dtype = torch.float16 if bits == 16 else torch.float32
        values = torch.cat([matrix.detach().flatten() for matrix in matrices] or [torch.empty(0)]).to(dtype)
        if not bool(values.isfinite().all()):
            raise UserError(f"holds values that {bits} bits can't store; train it again")
        return {"codes": values}
    rounded = [round_rows(matrix, bits) for matrix in matrices if matrix.numel()]
    if not rounded:
        return {"codes": torch.empty(0, dtype=torch.uint8), "scales": torch.empty(0, dtype=torch.float16)}
    codes = torch.cat([codes.flatten() for codes, _ in rounded])  # (values,)
    return {"codes": pack_codes(codes.unsqueeze(0), bits)[0], "scales": torch.cat([scales for _, scales in rounded])}


@functools.cache
def _levels(bits: int) -> Tensor:
    """Return what the codes in each of the 256 bytes stand for at scale 1, (256, codes a byte)."""
    codes = unpack_codes(torch.arange(256, dtype=torch.uint8).unsqueeze(1), bits, 8 // bits)
    return row_values(codes, torch.tensor(_UNIT), bits) / _UNIT


def unpack_rows(tensors: Mapping[str, Tensor], shapes: list[tuple[int, int]], bits: int) -> list[Tensor]:
    """Return the float32 matrices of these shapes that `pack_rows` has packed.

    Raises:
        UserError: if the tensors are not those of such matrices.
    """
    sizes = [rows * columns for rows, columns in shapes]
    rows, values = sum(rows for rows, columns in shapes if columns), sum(sizes)
    stored = {16: torch.float16, 32: torch.float32}.get(bits)
    expected: dict[str, tuple[torch.dtype, int]] = {"codes": (stored or torch.uint8, values)}
    if stored is None:
        expected = {"codes": (torch.uint8, row_bytes(values, bits)), "scales": (torch.float16, rows)}
    if {name: (tensor.dtype, *tensor.shape) for name, tensor in tensors.items()} != expected:
        raise UserError("its tensors are not those that its header names; export the run again")
    if stored is not None:
        return [part.float().view(shape) for part, shape in zip(tensors["codes"].split(sizes), shapes, strict=True)]
    if not values:
        return [torch.empty(shape) for shape in shapes]
    lengths = torch.tensor([columns for rows, columns in shapes for _ in range(rows)])  # (all rows,)
    scales = tensors["scales"].float().repeat_interleave(lengths, output_size=values)  # (values,)
    flat = _levels(bits).index_select(0, tensors["codes"].int()).flatten()  # (bytes, codes a byte) -> (all codes,)
    flat = flat[:values] * scales  # (values,)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
