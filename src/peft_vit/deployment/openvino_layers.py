"""Low-bit layers in OpenVINO's decompression form, which its CPU plugin fuses into one product on packed weights.

With c the stored code, s the scale and o the offset of its group, a weight is (c' - z) s, as the operators
Constant -> Convert -> Subtract -> Multiply -> Reshape of (out, groups, group size) to (out, in):

    int3/4, int8  i4, i8: c' = c - 2^(bits - 1),    z = -(o / s + 2^(bits - 1))
    int2          u2: c' = c,                       z = -o / s
    nf4           nf4: c' = value[c],               z = -o / s

Without offset z is 0, and there is no Subtract; int2's is 2. Codes are signed, since z is then small, and loses little
where it is stored in float16 (relative error 2^-11), as offsets of float16 are. int3 takes fields of 4 bits, since the
CPU plugin has no product on 3. OpenVINO's nf4 has QLoRA's values; no type has those of nf3. Its 4-bit float, f4e2m1, is
not bitsandbytes' fp4: scaled to the same range, code 1 is 1/12 there and 1/192 here.

Sources: OpenVINO's src/common/transformations, op_conversions/convert_fc_to_compressed.cpp, for what is fused; its type
nf4, core/type/nf4.cpp, for the table.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from torch import Tensor, nn

from peft_vit.adapters import AdaptedLinear
from peft_vit.quantization import QuantizedTensor, pack_codes, unpack_codes
from peft_vit.quantization.packing import field_bits

DOMAIN, OPERATOR = "peft_vit", "PackedLinear"
_INTEGERS = {2: ov.Type.u2, 4: ov.Type.i4, 8: ov.Type.i8}  # by bits of the field
_CODEBOOKS = {"nf4": ov.Type.nf4}
_NF4_ZERO = 7  # the code whose value is 0
_FRACTION_BITS = {torch.float16: 11, torch.float32: 24}


class PackedPlace(nn.Module):
    """What stands in a packed layer's place while the model's graph is made: an operator that names the layer."""

    def __init__(self, layer: AdaptedLinear, name: str) -> None:
        super().__init__()
        self.name = name
        self.out_features = layer.out_features
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        shape = (*x.shape[:-1], self.out_features)
        y = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OPERATOR}", (x,), {"layer": self.name}, dtype=torch.float32, shape=shape, version=1
        )
        return y if self.bias is None else y + self.bias


def weight_node(weight: QuantizedTensor) -> ov.Node:
    """Return a weight matrix (out, in), float32, as operators on its codes, scales and offsets."""
    codes, scales, zeros = _stored(weight)
    rows, columns = weight.shape
    groups = weight.groups
    shape = [rows, groups, columns // groups]
    packed = pack_codes(codes.reshape(1, -1), field_bits(weight.format.bits)).numpy()
    kind = _CODEBOOKS[weight.format.type] if weight.format.has_codebook else _INTEGERS[field_bits(weight.format.bits)]
    tensor = ov.Tensor(packed, ov.Shape(shape), kind)
    node = ops.convert(ov.op.Constant(tensor, shared_memory=False), ov.Type.f32)
    if zeros is not None:
        node = ops.subtract(node, _float32(zeros))
    node = ops.multiply(node, _float32(scales))
    return ops.reshape(node, ops.constant(np.array(weight.shape, np.int64)), False)


def _float32(values: Tensor) -> ov.Node:
    """Return (out, groups) stored numbers as (out, groups, 1) in float32."""
    node = ops.constant(values.unsqueeze(-1).numpy())
    return node if values.dtype == torch.float32 else ops.convert(node, ov.Type.f32)


def _stored(weight: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the numbers that OpenVINO takes: the bits of c' (out, in) uint8, not packed, s and z (out, groups)."""
    kind, scales = weight.format, weight.scales
    codes = unpack_codes(weight.codes, kind.bits, weight.shape[1])
    unsigned = not kind.has_codebook and field_bits(kind.bits) == 2
    signed = not kind.has_codebook and not unsigned
    middle = 2 ** (kind.bits - 1)
    if signed:
        codes = (codes - middle) & (2 ** field_bits(kind.bits) - 1)  # two's complement of c - 2^(bits - 1)
    if weight.offsets is None:
        zeros = torch.full_like(scales, middle) if unsigned else None
        return codes, scales, zeros
    offsets = weight.offsets.float()
    ratio = offsets / scales.float()  # infinite or NaN where the scale is 0
    # Groups whose codes change less than the rounding of their offset are constant: (0 - -o) 1.
    constant = ~(ratio.abs() < 2.0 ** (_FRACTION_BITS[weight.offsets.dtype] + kind.bits))
    zeros = torch.where(constant, -offsets, -(ratio + middle) if signed else -ratio)
    scales = torch.where(constant, 1, scales)
    whole = constant.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)  # (out, in)
    codes = codes.masked_fill(whole, _NF4_ZERO if kind.type == "nf4" else 0)
    narrow = zeros.to(weight.offsets.dtype)
    return codes, scales, narrow if bool(narrow.isfinite().all()) else zeros
