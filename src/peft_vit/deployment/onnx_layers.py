"""Low-bit layers in onnxruntime's own operators: what stands in a packed layer's place while a model is exported.

With c the stored code, s the scale and o the offset of its group, y = x W^T + b is computed as

    int2, int4, int8    MatMulNBits: (c - 2^(bits - 1)) s, its default zero point
    int3                the same in fields of 4 bits, which hold c + 4: the operator takes 2, 4 and 8
    nf4, fp4            MatMulBnb4: value[c] s
    with offset         the same, plus (sum of x over the group) (o + 2^(bits - 1) s), for nf4 and fp4 (...) o

nf3 is in none of them: MatMulBnb4 has the tables of nf4 and fp4 alone.

MatMulNBits also takes float zero points -o / s, at 2 and 4 bits. The CPU kernel of onnxruntime 1.32 then unpacks the
weights at each call: ViT-S at 112 px and batch 1 takes 39 ms where the sums over groups take 20 and float32 takes 19.
And constant groups, whose s is 0, would need another way. The attribute accuracy_level stays at its default, inputs in
float32: in 8 bits (level 4) they put logits off by 2.6e-2 where they are off by 4e-6.

What depends on stored numbers alone (casts to float32, o + 2^(bits - 1) s) is written as operators on float16
constants, so the file stays small; onnxruntime computes it once, when it loads the file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_vit.adapters import AdaptedLinear
from peft_vit.errors import UserError
from peft_vit.quantization import pack_codes, unpack_codes
from peft_vit.quantization.packing import field_bits

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 128  # powers of two that the operators' CPU kernels take
_BNB4_TYPE = {"fp4": 0, "nf4": 1}


class OnnxLinear(nn.Module):
    """A packed linear layer whose forward pass can only be exported.

    Raises:
        UserError: if the operators have no blocks that fit its groups, or not its codebook.
    """

    def __init__(self, layer: AdaptedLinear, name: str) -> None:
        super().__init__()
        quantized = layer.quantized
        assert quantized is not None
        kind = quantized.format
        self.out_features, self.in_features = quantized.shape
        self.groups = quantized.groups
        group_size = self.in_features // self.groups
        block = min(group_size & -group_size, _LARGEST_BLOCK)  # the largest power of two that divides it
        if block < _SMALLEST_BLOCK:
            raise UserError(
                f"{name} has groups of {group_size} inputs, and onnxruntime's low-bit products take blocks of "
                f"{_SMALLEST_BLOCK} and more that divide it; export with --runtime fast, or train with another group "
                "size",
                field="group_size",
            )
        self.blocks_per_group = group_size // block
        self.attributes: dict[str, int] = {"K": self.in_features, "N": self.out_features, "block_size": block}
        codes = quantized.codes
        self.shift = 0  # what the operator takes from a code and the format does not
        if kind.has_codebook:
            if kind.type not in _BNB4_TYPE:
                raise UserError(
                    f"{name} is in {kind.type}, which onnxruntime's low-bit products have no table for; export with "
                    "--runtime fast, or train with int3",
                    field="quantization_type",
                )
            self.operator = "MatMulBnb4"
            self.attributes["quant_type"] = _BNB4_TYPE[kind.type]
            codes = ((codes & 15) << 4 | codes >> 4).flatten()  # its earlier code takes the upper half
        else:
            self.operator = "MatMulNBits"
            self.attributes["bits"] = bits = field_bits(kind.bits)
            self.shift = 2 ** (kind.bits - 1)
            if bits != kind.bits:
                wider = unpack_codes(codes, kind.bits, self.in_features) + (2 ** (bits - 1) - self.shift)
                codes = pack_codes(wider, bits)
            codes = codes.view(self.out_features, self.in_features // block, -1)
        self.codes = nn.Buffer(codes)
        self.scales = nn.Buffer(quantized.scales)  # (out, groups)
        self.offsets = None if quantized.offsets is None else nn.Buffer(quantized.offsets)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, in) to (B, T, out)."""
        scales = self.scales.float()
        by_block = scales  # (out, blocks)
        if self.blocks_per_group > 1:
            by_block = scales.unsqueeze(-1).expand(-1, -1, self.blocks_per_group).flatten(1)
        y = torch.onnx.ops.symbolic(
            f"com.microsoft::{self.operator}",
            (x, self.codes, by_block.flatten()),
            dict(self.attributes),
            dtype=torch.float32,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        if self.offsets is not None:
            constant = self.offsets.float() + self.shift * scales if self.shift else self.offsets.float()
            y = y + x.unflatten(-1, (self.groups, -1)).sum(-1) @ constant.T  # (B, T, groups) (groups, out)
        return y if self.bias is None else y + self.bias
