"""From float weights to codes, scales and offsets: round to nearest on groups of inputs.

Scales and offsets are rounded outwards to their stored dtype first (scales up, offsets down), and codes are
chosen against the stored numbers. So no weight lies outside its group's range of codes, and its error is at
most half the gap between neighbouring codes, in float16 as in float32. A group's minimum and largest
magnitude are float32 numbers already: with float32 scales, only the scale of integer codes is rounded at all.

Scales in 8 bits (double_quant) are these numbers rounded to nearest, as bitsandbytes does, so that a group's largest
weights may lie outside by a little and are clipped; codes are chosen against the scales that the 8 bits stand for.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from peft_vit.errors import UserError
from peft_vit.quantization.codebooks import Codebook, nearest_codes
from peft_vit.quantization.formats import QuantizationFormat
from peft_vit.quantization.packing import pack_codes
from peft_vit.quantization.scales import QuantizedScales, quantize_scales
from peft_vit.quantization.tensor import QuantizedTensor, rows_at_once
from peft_vit.quantization.underflow import warn_of_scales

# A group's range, its scale and every step of computing a weight from them stay finite in float32 below this.
_LARGEST_MAGNITUDE = 2.0**125


@torch.no_grad()
def quantize(weight: Tensor, format: QuantizationFormat, *, name: str = "the weight") -> QuantizedTensor:
    """Round weights to the nearest that the format can store.

    With b bits, and minimum, maximum and largest magnitude taken over a group:

    - nf4, fp4: scale = largest magnitude; the code of the value nearest to w / scale; offset, if any, = 0.
    - integers with offset: offset = minimum; scale = (maximum - offset) / (2^b - 1);
      c = round((w - offset) / scale).
    - integers without: scale = largest magnitude / (2^(b-1) - 1); c = round(w / scale) + 2^(b-1).

    Integers are computed in float64 and round halves to even, NF4 and FP4 in float32 as bitsandbytes computes
    them; all on the CPU, so that the codes do not depend on the device. A constant group of integers with a
    float32 offset has scale 0 and codes 0, and is exact.

    Args:
        weight: floating point, (out, in), not empty; taken as float32.
        format: the format to store it in; its group size divides `in`.
        name: of the layer, in the `UnderflowWarning` that says where float16 scales are too coarse, see `underflow`.

    Returns:
        The quantized weights, on the weight's device.

    Raises:
        UserError: if the group size does not divide `in`; if a weight is infinite, NaN or above 2^125 in
            magnitude; if a scale or an offset overflows the format's scale_dtype.
        ValueError: if the weight is no matrix of floating-point numbers.
    """
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(f"expected a matrix of floats, got {weight.dtype} of shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    groups = format.groups(columns)
    some_rows = [part.unflatten(1, (groups, -1)) for part in weight.detach().split(rows_at_once(weight))]
    parts = (_ranges(part, format) for part in some_rows)
    largest, scales, offsets = (torch.cat(part) for part in zip(*parts, strict=True))
    warn_of_scales(largest, format, name)
    stored = quantize_scales(scales) if format.double_quant else scales
    if isinstance(stored, QuantizedScales):
        scales = stored.dequantize()
    starts = range(0, rows, len(some_rows[0]))
    codes = [
        _codes(part, scales[start : start + len(part)], offsets[start : start + len(part)], format)
        for start, part in zip(starts, some_rows, strict=True)
    ]
    quantized = QuantizedTensor(
        codes=torch.cat(codes),
        stored_scales=stored,
        offsets=offsets if format.offset else None,
        shape=(rows, columns),
        format=format,
    )
    return quantized.to(weight.device)


def _ranges(weights: Tensor, format: QuantizationFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest magnitudes, scales and offsets, (out, groups) each, of some rows, (out, groups, group size).

    Scales and offsets are rounded to scale_dtype; offsets are 0 but for integers of a format that has some.
    """
    weights = weights.cpu().float()
    largest = weights.abs().amax(-1)  # (out, groups)
    if not bool((largest <= _LARGEST_MAGNITUDE).all()):
        raise UserError("the weights hold infinities, NaN or magnitudes above 2^125; check their source")
    offsets = torch.zeros_like(largest, dtype=format.scale_dtype)
    ranges, steps = largest.double(), 2 ** (format.bits - 1) - 1
    if format.has_codebook:
        steps = 1
    elif format.offset:
        offsets = _round_outwards(weights.amin(-1).double(), format.scale_dtype, -math.inf)
        ranges, steps = weights.amax(-1).double() - offsets.double(), 2**format.bits - 1
    return largest, _round_outwards(ranges / steps, format.scale_dtype, math.inf), offsets


def _codes(weights: Tensor, scales: Tensor, offsets: Tensor, format: QuantizationFormat) -> Tensor:
    """Return the packed codes of some rows, (out, groups, group size), for their scales and offsets, (out, groups)."""
    weights, scales, offsets = weights.cpu().float(), scales.unsqueeze(-1), offsets.unsqueeze(-1)
    if format.has_codebook:
        codes = nearest_codes(weights, scales.float(), cast(Codebook, format.type))
    else:
        divisors = torch.where(scales > 0, scales.double(), 1.0)  # a group of scale 0 has nothing to divide
        places = ((weights.double() - offsets.double()) / divisors).round_()
        middle = 2 ** (format.bits - 1)
        if format.offset:
            codes = places.clamp_(0, 2 * middle - 1).to(torch.uint8)
        else:
            codes = (places.clamp_(1 - middle, middle - 1) + middle).to(torch.uint8)
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
