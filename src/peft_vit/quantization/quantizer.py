"""From float weights to codes, scales and offsets: round to nearest on groups of inputs.

Scales and offsets are rounded outwards to their stored dtype first (scales up, offsets down), and codes are
chosen against the stored numbers. So no weight lies outside its group's range of codes, and its error is at
most half the gap between neighbouring codes, in float16 as in float32. A group's minimum and largest
magnitude are float32 numbers already: with float32 scales, only the scale of integer codes is rounded at all.
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
    some_rows = weight.detach().split(rows_at_once(weight))
    largest, codes, scales, offsets = zip(
        *(_quantized(part.unflatten(1, (groups, -1)), format) for part in some_rows), strict=True
    )
    warn_of_scales(torch.cat(largest), format, name)
    quantized = QuantizedTensor(
        codes=torch.cat(codes),
        scales=torch.cat(scales),
        offsets=torch.cat(offsets) if format.offset else None,
        shape=(rows, columns),
        format=format,
    )
    return quantized.to(weight.device)


def _quantized(weights: Tensor, format: QuantizationFormat) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the largest magnitudes, packed codes, scales and offsets of some rows, (out, groups, group size)."""
    weights = weights.cpu().float()
    largest = weights.abs().amax(-1)  # (out, groups)
    if not bool((largest <= _LARGEST_MAGNITUDE).all()):
        raise UserError("the weights hold infinities, NaN or magnitudes above 2^125; check their source")
    if format.has_codebook:
        codes, scales, offsets = _to_codebook(weights, largest.unsqueeze(-1), format)
    elif format.offset:
        codes, scales, offsets = _to_integers_with_offset(weights, format)
    else:
        codes, scales, offsets = _to_symmetric_integers(weights, largest.unsqueeze(-1), format)
    packed = pack_codes(codes.flatten(1), format.bits)  # (out, groups, group size) -> (out, in) -> bytes
    # (out, groups, 1) -> (out, groups)
    return largest, packed, scales.squeeze(-1), None if offsets is None else offsets.squeeze(-1)


def _to_codebook(weights: Tensor, largest: Tensor, format: QuantizationFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    scales = _round_outwards(largest.double(), format.scale_dtype, math.inf)
    codes = nearest_codes(weights, scales.float(), cast(Codebook, format.type))
    return codes, scales, torch.zeros_like(scales) if format.offset else None


def _to_integers_with_offset(weights: Tensor, format: QuantizationFormat) -> tuple[Tensor, Tensor, Tensor]:
    weights = weights.double()
    largest_code = 2**format.bits - 1
    offsets = _round_outwards(weights.amin(-1, keepdim=True), format.scale_dtype, -math.inf)
    ranges = weights.amax(-1, keepdim=True) - offsets.double()
    scales = _round_outwards(ranges / largest_code, format.scale_dtype, math.inf)
    codes = ((weights - offsets.double()) / _divisors(scales)).round_()
    return codes.clamp_(0, largest_code).to(torch.uint8), scales, offsets


def _to_symmetric_integers(weights: Tensor, largest: Tensor, format: QuantizationFormat) -> tuple[Tensor, Tensor, None]:
    weights = weights.double()
    largest_code = 2 ** (format.bits - 1) - 1
    scales = _round_outwards(largest.double() / largest_code, format.scale_dtype, math.inf)
    codes = (weights / _divisors(scales)).round_().clamp_(-largest_code, largest_code)
    return (codes + 2 ** (format.bits - 1)).to(torch.uint8), scales, None


def _divisors(scales: Tensor) -> Tensor:
    """Return scales to divide by: 1 for a scale of 0, whose group has nothing to divide."""
    return torch.where(scales > 0, scales.double(), 1.0)


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
