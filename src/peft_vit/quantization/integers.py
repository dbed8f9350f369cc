"""Products of 8-bit integers instead of float ones: W a scale for each output, activations one for each row.

With W[o, i] = s[o] c[o, i] and x[n, i] = t[n] q[n, i], codes c and q in int8 and accumulated in int32,

    (x W^T)[n, o] = t[n] s[o] sum_i q[n, i] c[o, i],

which is how SwitchBack (arXiv 2304.13013, sec. 2.2) and LLM.int8 (arXiv 2208.07339, sec. 2.2) multiply. The inputs'
gradient is taken by the same codes: (g W)[n, i] = sum_o (g[n, o] s[o]) c[o, i], where g s is rounded row by row. So it
is that of the weights that the forward pass has, and there is one copy of them.

Trap: a CPU without VNNI instructions adds pairs of products u8 * s8 in 16 bits, which saturates (oneDNN developer
guide, "Nuances of int8 computations"): with activations shifted to 0..255, pairs are exact while |c| <= 64. So each
process looks once whether the largest values come out right, and weights take 7 bits where they do not.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from peft_vit.errors import UserError
from peft_vit.quantization.tensor import QuantizedTensor

LARGEST = 127  # of a code of activations, and of a weight's where products are exact
LARGEST_OF_7_BITS = 64  # of a weight's code that no processor's pairs of products are too large with
_WHOLE = 1e-6  # of a number that counts as whole, so that nothing but float rounding is lost
_ROWS = 32  # of the check; kernels differ by the number of rows, and few take the plainest one


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight matrix as 8-bit integers with a scale for each output.

    Attributes:
        codes: (out, in) int8.
        scales: (out,) float32.
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def from_float(cls, weight: Tensor, largest: int | None = None) -> IntegerWeight:
        """Round float weights (out, in) to the nearest codes.

        Args:
            weight: of a layer.
            largest: code; None: the largest that this machine multiplies exactly.
        """
        largest = largest or largest_code(weight.shape[1], weight.device.type)
        scales = (weight.detach().abs().amax(1).float() / largest).clamp_min_(torch.finfo(torch.float32).tiny)  # (out,)
        codes = (weight.detach() / scales.unsqueeze(1)).round_().clamp_(-largest, largest).to(torch.int8)  # (out, in)
        return cls(codes, scales)

    @classmethod
    def from_quantized(cls, quantized: QuantizedTensor, largest: int | None = None) -> IntegerWeight:
        """Return a packed weight as it is, where each group's scale is a whole number of times its row's smallest one.

        So it is of integers with one scale a row, and of groups like QServe's (arXiv 2405.04532, sec. 4.1). Others are
        rounded to the nearest codes; `largest` is as in `from_float`.
        """
        weight = quantized.dequantize()
        largest = largest or largest_code(weight.shape[1], weight.device.type)
        scales = quantized.scales.float()  # (out, groups)
        unit = scales.masked_fill(scales == 0, math.inf).amin(1)  # (out,); infinite where a row is constant
        codes = weight / unit.unsqueeze(1)  # (out, in)
        whole = codes.round()
        near = bool(((codes - whole).abs() <= _WHOLE * whole.abs()).all())
        if near and whole.abs().max() <= largest and unit.isfinite().all():
            return cls(whole.to(torch.int8), unit)
        return cls.from_float(weight, largest)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self) -> Tensor:
        """Return the weights that products are made with, (out, in) float32."""
        return self.codes * self.scales.unsqueeze(1)


def quantize_rows(x: Tensor, codes: Tensor | None = None, scaled: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return codes (N, width) int8 and scales (N, 1) float32 of rows in float, rounded to the nearest code.

    Args:
        x: (N, width).
        codes: where they are written; None: in new memory.
        scaled: likewise the codes in float32, which may be x itself.
    """
    x = x.float()
    largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())  # no |x| in memory
    scales = largest.div_(LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
    scaled = torch.mul(x, scales.reciprocal(), out=scaled).round_()
    return (scaled.to(torch.int8) if codes is None else codes.copy_(scaled)), scales


def int8_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write left (N, K) @ right (K, M), int8, into `out` (N, M) int32.

    CUDA takes more than 16 rows, and K and M in multiples of 8 (torch, aten/src/ATen/native/cuda/Blas.cpp, `_int_mm`):
    zeros fill them up.
    """
    if left.device.type == "cpu":
        return torch._int_mm(left, right, out=out)
    rows, inner, columns = max(0, 17 - len(left)), -left.shape[1] % 8, -right.shape[1] % 8
    pad = torch.nn.functional.pad
    padded = torch._int_mm(pad(left, (0, inner, 0, rows)), pad(right, (0, columns, 0, inner)))
    return out.copy_(padded[: len(left), : right.shape[1]])


def has_integer_products(device: torch.device | str) -> bool:
    """Return whether a device multiplies 8-bit integers at all."""
    kind = torch.device(device).type
    return kind in ("cpu", "cuda") and _works(kind)


def check_integers(device: torch.device, field: str = "training.compute") -> None:
    """Refuse a device that multiplies no 8-bit integers (UserError)."""
    if not has_integer_products(device):
        raise UserError(f"{device.type} multiplies no 8-bit integers; use float", field=field)


def bits_of_weights(inputs: int, device: torch.device | str) -> Literal[7, 8]:
    """Return the bits that weights with so many inputs have in products on a device."""
    return 8 if largest_code(inputs, torch.device(device).type) == LARGEST else 7


@functools.cache
def largest_code(inputs: int, device: str) -> int:
    """Return the largest code of weights whose products with so many inputs are exact on a kind of device.

    The largest values are multiplied once a process, in all signs, and compared with integers of 64 bits.
    """
    signs = torch.ones(_ROWS, inputs, dtype=torch.int8)
    signs[1::4] = -1
    signs[2::4, ::2] = -1
    signs[3::4, ::3] = -1
    x, weight = signs * LARGEST, signs.flip(1).contiguous() * LARGEST  # (32, in)
    exact = x.long() @ weight.long().T  # (32, 32)
    return LARGEST if torch.equal(_product(x, weight.T, device), exact) else LARGEST_OF_7_BITS


def _product(x: Tensor, weight: Tensor, device: str) -> Tensor:
    return torch._int_mm(x.to(device), weight.to(device)).cpu().long()


@functools.cache
def _works(device: str) -> bool:
    try:
        ones = torch.ones(_ROWS, _ROWS, dtype=torch.int8)
        return bool((_product(ones, ones.T, device) == _ROWS).all())
    except (RuntimeError, NotImplementedError):
        return False
