"""Products of 8-bit integers instead of float ones: W a scale for each output, activations one for each row.

With W[o, i] = s[o] c[o, i] and x[n, i] = t[n] q[n, i], codes c and q in int8 and accumulated in int32,

    (x W^T)[n, o] = t[n] s[o] sum_i q[n, i] c[o, i],

which is how SwitchBack (arXiv 2304.13013, sec. 2.2) and LLM.int8 (arXiv 2208.07339, sec. 2.2) multiply. The inputs'
gradient is taken by the same codes: (g W)[n, i] = sum_o (g[n, o] s[o]) c[o, i], where g s is rounded row by row. So it
is that of the weights that the forward pass has, and there is one copy of them.

Trap: a CPU without VNNI instructions adds pairs of products u8 * s8 in 16 bits, which saturates (oneDNN developer
guide, "Nuances of int8 computations"): with activations shifted to 0..255, pairs are exact while |c| <= 64. Two calls
of PyTorch multiply, and which one is exact and fast differs by processor, see `adapters.products`:

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
ProductName = Literal["int_mm", "qlinear"]
Bits = Literal[7, 8]
_ZERO = 128  # of inputs in qlinear, which takes them from 0 to 255
_WHOLE = 1e-6  # of a number that counts as whole, so that nothing but float rounding is lost
_ROWS = 32  # of the check; kernels differ by the number of rows, and few take the plainest one
_MEMORY = threading.local()


@dataclass(frozen=True)
class Product:
    """A way to multiply integers, exact with weights of so many bits."""

    name: ProductName
    bits: Bits

    @property
    def largest(self) -> int:
        """Return the largest code of weights."""
        return LARGEST if self.bits == 8 else LARGEST_OF_7_BITS


IN_FILES = Product("int_mm", 7)  # whatever computes them later is exact


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight matrix as 8-bit integers with a scale for each output.

    Attributes:
        codes: (out, in) int8.
        scales: (out,) float32.
        product: that multiplies them.
    """

    codes: Tensor
    scales: Tensor
    product: ProductName = "int_mm"

    @classmethod
    def from_float(cls, weight: Tensor, product: Product) -> Self:
        """Round float weights (out, in) to the nearest codes that a product takes."""
        largest = product.largest
        scales = (weight.detach().abs().amax(1).float() / largest).clamp_min_(torch.finfo(torch.float32).tiny)  # (out,)
        codes = (weight.detach() / scales.unsqueeze(1)).round_().clamp_(-largest, largest).to(torch.int8)  # (out, in)
        return cls(codes, scales, product.name)

    @classmethod
    def from_quantized(cls, quantized: QuantizedTensor, product: Product) -> Self:
        """Return a packed weight as it is, where each group's scale is a whole number of times its row's smallest one.

        So it is of integers with one scale a row, and of groups like QServe's (arXiv 2405.04532, sec. 4.1). Others are
        rounded as in `from_float`.
        """
        weight = quantized.dequantize()
        scales = quantized.scales.float()  # (out, groups)
        unit = scales.masked_fill(scales == 0, math.inf).amin(1)  # (out,); infinite where a row is constant
        codes = weight / unit.unsqueeze(1)  # (out, in)
        whole = codes.round()
        near = bool(((codes - whole).abs() <= _WHOLE * whole.abs()).all())
        if near and whole.abs().max() <= product.largest and unit.isfinite().all():
            return cls(whole.to(torch.int8), unit, product.name)
        return cls.from_float(weight, product)

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
        if self.product == "qlinear":
            return _qlinear(codes, self._packed, self.scales, self._no_zeros[0])
        return _floats(codes, self.codes.T).mul_(self.scales)

    def multiply_back(self, codes: Tensor) -> Tensor:
        """Return what codes (N, out) of gradients, which hold the weights' scales, come to, (N, in); likewise."""
        if self.product == "qlinear":
            return _qlinear(codes, self._turned, self._ones, self._no_zeros[1])
        return _floats(codes, self.codes)

    @functools.cached_property
    def _packed(self) -> Tensor:
        return _prepack(self.codes)

    @functools.cached_property
    def _turned(self) -> Tensor:
        return _prepack(self.codes.T.contiguous())

    @functools.cached_property
    def _ones(self) -> Tensor:
        return torch.ones(self.codes.shape[1])

    @functools.cached_property
    def _no_zeros(self) -> tuple[Tensor, Tensor]:
        outputs, inputs = self.codes.shape
        return torch.zeros(outputs, dtype=torch.int32), torch.zeros(inputs, dtype=torch.int32)


def _prepack(codes: Tensor) -> Tensor:
    with torch.inference_mode(False):  # or it could be used in that mode alone
        packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
    return packed


def _qlinear(codes: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    shifted = reused_memory("shifted", codes.shape, torch.uint8, codes.device)
    torch.bitwise_xor(codes.view(torch.uint8), _ZERO, out=shifted)  # q + 128
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, _ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


def _floats(codes: Tensor, weight: Tensor) -> Tensor:
    """Return codes (N, K) @ weight (K, M), added up in integers, as float32."""
    shape = torch.Size((len(codes), weight.shape[1]))
    sums = int8_product(codes, weight, reused_memory("sums", shape, torch.int32, codes.device))
    return reused_memory("product", shape, torch.float32, codes.device).copy_(sums)


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


def exact_products(inputs: int, device: str, bits: Bits | None = None) -> list[Product]:
    """Return the products that are exact with so many inputs on a kind of device, those of more bits first.

    Args:
        inputs: of a weight.
        device: cpu, cuda, ...
        bits: of weights; None: of each product the most.
    """
    names: tuple[ProductName, ...] = ("int_mm", "qlinear") if device == "cpu" else ("int_mm",)
    largest = {name: largest_code(name, inputs, device) for name in names}
    most = [Product(name, 8 if largest[name] == LARGEST else 7) for name in names if largest[name]]
    if bits is not None:
        most = [Product(product.name, bits) for product in most if bits <= product.bits]
    return sorted(most, key=lambda product: -product.bits)


@functools.cache
def largest_code(name: ProductName, inputs: int, device: str) -> int:
    """Return the largest code of weights whose products with so many inputs are exact on a kind of device; 0: none.

    The largest values are multiplied once a process, in all signs, and compared with integers of 64 bits.
    """
    signs = torch.ones(_ROWS, inputs, dtype=torch.int8)
    signs[1::4] = -1
    signs[2::4, ::2] = -1
    signs[3::4, ::3] = -1
    for largest in (LARGEST, LARGEST_OF_7_BITS):
        x, weight = signs * LARGEST, signs.flip(1).contiguous() * largest  # (32, in)
        try:
            product = _product(name, x, weight, device)
        except (RuntimeError, NotImplementedError, AttributeError):  # a device or a build of PyTorch without it
            return 0
        if torch.equal(product, (x.long() @ weight.long().T).float()):
            return largest
    return 0


def _product(name: ProductName, x: Tensor, weight: Tensor, device: str) -> Tensor:
    scales = torch.ones(len(weight), device=device)
    return IntegerWeight(weight.to(device), scales, name).multiply(x.to(device)).cpu().clone()
