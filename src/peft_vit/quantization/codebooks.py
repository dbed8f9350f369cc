"""The two 4-bit codebooks, NF4 and FP4, and the rule that picks a code.

NF4 (QLoRA, arXiv 2305.14314, section 3 and appendix E): quantiles of the normal distribution, scaled so that
the outermost are -1 and 1; seven values below an exact zero, eight above. FP4: a sign, two bits of exponent
and one of fraction. Values, their order and the treatment of ties are those of bitsandbytes 0.50
(``functional.get_4bit_type``, quantization on CPU), so that both mean the same numbers by the same codes.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

Codebook = Literal["nf4", "fp4"]

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Magnitudes of the bit patterns 000 to 111; the fourth bit is the sign. The largest becomes 1.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# bitsandbytes takes the reciprocal of at least this, so that a group of zeros does not divide by zero.
_SMALLEST_SCALE = 1e-38


def _fp4() -> Tensor:
    magnitudes = torch.tensor(_FP4_MAGNITUDES)
    # `0 - x` rather than `-x`: code 8 means 0, not minus 0.
    return torch.cat([magnitudes, 0 - magnitudes]) / magnitudes.max()


_VALUES: dict[str, Tensor] = {"nf4": torch.tensor(_NF4), "fp4": _fp4()}
_ORDER = {name: torch.argsort(values, stable=True) for name, values in _VALUES.items()}
_THRESHOLDS = {name: (values[_ORDER[name]][:-1] + values[_ORDER[name]][1:]) / 2 for name, values in _VALUES.items()}


def code_values(type: Codebook) -> Tensor:
    """Return the value of each code, float32 of shape (16,), in [-1, 1].

    FP4's values are not sorted, and two of them are zero.

    Sources: QLoRA, arXiv 2305.14314, appendix E (NF4); bitsandbytes, functional.get_4bit_type (both).
    """
    return _VALUES[type].clone()


@cache
def byte_table(type: Codebook, device: torch.device) -> Tensor:
    """Return the two float32 values of each byte of packed codes, of shape (256,).

    Both are in one int64, to be read and written at once: several times as fast as looking up single codes.
    """
    byte = torch.arange(256)
    pairs = torch.stack([_VALUES[type][byte % 16], _VALUES[type][byte // 16]], dim=1)  # (256, 2)
    return pairs.view(torch.int64).flatten().to(device)


def nearest_codes(weights: Tensor, scales: Tensor, type: Codebook) -> Tensor:
    """Return the codes whose scaled values are nearest; on a tie, the lower value's.

    Args:
        weights: float32 on the CPU, (out, groups, group size).
        scales: likewise, (out, groups, 1), at least the group's largest magnitude.
        type: the codebook.

    Returns:
        uint8 codes of the weights' shape.
    """
    scaled = (weights * (1.0 / scales.clamp(min=_SMALLEST_SCALE))).clamp_(-1, 1)
    ranks = torch.bucketize(scaled, _THRESHOLDS[type], out_int32=True)
    return _ORDER[type].to(torch.uint8)[ranks]
