"""From float weights to codes, scales and offsets: round to nearest on groups of inputs, or compensate errors (GPTQ).

Scales and offsets are rounded outwards to their stored dtype first (scales up, offsets down), and codes are
chosen against the stored numbers. So no weight lies outside its group's range of codes, and its error is at
most half the gap between neighbouring codes, in float16 as in float32. A group's minimum and largest
magnitude are float32 numbers already: with float32 scales, only the scale of integer codes is rounded at all.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import scipy
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from peft_vit.base.errors import UserError
from peft_vit.core.quantization.formats import QuantizationFormat, warn_of_scales
from peft_vit.core.quantization.packing import pack_codes
from peft_vit.core.quantization.tensor import QuantizedTensor, rows_at_once

# A group's range, its scale and every step of computing a weight from them stay finite in float32 below this.
_LARGEST_MAGNITUDE = 2.0**125
# bitsandbytes takes the reciprocal of at least this, so that a group of zeros does not divide by zero.
_SMALLEST_SCALE = 1e-38
DAMPING = 0.01  # of the mean of the Hessian's diagonal
_BLOCKS = (128, 16)  # columns whose updates reach those behind them, in the block before, together in one product


@torch.no_grad()
def quantize(weight: Tensor, format: QuantizationFormat, *, name: str = "the weight") -> QuantizedTensor:
    """Round weights to the nearest that the format can store.

    With b bits, and minimum, maximum and largest magnitude taken over a group:

    - codebooks: scale = largest magnitude; the code of the value nearest to w / scale; offset, if any, = 0.
    - integers with offset: offset = minimum; scale = (maximum - offset) / (2^b - 1);
      c = round((w - offset) / scale).
    - integers without: scale = largest magnitude / (2^(b-1) - 1); c = round(w / scale) + 2^(b-1).

    Integers are computed in float64 and round halves to even, codebooks in float32 as bitsandbytes computes
    them; all on the CPU, so that the codes do not depend on the device. A constant group of integers with a
    float32 offset has scale 0 and codes 0, and is exact.

    Args:
        weight: floating point, (out, in), not empty; taken as float32.
        format: the format to store it in; its group size divides `in`.
        name: of the layer, in the `UnderflowWarning` that says where float16 scales are too coarse, see `formats`.

    Returns:
        The quantized weights, on the weight's device.

    Raises:
        UserError: if the group size does not divide `in`; if a weight is infinite, NaN or above 2^125 in
            magnitude; if a scale or an offset overflows the format's scale_dtype.
    """
    rows, columns = weight.shape
    groups = format.groups(columns)
    # (some of out, in) -> (some, groups, group size)
    row_blocks = [part.unflatten(1, (groups, -1)) for part in weight.detach().split(rows_at_once(weight))]
    parts = (_ranges(part, format) for part in row_blocks)
    largest, scales, offsets = (torch.cat(part) for part in zip(*parts, strict=True))  # (out, groups) each
    warn_of_scales(largest, format, name)
    step = len(row_blocks[0])
    of_rows = zip(row_blocks, scales.split(step), offsets.split(step), strict=True)
    codes = torch.cat([_codes(*part, format) for part in of_rows])  # (out, bytes)
    return QuantizedTensor(codes, scales, offsets if format.offset else None, (rows, columns), format).to(weight.device)


def _ranges(weights: Tensor, format: QuantizationFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest magnitudes, scales and offsets, (out, groups) each, of some rows, (out, groups, group size).

    Scales and offsets are rounded to scale_dtype; offsets are 0 but for integers of a format that has some.
    """
    weights = weights.cpu().float()
    largest = weights.abs().amax(-1)  # (out, groups)
    if not bool((largest <= _LARGEST_MAGNITUDE).all()):
        raise UserError("the weights hold infinities, NaN or magnitudes above 2^125; check their source")
    offsets = torch.zeros_like(largest, dtype=format.scale_dtype)
    ranges = largest.double()
    if format.offset and not format.has_codebook:
        offsets = _round_outwards(weights.amin(-1).double(), format.scale_dtype, -math.inf)
        ranges = weights.amax(-1).double() - offsets.double()  # (out, groups)
    return largest, _round_outwards(ranges / format.steps, format.scale_dtype, math.inf), offsets


def _codes(weights: Tensor, scales: Tensor, offsets: Tensor, format: QuantizationFormat) -> Tensor:
    """Return the packed codes of some rows, (out, groups, group size), for their scales and offsets, (out, groups).

    Of codes that are as near, that of the lower value is taken.
    """
    weights, scales, offsets = weights.cpu().float(), scales.unsqueeze(-1), offsets.unsqueeze(-1)  # (out, groups, 1)
    if format.has_codebook:
        values, order = format.values().sort(stable=True)  # (codes,) each
        scaled = (weights * (1.0 / scales.float().clamp(min=_SMALLEST_SCALE))).clamp_(-1, 1)
        codes = order.to(torch.uint8)[torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True)]
    else:
        divisors = torch.where(scales > 0, scales.double(), 1.0)  # a group of scale 0 has nothing to divide
        places = ((weights.double() - offsets.double()) / divisors).round_()  # (out, groups, group size)
        codes = (places.clamp_(-format.steps if format.zero else 0, format.steps) + format.zero).to(torch.uint8)
    return pack_codes(codes.flatten(1), format.bits)  # (out, groups, group size) -> (out, in) -> bytes


def _round_outwards(numbers: Tensor, dtype: torch.dtype, direction: float) -> Tensor:
    """Round float64 numbers to a dtype: up if the direction is inf, down if it is -inf.

    Raises:
        UserError: if one overflows.
    """
    largest = float(numbers.abs().max())
    if largest > torch.finfo(dtype).max:
        raise UserError(
            f"a scale or an offset of magnitude {largest:.6g} exceeds the largest {dtype}, "
            f"{torch.finfo(dtype).max:.6g}; use torch.float32",
            field="scale_dtype",
        )
    rounded = numbers.to(dtype)
    inside = rounded.double() < numbers if direction > 0 else rounded.double() > numbers
    return torch.where(inside, torch.nextafter(rounded, torch.full_like(rounded, direction)), rounded)


@torch.no_grad()
def quantize_with_compensation(
    weight: Tensor, format: QuantizationFormat, hessian: Tensor, *, name: str = "the weight"
) -> QuantizedTensor:
    """Choose codes for a small error of the layer's outputs, ||X W^T - X Wq^T||_F^2, rather than of each weight.

    Scales and offsets are those of `quantize`, from the float weights beforehand, and only codes are chosen again:
    so it works with every format. A weight that compensation moves out of its group's range gets the outermost code.
    With H the damped Hessian and U upper triangular, U^T U = H^-1, columns j = 1..in are rounded in order:

        Wq_j = nearest(W_j),   e_j = (W_j - Wq_j) / U_jj,   W_k <- W_k - e_j U_jk  for all k > j

    It is computed in float64 on the CPU. Source: GPTQ, arXiv 2210.17323, algorithm 1, with its damping of 1 % and its
    blocks of 128 columns, here each of blocks of 16.

    Args:
        weight: floating point, (out, in).
        format: the format to store it in; its group size divides `in`.
        hessian: H = 2 X^T X of the squared error, (in, in), with X (N, in) the layer's inputs; damping is added here.
            Any factor on it cancels.
        name: of the layer, in warnings and errors.

    Returns:
        The quantized weights, on the weight's device.

    Raises:
        UserError: as `quantize`; if the Hessian holds infinities or NaN.
    """
    rounded = quantize(weight, format, name=name)
    if not bool(hessian.any()):
        return rounded  # inputs are all zero: any codes are as good
    factor = _inverse_factor(hessian.cpu().double(), name)
    levels, codes_of_levels = format.values().double().sort(stable=True)  # (levels,)
    if format.zero:  # code 0 is never used
        levels, codes_of_levels = levels[1:], codes_of_levels[1:]
    middles = (levels[:-1] + levels[1:]) / 2  # (levels - 1,)
    columns, groups = weight.shape[1], rounded.scales.shape[1]
    group_of = torch.arange(columns) // (columns // groups)  # (in,)
    scales = rounded.scales.cpu().double().T[group_of]  # (in, out)
    divisors = torch.where(scales > 0, scales, 1.0)
    offsets = None if rounded.offsets is None else rounded.offsets.cpu().double().T[group_of]
    rest = weight.detach().cpu().double().T.contiguous()  # (in, out): a column lies in one piece
    errors, places = torch.empty_like(rest), torch.empty(rest.shape, dtype=torch.int64)

    def compensate(start: int, stop: int, blocks: tuple[int, ...]) -> None:
        if not blocks:
            for j in range(start, stop):
                wished = rest[j] if offsets is None else rest[j] - offsets[j]  # (out,)
                torch.bucketize(wished / divisors[j], middles, out=places[j])  # on a tie the lower value's
                torch.addcmul(wished, levels[places[j]], scales[j], value=-1, out=errors[j]).div_(diagonal[j])
                rest[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j], alpha=-1)
            return
        for begin in range(start, stop, blocks[0]):
            end = min(begin + blocks[0], stop)
            compensate(begin, end, blocks[1:])
            # (columns behind, block) @ (block, out)
            rest[end:stop].addmm_(factor[begin:end, end:stop].T, errors[begin:end], alpha=-1)

    diagonal = factor.diagonal().tolist()
    compensate(0, columns, _BLOCKS)
    codes = codes_of_levels.to(torch.uint8)[places]  # (in, out)
    packed = pack_codes(codes.T.contiguous(), format.bits)  # (in, out) -> (out, bytes)
    return replace(rounded, codes=packed.to(weight.device))


def _inverse_factor(hessian: Tensor, name: str) -> Tensor:
    """Return U (in, in), upper triangular, with U^T U the inverse of the damped Hessian."""
    mean = float(hessian.diagonal().mean())
    if not bool(hessian.isfinite().all()):
        raise UserError(f"the inputs of {name} hold infinities or NaN on the calibration images", field="rounding")
    damped = hessian.flip(0, 1)  # (in, in), as all that follow
    damped.diagonal().add_(DAMPING * mean)
    # H = V V^T with V upper triangular, so U = V^-1: half the time of inverting H and factoring again
    upper = torch.linalg.cholesky(damped).flip(0, 1)
    del damped
    with threadpool_limits(torch.get_num_threads(), user_api="blas"):
        inverse, _ = scipy.linalg.lapack.dtrtri(upper.numpy(), lower=0, overwrite_c=1)
    return torch.from_numpy(np.ascontiguousarray(inverse))
