"""How far quantized weights are from the float weights."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from peft_vit.quantization.codebooks import Codebook, half_gaps
from peft_vit.quantization.packing import unpack_codes
from peft_vit.quantization.tensor import QuantizedTensor


def relative_error(weight: Tensor, quantized: QuantizedTensor) -> float:
    """Return ||W - Wq||_F / ||W||_F; 0 if the two are equal, infinity if only W is zero.

    Args:
        weight: the float weights, (out, in).
        quantized: what stands for them.
    """
    weight = weight.detach().cpu().double()
    error = float(torch.linalg.vector_norm(weight - quantized.dequantize().cpu().double()))
    norm = float(torch.linalg.vector_norm(weight))
    if error == 0:
        return 0.0
    return error / norm if norm > 0 else math.inf


def signal_to_noise_db(weight: Tensor, quantized: QuantizedTensor) -> float:
    """Return 10 log10(||W||_F^2 / ||W - Wq||_F^2) in decibels; infinity if the two are equal.

    Args:
        weight: the float weights, (out, in).
        quantized: what stands for them.
    """
    ratio = relative_error(weight, quantized)
    return math.inf if ratio == 0 else -20 * math.log10(ratio)


def error_bound(quantized: QuantizedTensor) -> Tensor:
    """Return the most by which rounding to codes can have moved each weight, float32 of shape (out, in).

    It is scale times half the gap between the weight's code and its farther neighbour, plus what computing in
    float32 may add: four units in the last place of the group's largest number, and the smallest normal
    number. It holds for weights as `quantize` found them, since none lies outside its group's range.
    """
    format, (_, columns) = quantized.format, quantized.shape
    codes = unpack_codes(quantized.codes, format.bits, columns)
    if format.has_codebook:
        gaps = half_gaps(cast(Codebook, format.type)).to(codes.device)[codes.int()]
        largest_value = 1.0
    else:
        gaps = torch.full(codes.shape, 0.5, device=codes.device)
        largest_value = float(2**format.bits - 1)
    scales = quantized.scales.float().unsqueeze(-1)  # (out, groups, 1)
    largest = scales * largest_value
    if quantized.offsets is not None:
        largest = largest + quantized.offsets.float().abs().unsqueeze(-1)  # (out, groups, 1)
    numbers = torch.finfo(torch.float32)
    slack = 4 * numbers.eps * largest + numbers.tiny
    grouped = gaps.unflatten(1, (scales.shape[1], -1))  # (out, in) -> (out, groups, group size)
    return (grouped * scales + slack).flatten(1)
