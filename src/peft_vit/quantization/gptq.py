"""Rounding that compensates errors: each column's is made up for by the columns that are still to be rounded (GPTQ).

Source: GPTQ, arXiv 2210.17323, algorithm 1, with its damping of 1 % and its blocks of 128 columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from peft_vit.errors import UserError
from peft_vit.quantization.codebooks import Codebook, code_values
from peft_vit.quantization.formats import QuantizationFormat
from peft_vit.quantization.packing import pack_codes
from peft_vit.quantization.quantizer import quantize
from peft_vit.quantization.tensor import QuantizedTensor

DAMPING = 0.01  # of the mean of the Hessian's diagonal
_BLOCK = 128  # columns whose updates reach those behind them together, in one product


@torch.no_grad()
def quantize_with_compensation(
    weight: Tensor, format: QuantizationFormat, hessian: Tensor, *, name: str = "the weight"
) -> QuantizedTensor:
    """Choose codes for a small error of the layer's outputs, ||X W^T - X Wq^T||_F^2, rather than of each weight.

    Scales and offsets are those of `quantize`, taken from the float weights beforehand, and only codes are chosen anew:
    so it works with every format. A weight that compensation moves out of its group's range gets the outermost code.
    With H the damped Hessian and U upper triangular, U^T U = H^-1, columns j = 1..in are rounded in order:

        Wq_j = nearest(W_j),   e_j = (W_j - Wq_j) / U_jj,   W_k <- W_k - e_j U_jk  for all k > j

    It is computed in float64 on the CPU.

    Args:
        weight: floating point, (out, in).
        format: the format to store it in; its group size divides `in`.
        hessian: H = 2 X^T X of the squared error, (in, in), with X (N, in) the layer's inputs; damping is added here.
            Any factor on it cancels.
        name: of the layer, in warnings and errors.

    Returns:
        The quantized weights, on the weight's device.

    Raises:
        UserError: as `quantize`; if the Hessian holds infinities or NaN, or is zero.
    """
    rounded = quantize(weight, format, name=name)
    factor = _inverse_factor(hessian.cpu().double(), name)
    levels, codes_of_levels = _levels(format)
    middles = (levels[:-1] + levels[1:]) / 2
    columns, groups = weight.shape[1], rounded.scales.shape[1]
    group_of = torch.arange(columns) // (columns // groups)
    scales = rounded.scales.cpu().double().T[group_of]  # (in, out)
    offsets = torch.zeros_like(scales) if rounded.offsets is None else rounded.offsets.cpu().double().T[group_of]
    rest = weight.detach().cpu().double().T.contiguous()  # (in, out): a column lies in one piece
    codes = torch.empty(rest.shape, dtype=torch.uint8)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty_like(rest[start:stop])  # (block, out)
        for j in range(start, stop):
            scaled = (rest[j] - offsets[j]) / torch.where(scales[j] > 0, scales[j], 1.0)  # (out,)
            places = torch.bucketize(scaled, middles)  # on a tie the lower value's
            codes[j], values = codes_of_levels[places], levels[places] * scales[j] + offsets[j]
            errors[j - start] = (rest[j] - values) / factor[j, j]
            rest[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)  # (rest, block) @ (block, out)
    packed = pack_codes(codes.T.contiguous(), format.bits)
    return replace(rounded, codes=packed.to(weight.device))


def _inverse_factor(hessian: Tensor, name: str) -> Tensor:
    """Return U (in, in), upper triangular, with U^T U the inverse of the damped Hessian."""
    mean = float(hessian.diagonal().mean())
    if not bool(hessian.isfinite().all()):
        raise UserError(f"the inputs of {name} hold infinities or NaN on the calibration images", field="rounding")
    if mean <= 0:
        raise UserError(
            f"gptq has no effect on {name}: its inputs are all zero on the calibration images; leave it out of targets",
            field="rounding",
        )
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _levels(format: QuantizationFormat) -> tuple[Tensor, Tensor]:
    """Return what codes stand for before scale and offset, in rising order, (levels,) float64, and the codes, uint8."""
    if format.has_codebook:
        values, codes = code_values(cast(Codebook, format.type)).double().sort(stable=True)
        return values, codes.to(torch.uint8)
    if format.offset:
        codes = torch.arange(2**format.bits)
        return codes.double(), codes.to(torch.uint8)
    codes = torch.arange(1, 2**format.bits)  # code 0 is never used
    return (codes - 2 ** (format.bits - 1)).double(), codes.to(torch.uint8)
