"""Matrix products in int8 instead of float: W with a scale for each output, activations with one for each row.

With W[o, i] = s[o] c[o, i] and x[n, i] = t[n] q[n, i], codes c and q in int8 and accumulated in int32,

    (x W^T)[n, o] = t[n] s[o] sum_i q[n, i] c[o, i],

which is how SwitchBack (arXiv 2304.13013, sec. 2.2) and LLM.int8 (arXiv 2208.07339, sec. 2.2) multiply. The inputs'
gradient is taken by the same codes: (g W)[n, i] = sum_o (g[n, o] s[o]) c[o, i], where g s is rounded row by row. So it
is that of the weights that the forward pass has, and there is one copy of them.

Trap: a CPU without VNNI instructions adds pairs of products u8 * s8 in 16 bits, which saturates (oneDNN developer
guide, "Nuances of int8 computations"): with activations shifted to 0..255, pairs are exact while |c| <= 64. Two kernels
of PyTorch multiply, and which one is exact and fast differs by processor, see `exact_matmuls` and
`adapters.matmuls.fastest_matmul`:

    int_mm    torch._int_mm; without VNNI in AVX-512 a nested loop, exact and a hundred times slower than float32
              (pytorch/pytorch#136942)
    qlinear   oneDNN's linear layer, on weights that are packed once for each direction and inputs as q + 128 with zero
              point 128; it multiplies by the weights' scales, too

Their results are equal to the last bit.
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from peft_vit.core.quantization.tensor import QuantizedTensor

LARGEST = 127  # of a code of activations, and of a weight's where products are exact
LARGEST_OF_7_BITS = 64  # of a weight's code that no processor's pairs of products are too large with
Int8Kernel = Literal["int_mm", "qlinear"]
Bits = Literal[7, 8]
_ZERO = 128  # of inputs in qlinear, which takes them from 0 to 255
_ROUNDING = 1e-6  # relative: so near to an integer, nothing but float rounding is lost
_CHECK_ROWS = 32  # kernels differ by the number of rows, and few take the plainest one
_MEMORY = threading.local()


@dataclass(frozen=True)
class Int8Matmul:
    """A kernel that multiplies int8 matrices, and the bits of the weights with which it is exact."""

    name: Int8Kernel
    bits: Bits

    @property
    def largest(self) -> int:
        """Return the largest code of weights."""
        return LARGEST if self.bits == 8 else LARGEST_OF_7_BITS


EXPORTED_MATMUL = Int8Matmul("int_mm", 7)  # whatever computes them later is exact


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A weight matrix in int8 with a scale for each output.

    Attributes:
        codes: (out, in) int8.
        scales: (out,) float32.
        kernel: that multiplies them.
    """

    codes: Tensor
    scales: Tensor
    kernel: Int8Kernel = "int_mm"

    @classmethod
    def from_float(cls, weight: Tensor, matmul: Int8Matmul) -> Self:
        """Round float weights (out, in) to the nearest codes that a kernel multiplies exactly."""
        largest = matmul.largest
        scales = (weight.detach().abs().amax(1).float() / largest).clamp_min_(torch.finfo(torch.float32).tiny)  # (out,)
        codes = (weight.detach() / scales.unsqueeze(1)).round_().clamp_(-largest, largest).to(torch.int8)  # (out, in)
        return cls(codes, scales, matmul.name)

    @classmethod
    def from_quantized(cls, quantized: QuantizedTensor, matmul: Int8Matmul) -> Self:
        """Return a packed weight as it is, where each group's scale is a whole number of times its row's smallest one.

        So it is of integers with one scale a row, and of groups like QServe's (arXiv 2405.04532, sec. 4.1). Others are
        rounded as in `from_float`.
        """
        weight = quantized.dequantize()
        scales = quantized.scales.float()  # (out, groups)
        unit = scales.masked_fill(scales == 0, math.inf).amin(1)  # (out,); infinite where a row is constant
        codes = weight / unit.unsqueeze(1)  # (out, in)
        rounded = codes.round()
        exact = bool(((codes - rounded).abs() <= _ROUNDING * rounded.abs()).all())
        if exact and rounded.abs().max() <= matmul.largest and unit.isfinite().all():
            return cls(rounded.to(torch.int8), unit, matmul.name)
        return cls.from_float(weight, matmul)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the same: nothing of it changes, and packed weights can't be copied."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self) -> Tensor:
        """Return the weights that products are made with, (out, in) float32."""
        return self.codes * self.scales.unsqueeze(1)

    def multiply(self, codes: Tensor) -> Tensor:
        """Return what inputs' codes (N, in) come to before their own scales, (N, out) float32.

        It may be in memory that this thread's next product takes.
        """
        if self.kernel == "qlinear":
            return _qlinear(codes, *self._forward)
        return _int_mm(codes, self.codes.T).mul_(self.scales)

    def multiply_back(self, codes: Tensor) -> Tensor:
        """Return what codes (N, out) of gradients, which hold the weights' scales, come to, (N, in); likewise."""
        if self.kernel == "qlinear":
            return _qlinear(codes, *self._backward)
        return _int_mm(codes, self.codes)

    @functools.cached_property
    def _forward(self) -> tuple[Tensor, Tensor, Tensor]:
        return _prepacked(self.codes, self.scales)

    @functools.cached_property
    def _backward(self) -> tuple[Tensor, Tensor, Tensor]:
        return _prepacked(self.codes.T.contiguous(), torch.ones(self.codes.shape[1]))


def _prepacked(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed codes (out, in), scales and zero points, (out,) each, as `_qlinear` takes them."""
    with torch.inference_mode(False):  # or it could be used in that mode alone
        packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
        return packed, scales, torch.zeros(len(codes), dtype=torch.int32)


def _qlinear(codes: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    shifted = reused_memory("shifted", codes.shape, torch.uint8, codes.device)
    torch.bitwise_xor(codes.view(torch.uint8), _ZERO, out=shifted)  # q + 128
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, _ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


def _int_mm(left: Tensor, right: Tensor) -> Tensor:
    """Return left (N, K) @ right (K, M), int8, added up in int32, as float32.

    CUDA takes more than 16 rows, and K and M in multiples of 8 (torch, aten/src/ATen/native/cuda/Blas.cpp, `_int_mm`):
    zeros fill them up.
    """
    shape = torch.Size((len(left), right.shape[1]))
    if left.device.type == "cpu":
        sums = torch._int_mm(left, right, out=reused_memory("sums", shape, torch.int32, left.device))
    else:
        rows, inner, columns = max(0, 17 - len(left)), -left.shape[1] % 8, -right.shape[1] % 8
        pad = torch.nn.functional.pad
        sums = torch._int_mm(pad(left, (0, inner, 0, rows)), pad(right, (0, columns, 0, inner)))
        sums = sums[: shape[0], : shape[1]]
    return reused_memory("product", shape, torch.float32, left.device).copy_(sums)


def reused_memory(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory of this thread that is used again and again, and so is in the processor's cache already."""
    kept: dict[str, Tensor] = vars(_MEMORY)
    key = f"{name} {dtype} {device}"
    if key not in kept or kept[key].numel() < shape.numel():
        with torch.inference_mode(False):  # or it could be used in that mode alone
            kept[key] = torch.empty(shape.numel(), dtype=dtype, device=device)
    return kept[key][: shape.numel()].view(shape)


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


def exact_matmuls(inputs: int, device: str, bits: Bits | None = None) -> list[Int8Matmul]:
    """Return the kernels that are exact with so many inputs on a kind of device, those of more bits first.

    Args:
        inputs: of a weight.
        device: cpu, cuda, ...
        bits: of weights; None: of each kernel the most.
    """
    kernels: tuple[Int8Kernel, ...] = ("int_mm", "qlinear") if device == "cpu" else ("int_mm",)
    largest = {kernel: largest_exact_code(kernel, inputs, device) for kernel in kernels}
    most = [Int8Matmul(kernel, 8 if code == LARGEST else 7) for kernel, code in largest.items() if code]
    if bits is not None:
        most = [Int8Matmul(matmul.name, bits) for matmul in most if bits <= matmul.bits]
    return sorted(most, key=lambda matmul: -matmul.bits)


@functools.cache
def largest_exact_code(kernel: Int8Kernel, inputs: int, device: str) -> int:
    """Return the largest code of weights with which a kernel is exact for so many inputs on a kind of device; 0: none.

    The largest values are multiplied once a process, in all signs, and compared with integers of 64 bits.
    """
    signs = torch.ones(_CHECK_ROWS, inputs, dtype=torch.int8)
    signs[1::4] = -1
    signs[2::4, ::2] = -1
    signs[3::4, ::3] = -1
    for largest in (LARGEST, LARGEST_OF_7_BITS):
        x, codes = signs * LARGEST, signs.flip(1).contiguous() * largest  # (32, in)
        weight = Int8Weight(codes.to(device), torch.ones(len(codes), device=device), kernel)
        try:
            product = weight.multiply(x.to(device)).cpu()
        except (RuntimeError, NotImplementedError, AttributeError):  # a device or a build of PyTorch without it
            return 0
        if torch.equal(product, (x.long() @ codes.long().T).float()):
            return largest
    return 0
