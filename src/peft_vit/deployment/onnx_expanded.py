"""Low-bit layers whose codes onnxruntime expands once, when it loads a file; the file holds the codes all the same.

The weight is written as operators on constants: for codes of 2 and 4 bits, and of 3 in fields of 4, a byte is looked up
in the table of the values that it holds (Gather), 8 bits are a Cast; then Mul by the scales and Add of the offsets, all
in float32. onnxruntime's constant folding, which is on by default, computes that when the session is made. Seen with
1.32: the optimized model has the nodes of the float32 model's, MatMul on float32 initializers, and a call takes as
long. DequantizeLinear would be less to write, but constant folding leaves it alone. While folding goes on, onnxruntime
keeps what every operator has computed, so codes are stored in the order of the folded matrix, (in, out), to need few of
them: loading takes about 20 bytes a weight for a moment, where a float32 file takes 6. How much of it the process gives
back to the system is up to its allocator. torch's exporter folds too, where codes are few: up to 8,192 bytes of a
matrix are in the file as floats.

`Int8Linear` goes on from the expanded weight to whole numbers, also when the file is loaded, and multiplies in 8 bits:
y = (q_x - z) a  (q_W s) + b, by onnxruntime's MatMulIntegerToFloat. Inputs are rounded to a step a and a zero point z
of the layer, from the smallest and largest input that training images give, so what comes out for an image does not
depend on the others of its batch. Weights are rounded to [-64, 64] with a step s for each output: without VNNI the CPU
adds pairs of products of 8 bits in 16, and 255 * 64 * 2 is the largest that fits (onnxruntime's `reduce_range`).
Against that, of ViT-S at 112 px and batch 1, one thread with AVX-512 VNNI, over float32's time: this 0.38; ranges of
each call by DynamicQuantizeMatMul 0.38, but they depend on the batch; of each token 0.44; int8 inputs in place of uint8
more than 4; MatMulNBits with accuracy_level 4, which needs no expanding, 0.95 in 4 and in 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from peft_vit.adapters import AdaptedLinear, adapted_modules
from peft_vit.backbones import watching
from peft_vit.quantization import QuantizationFormat, QuantizedTensor, pack_codes, unpack_codes
from peft_vit.quantization.packing import field_bits

Range = tuple[float, float]  # the smallest and the largest of a layer's inputs
_LARGEST_WEIGHT = 64
_LARGEST_INPUT = 255
_TINY = 1e-30  # in place of the step of weights that are all 0


class ExpandedWeight(nn.Module):
    """A packed matrix whose forward pass, which has no input, returns it in float32, transposed: (in, out).

    Outputs are filled up to whole bytes: bytes = ceil(out / codes a byte).
    """

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        kind = weight.format
        self.out_features, self.in_features = weight.shape
        groups, bits = weight.groups, field_bits(kind.bits)
        per_byte = 8 // bits
        codes = unpack_codes(weight.codes, kind.bits, self.in_features).T.contiguous()  # (in, out)
        if kind.bits == 8 and not kind.offset:
            codes = (codes.int() - 128).to(torch.int8)
        elif kind.bits < 8:
            codes = pack_codes(codes, bits)  # (in, bytes)
        self.table = nn.Buffer(byte_values(kind)) if kind.bits < 8 else None  # (256, codes a byte)
        shape = (groups, -1, codes.shape[1])
        self.codes = nn.Buffer(codes.reshape(shape) if kind.bits < 8 else codes.reshape(*shape, 1))
        self.scales = nn.Buffer(_by_byte(weight.scales, per_byte))
        self.offsets = None if weight.offsets is None else nn.Buffer(_by_byte(weight.offsets, per_byte))

    def forward(self) -> Tensor:
        """Return (in, out)."""
        values = self.codes.float() if self.table is None else nn.functional.embedding(self.codes.int(), self.table)
        weight = values * self.scales.float()  # (groups, group size, bytes, codes a byte)
        if self.offsets is not None:
            weight = weight + self.offsets.float()
        weight = weight.reshape(self.in_features, -1)
        return weight if weight.shape[1] == self.out_features else weight[:, : self.out_features]


def byte_values(kind: QuantizationFormat) -> Tensor:
    """Return what the codes in each of the 256 bytes mean before scale and offset, (256, codes a byte), float32."""
    bits = field_bits(kind.bits)
    shifts = bits * torch.arange(8 // bits)
    codes = (torch.arange(256).unsqueeze(1) >> shifts) & (2**kind.bits - 1)  # (256, codes a byte)
    return kind.values()[codes]


def _by_byte(numbers: Tensor, per_byte: int) -> Tensor:
    """Return (out, groups) as (groups, 1, bytes, codes a byte)."""
    missing = -numbers.shape[0] % per_byte
    return nn.functional.pad(numbers.T, (0, missing)).reshape(numbers.shape[1], 1, -1, per_byte).contiguous()


class ExpandedLinear(nn.Module):
    """A packed linear layer that is multiplied in float32, for export."""

    def __init__(self, layer: AdaptedLinear) -> None:
        super().__init__()
        assert layer.quantized is not None
        self.weight = ExpandedWeight(layer.quantized)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        y = x @ self.weight()
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """A packed linear layer that is multiplied in 8 bits; its forward pass can only be exported.

    Args:
        layer: packed.
        inputs: the range of its inputs; what lies outside becomes its end.
    """

    def __init__(self, layer: AdaptedLinear, inputs: Range) -> None:
        super().__init__()
        assert layer.quantized is not None
        self.weight = ExpandedWeight(layer.quantized)
        step, zero = step_and_zero(inputs)
        self.step = nn.Buffer(torch.tensor(step))
        self.zero = nn.Buffer(torch.tensor(zero, dtype=torch.uint8))
        self.no_zeros = nn.Buffer(torch.zeros(layer.out_features, dtype=torch.int8))
        self.bias = nn.Buffer(torch.zeros(layer.out_features)) if layer.bias is None else layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        weight = self.weight()  # (in, out)
        steps = torch.maximum(weight.amax(0), -weight.amin(0)).clamp(min=_TINY) / _LARGEST_WEIGHT  # (out,)
        whole = _quantized(weight, steps, self.no_zeros, axis=1)
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulIntegerToFloat",
            (_quantized(x, self.step, self.zero), whole, self.step, steps, self.zero, self.no_zeros, self.bias),
            dtype=torch.float32,
            shape=(*x.shape[:-1], self.bias.shape[0]),
            version=1,
        )


def step_and_zero(inputs: Range) -> tuple[float, int]:
    """Return a and z, so that a (q - z), q = 0 to 255, covers a range and has an exact 0.

    Source: Jacob et al., arXiv 1712.05877, section 2.1.
    """
    low, high = min(inputs[0], 0.0), max(inputs[1], 0.0)
    step = (high - low) / _LARGEST_INPUT or 1.0
    return step, round(-low / step)


def _quantized(values: Tensor, steps: Tensor, zeros: Tensor, **attributes: int) -> Tensor:
    return torch.onnx.ops.symbolic(
        "QuantizeLinear", (values, steps, zeros), dict(attributes), dtype=zeros.dtype, shape=values.shape, version=19
    )


@torch.inference_mode()
def input_ranges(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Range]:
    """Return the range of the inputs of every packed layer, by its name, over batches of images (B, 3, S, S)."""
    seen: dict[str, Range] = {}

    def see(name: str, x: Tensor) -> None:
        low, high = map(float, x.aminmax())
        before = seen.get(name, (low, high))
        seen[name] = (min(low, before[0]), max(high, before[1]))

    packed = {name: module for name, module in adapted_modules(model) if module.quantized is not None}
    with watching(packed, see):
        for images in batches:
            model(images)
    return seen
