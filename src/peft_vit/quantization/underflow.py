"""Says aloud where float16 is too coarse for the numbers of a group: below 2^-14 its values lie 2^-24 = 6e-8 apart.

A scale that is rounded up widens the step between codes by up to that, and an offset moves by as much: weights of 1e-8
all become zeros. What counts is the loss beside the group's own weights. A scale of 4e-5 lies below float16's smallest
normal number, as some scales of int8 do in ViT-S/14, and loses next to nothing.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from peft_vit.errors import UnderflowWarning
from peft_vit.quantization.formats import QuantizationFormat

LARGEST_LOSS = 0.01  # ten times what rounding a normal float16 number may lose
SPACING = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps  # 2^-24


def codes_up_to_largest(format: QuantizationFormat) -> int:
    """Return by how many scales the largest weight of a group may lie from 0, or from its offset."""
    if format.has_codebook:
        return 1
    return 2**format.bits - 1 if format.offset else 2 ** (format.bits - 1) - 1


def warn_of_scales(largest: Tensor, format: QuantizationFormat, name: str) -> None:
    """Warn if float16 may widen the step between codes by more than LARGEST_LOSS in any group that is not zero.

    With M a group's largest magnitude, in `largest` (out, groups), and L from `codes_up_to_largest` the step is about
    M / L, and 2^-24 more than LARGEST_LOSS of that if M < 2^-24 L / LARGEST_LOSS. A minimum rounded down to be the
    offset adds no more to it.
    """
    if format.scale_dtype is not torch.float16:
        return
    limit = SPACING * codes_up_to_largest(format) / LARGEST_LOSS
    _warn(f"{name}: float16 is too coarse for the {format.type} scales of", (largest > 0) & (largest < limit), 5)


def warn_of_offsets(exact: Tensor, stored: Tensor, scales: Tensor, format: QuantizationFormat, name: str) -> None:
    """Warn if storing offsets moved the weights of a group by more than LARGEST_LOSS of the largest they may have.

    All are (out, groups): the offsets in float32 and as they are stored, and the scales.
    """
    largest = scales.float() * codes_up_to_largest(format) + exact.abs()
    lost = (stored.float() - exact).abs() > LARGEST_LOSS * largest
    _warn(f"{name}: float16 is too coarse for the offsets of", lost, 4)


def _warn(text: str, lost: Tensor, stacklevel: int) -> None:
    if count := int(lost.sum()):
        warnings.warn(
            f"{text} {count} of {lost.numel()} groups, whose weights are too small for it; use scale_precision: fp32",
            UnderflowWarning,
            stacklevel=stacklevel,  # who called `quantize`, behind torch's decorator, or `with_offset_added`
        )
