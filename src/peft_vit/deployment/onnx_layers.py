"""Low-bit layers in onnxruntime's own operators: what stands in a packed layer's place while a model is exported.

With c the stored code, s the scale and o the offset of its group, y = x W^T + b is computed as

    int2, int4, offset      MatMulNBits, (c - z) s with the float zero point z = -o / s
    int2, int4, int8        MatMulNBits without zero points, (c - 2^(bits - 1)) s
    int8, offset            the same, plus (sum of x over the group) (o + 128 s): floats are no zero points at 8 bits
    nf4, fp4                MatMulBnb4, value[c] s, plus (sum of x over the group) o if there are offsets

What depends on stored numbers alone (casts to float32, z, o + 128 s) is written as operators on float16 constants, so
the file stays small; onnxruntime computes it once, when it loads the file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_vit.adapters import AdaptedLinear
from peft_vit.errors import UserError
from peft_vit.quantization import QuantizedTensor

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 128  # powers of two that the operators' CPU kernels take
_BNB4_TYPE = {"fp4": 0, "nf4": 1}


class OnnxLinear(nn.Module):
    """A packed linear layer whose forward pass can only be exported.

    Args:
        layer: holds packed weights only, without adapters.
        name: of the layer, for errors.

    Raises:
        UserError: if the operators have no blocks that fit its groups.
    """

    def __init__(self, layer: AdaptedLinear, name: str) -> None:
        super().__init__()
        quantized = layer.quantized
        assert quantized is not None
        kind = quantized.format
        self.out_features, self.in_features = quantized.shape
        self.groups = quantized.scales.shape[1]
        block = _block_size(self.in_features // self.groups, name)
        self.blocks_per_group = self.in_features // self.groups // block
        self.attributes: dict[str, int] = {"K": self.in_features, "N": self.out_features, "block_size": block}
        self.zero_points = False
        self.shift = 0  # what the operator takes from a code and the format does not
        codes, scales, offsets = quantized.codes, quantized.scales, quantized.offsets
        if kind.has_codebook:
            self.operator = "MatMulBnb4"
            self.attributes["quant_type"] = _BNB4_TYPE[kind.type]
            codes = ((codes & 15) << 4 | codes >> 4).flatten()  # its earlier code takes the upper half
        else:
            self.operator = "MatMulNBits"
            self.attributes["bits"] = kind.bits
            if offsets is not None and kind.bits == 8:
                self.shift = 128
            elif offsets is not None:
                self.zero_points = True
                codes, scales = _with_finite_zero_points(quantized)
            codes = codes.view(self.out_features, self.in_features // block, -1)
        self.codes = nn.Buffer(codes)
        self.scales = nn.Buffer(scales)  # (out, groups)
        self.offsets = None if offsets is None else nn.Buffer(offsets)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, in) to (B, T, out)."""
        scales = self.scales.float()
        inputs = [x, self.codes, self._by_block(scales).flatten()]
        if self.zero_points and self.offsets is not None:
            inputs.append(self._by_block(-self.offsets.float() / scales))
        y = torch.onnx.ops.symbolic(
            f"com.microsoft::{self.operator}", inputs, dict(self.attributes),
            dtype=torch.float32, shape=(*x.shape[:-1], self.out_features), version=1,
        )  # fmt: skip
        if self.offsets is not None and not self.zero_points:
            offsets = self.offsets.float()
            if self.shift:
                offsets = offsets + self.shift * scales
            y = y + x.unflatten(-1, (self.groups, -1)).sum(-1) @ offsets.T  # (B, T, groups) (groups, out)
        return y if self.bias is None else y + self.bias

    def _by_block(self, by_group: Tensor) -> Tensor:
        """Repeat numbers of groups for the operator's blocks: (out, groups) to (out, blocks)."""
        if self.blocks_per_group == 1:
            return by_group
        return by_group.unsqueeze(-1).expand(-1, -1, self.blocks_per_group).flatten(1)


def _block_size(group_size: int, name: str) -> int:
    block = min(group_size & -group_size, _LARGEST_BLOCK)  # the largest power of two that divides it
    if block < _SMALLEST_BLOCK:
        raise UserError(
            f"{name} has groups of {group_size} inputs, and onnxruntime's low-bit products take blocks of "
            f"{_SMALLEST_BLOCK} and more that divide it; export safetensors, or train with another group size",
            field="group_size",
        )
    return block


def _with_finite_zero_points(quantized: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales; a (nearly) constant group, whose -o / s is not finite, gets codes 0 and scale 1.

    Such a scale is 0, or so small beside the offset that the codes do not change a float32 weight.
    """
    assert quantized.offsets is not None
    constant = ~(quantized.offsets.float() / quantized.scales.float()).isfinite()  # (out, groups)
    codes = quantized.codes.unflatten(1, (constant.shape[1], -1)).masked_fill(constant.unsqueeze(-1), 0).flatten(1)
    return codes, quantized.scales.masked_fill(constant, 1.0)
