"""Scales of groups that are themselves kept in 8 bits: the double quantization of QLoRA, arXiv 2305.14314, section 3.

The mean of all scales of a matrix is taken off, and what is left is kept as codes of bitsandbytes' dynamic 8-bit type
(Dettmers, arXiv 1511.04561, as `bitsandbytes.functional.create_dynamic_map` makes it) times the largest magnitude of
each block of 256, row by row:

    scale = mean + largest of the block * value[code]

With groups of 32 that is 8 / 32 + 32 / (32 * 256) = 0.254 bits a weight, where float16 takes 0.5. bitsandbytes calls it
`compress_statistics`, transformers `bnb_4bit_use_double_quant`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from peft_vit.quantization.codebooks import nearest_places

BLOCK = 256  # scales that share a largest magnitude
_EXPONENTS = 7  # powers of ten, from 1e-6 to 1


@dataclass(frozen=True, eq=False)
class QuantizedScales:
    """The scales of a matrix, (out, groups), in 8 bits.

    Attributes:
        codes: uint8, (out, groups).
        blocks: float32, (ceil(out * groups / 256),), the largest magnitude of scale - mean in each block.
        mean: float32, (1,).
        dtype: float32 or float16, to which the scales are rounded that they stand for.
    """

    codes: Tensor
    blocks: Tensor
    mean: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """The numbers of outputs and groups."""
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """Return the scales that the codes stand for, (out, groups), none of them negative."""
        values = dynamic_values().to(self.codes.device)[self.codes.flatten().int()]
        scales = values * self.blocks.repeat_interleave(BLOCK)[: len(values)] + self.mean
        return scales.clamp_(0, torch.finfo(self.dtype).max).to(self.dtype).view(self.shape)

    def to(self, device: torch.device | str) -> QuantizedScales:
        """Return the same scales on another device."""
        return replace(self, codes=self.codes.to(device), blocks=self.blocks.to(device), mean=self.mean.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Return what has to be stored."""
        return {"scales": self.codes, "scale_blocks": self.blocks, "scale_mean": self.mean}


def quantize_scales(scales: Tensor) -> QuantizedScales:
    """Round scales to the nearest that 8 bits can store.

    A scale comes out off by up to 0.7 % of its block's largest distance from the mean. One that is tiny beside the
    others may be far off, or 0. (bitsandbytes' CPU kernel takes the second nearest now and then, once in a thousand.)

    Args:
        scales: float32 or float16 on the CPU, (out, groups), not negative.
    """
    flat = scales.float().flatten()
    mean = flat.mean()
    rest = torch.nn.functional.pad(flat - mean, (0, -len(flat) % BLOCK)).view(-1, BLOCK)  # (blocks, 256)
    largest = rest.abs().amax(1)
    codes = nearest_places(rest, largest.unsqueeze(1), dynamic_values()).to(torch.uint8)
    return QuantizedScales(codes.flatten()[: len(flat)].view(scales.shape).clone(), largest, mean.view(1), scales.dtype)


def scales_bytes(count: int) -> int:
    """Return the bytes that so many scales of a matrix take."""
    return count + 4 * -(-count // BLOCK) + 4


@cache
def dynamic_values() -> Tensor:
    """Return the values of the 256 codes, float32, from the smallest to 1: zero, and seven powers of ten of both signs.

    The power 10^-e is split into 2^(6 - e) equal parts of [0.1, 1], each stood for by its middle.
    """
    positive = []
    for exponent in range(_EXPONENTS):
        edges = torch.linspace(0.1, 1, 2 ** (_EXPONENTS - 1 - exponent) + 1, dtype=torch.float32)
        positive.append(10.0**-exponent * ((edges[:-1] + edges[1:]) / 2))  # in float32, as bitsandbytes rounds them
    magnitudes = torch.cat(positive)  # (127,)
    return torch.cat([-magnitudes, torch.tensor([0.0, 1.0]), magnitudes]).sort().values
