"""The codebooks NF4, NF3 and FP4, and the rule that picks a code.

NF4 (QLoRA, arXiv 2305.14314, section 3 and appendix E): quantiles of the normal distribution, scaled so that
the outermost are -1 and 1; seven values below an exact zero, eight above. FP4: a sign, two bits of exponent
and one of fraction. Values, their order and the treatment of ties are those of bitsandbytes 0.50
(``functional.get_4bit_type``, quantization on CPU), so that both mean the same numbers by the same codes.

NF3 is the same with three values below zero and four above. With k bits, and the quantile function Q of the normal
distribution, bitsandbytes' ``functional.create_normal_map`` takes 2^(k-1) values Q evenly spaced in probability from
p to 1/2 above zero, and 2^(k-1) - 1 below; at 4 bits p is 1 - (1/30 + 1/32) / 2, half a step of probability from the
ends. At k bits that is

    p = 1 - (1 / (2 (2^k - 1)) + 1 / (2 2^k)) / 2,

0.9330 for 3. (LQ-LoRA, arXiv 2311.12023, and LoftQ, 2310.08659, leave p at 0.9677 for all bits: on normal weights in
groups of 32 NF3's error is then 4 % larger.)
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

Codebook = Literal["nf4", "fp4", "nf3"]

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
_NF3 = (
    -1.0,
    -0.5350227355957031,
    -0.24693143367767334,
    0.0,
    0.1833374798297882,
    0.38199394941329956,
    0.6229857206344604,
    1.0,
)
# Magnitudes of the bit patterns 000 to 111; the fourth bit is the sign. The largest becomes 1.
_FP4_MAGNITUDES = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0])
# bitsandbytes takes the reciprocal of at least this, so that a group of zeros does not divide by zero.
_SMALLEST_SCALE = 1e-38


# `0 - x` rather than `-x`: code 8 means 0, not minus 0.
_FP4 = torch.cat([_FP4_MAGNITUDES, 0 - _FP4_MAGNITUDES]) / _FP4_MAGNITUDES.max()
_VALUES: dict[str, Tensor] = {"nf4": torch.tensor(_NF4), "fp4": _FP4, "nf3": torch.tensor(_NF3)}
_ORDER = {name: torch.argsort(values, stable=True) for name, values in _VALUES.items()}


def code_values(type: Codebook) -> Tensor:
    """Return the value of each code, float32 of shape (2^bits,), in [-1, 1].

    FP4's values are not sorted, and two of them are zero.

    Sources: QLoRA, arXiv 2305.14314, appendix E (NF4); bitsandbytes, functional.get_4bit_type (NF4, FP4) and
    functional.create_normal_map (NF3: its formula, see above).
    """
    return _VALUES[type].clone()


@cache
def pair_table(type: Codebook, device: torch.device) -> Tensor:
    """Return the two float32 values of each pair of codes, earlier + 2^bits later, of shape (4^bits,).

    Both are in one int64, to be read and written at once: several times as fast as looking up single codes.
    """
    values = _VALUES[type]
    count = len(values)
    pair = torch.arange(count**2)
    pairs = torch.stack([values[pair % count], values[pair // count]], dim=1)  # (4^bits, 2)
    return pairs.view(torch.int64).flatten().to(device)


def nearest_codes(weights: Tensor, scales: Tensor, type: Codebook) -> Tensor:
    """Return the codes whose scaled values are nearest; on a tie, the lower value's.

    Args:
        weights: float32 on the CPU, (out, groups, group size).
        scales: likewise, (out, groups, 1); what lies beyond one is clipped to it.
        type: the codebook.

    Returns:
        uint8 codes of the weights' shape.
    """
    return _ORDER[type].to(torch.uint8)[nearest_places(weights, scales, _VALUES[type][_ORDER[type]])]


def nearest_places(numbers: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """Return the places of the values nearest to numbers / scales, int32 of the numbers' shape; on a tie, the lower.

    Args:
        numbers: float32 on the CPU.
        scales: likewise, of a shape that is broadcast to theirs; numbers above one in magnitude are taken as it.
        values: float32, sorted, in [-1, 1].
    """
    scaled = (numbers * (1.0 / scales.clamp(min=_SMALLEST_SCALE))).clamp_(-1, 1)
    return torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True)
