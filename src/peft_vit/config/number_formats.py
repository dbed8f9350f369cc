"""The number formats of quantized weights: a line each in `NUMBER_FORMATS`, which all else follows.

Codebooks are tables of values, in the order of their codes; with integers the code is the number. Their values, order
and treatment of ties are those of bitsandbytes 0.50 (``functional.get_4bit_type``, quantization on CPU), so that both
mean the same numbers by the same codes.

NF4 (QLoRA, arXiv 2305.14314, section 3 and appendix E): quantiles of the normal distribution, scaled so that the
outermost are -1 and 1; seven values below an exact zero, eight above.

NF3 is the same with three values below zero and four above. With k bits, and the quantile function Q of the normal
distribution, bitsandbytes' ``functional.create_normal_map`` takes 2^(k-1) values Q evenly spaced in probability from
p to 1/2 above zero, and 2^(k-1) - 1 below; at 4 bits p is 1 - (1/30 + 1/32) / 2, half a step of probability from the
ends. At k bits that is

    p = 1 - (1 / (2 (2^k - 1)) + 1 / (2 2^k)) / 2,

0.9330 for 3. (LQ-LoRA, arXiv 2311.12023, and LoftQ, 2310.08659, leave p at 0.9677 for all bits: on normal weights in
groups of 32 NF3's error is then 4 % larger.)

FP4: a sign, two bits of exponent and one of fraction. Its values are not sorted, and two of them are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class NumberFormat:
    """What a code stands for, before scale and offset.

    Attributes:
        bits: of a code.
        values: of a codebook's 2^bits codes, in [-1, 1]; None: codes are integers.
    """

    bits: int
    values: tuple[float, ...] | None = None


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
# Magnitudes of the bit patterns 000 to 111; the fourth bit is the sign. Code 8 means 0, not minus 0.
_FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)

NUMBER_FORMATS: dict[str, NumberFormat] = {
    "nf4": NumberFormat(4, _NF4),
    "fp4": NumberFormat(4, (*_FP4_MAGNITUDES, *(0 - value for value in _FP4_MAGNITUDES))),
    "nf3": NumberFormat(3, _NF3),
    "int2": NumberFormat(2),
    "int3": NumberFormat(3),
    "int4": NumberFormat(4),
    "int8": NumberFormat(8),
}
BITS_OF_TYPE: dict[str, int] = {name: format.bits for name, format in NUMBER_FORMATS.items()}
if TYPE_CHECKING:
    QuantizationType = str
    Bits = int
else:
    QuantizationType = Literal[tuple(NUMBER_FORMATS)]
    Bits = Literal[tuple(sorted(set(BITS_OF_TYPE.values())))]
