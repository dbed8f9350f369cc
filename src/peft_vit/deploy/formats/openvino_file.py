"""A model without adapters as OpenVINO's model.xml and model.bin, low-bit layers by its own kernels.

The float part takes the way over an ONNX graph (`onnx_file`), which OpenVINO reads; packed layers become operators on
the run's own codes, in OpenVINO's decompression form, which its CPU plugin fuses into one product on packed weights.

With c the stored code, s the scale and o the offset of its group, a weight is (c' - z) s, as the operators
Constant -> Convert -> Subtract -> Multiply -> Reshape of (out, groups, group size) to (out, in):

    int3/4, int8  i4, i8: c' = c - 2^(bits - 1),    z = -(o / s + 2^(bits - 1))
    int2          u2: c' = c,                       z = -o / s
    nf4           nf4: c' = value[c],               z = -o / s

Without offset z is 0, and there is no Subtract; int2's is 2. Codes are signed, since z is then small, and loses little
where it is stored in float16 (relative error 2^-11), as offsets of float16 are. int3 takes fields of 4 bits, since the
CPU plugin has no product on 3. OpenVINO's nf4 has QLoRA's values. Its 4-bit float, f4e2m1, is not bitsandbytes' fp4:
scaled to the same range, code 1 is 1/12 there and 1/192 here.

Sources: OpenVINO's src/common/transformations, op_conversions/convert_fc_to_compressed.cpp, for what is fused; its type
nf4, core/type/nf4.cpp, for the table.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_vit.base.errors import UserError
from peft_vit.base.extras import load_openvino, require_extra
from peft_vit.base.statistics import Neighbours
from peft_vit.core.adapters import AdaptedLinear, adapted_modules, packed_weights
from peft_vit.core.quantization import QuantizedTensor, pack_codes, unpack_codes
from peft_vit.core.quantization.packing import field_bits
from peft_vit.deploy.formats.header import HEADER, UNSIGNED, ExportMetadata, Header, write_exported
from peft_vit.deploy.formats.onnx_file import onnx_graph
from peft_vit.deploy.formats.runtimes import openvino_content
from peft_vit.deploy.formats.torch_files import check_merged

DOMAIN, OPERATOR = "peft_vit", "PackedLinear"
_INTEGERS = {2: "u2", 4: "i4", 8: "i8"}  # types of OpenVINO by bits of the field
_NF4_ZERO = 7  # the code whose value is 0
_FRACTION_BITS = {torch.float16: 11, torch.float32: 24}


class PackedPlace(nn.Module):
    """What is in a packed layer's place while the model's graph is made: an operator that names the layer."""

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


def weight_node(weight: QuantizedTensor) -> Any:
    """Return a weight matrix (out, in), float32, as OpenVINO's operators on its codes, scales and offsets."""
    ov = load_openvino()
    from openvino import opset13 as ops

    def float32(values: Tensor) -> Any:  # (out, groups) to (out, groups, 1)
        node = ops.constant(values.unsqueeze(-1).numpy())
        return node if values.dtype == torch.float32 else ops.convert(node, ov.Type.f32)

    codes, scales, zeros = _stored(weight)
    (rows, columns), groups = weight.shape, weight.groups
    bits = field_bits(weight.format.bits)
    packed = pack_codes(codes.reshape(1, -1), bits).numpy()
    kind = weight.format.type if weight.format.has_codebook else _INTEGERS[bits]
    tensor = ov.Tensor(packed, ov.Shape([rows, groups, columns // groups]), getattr(ov.Type, kind))
    node = ops.convert(ov.op.Constant(tensor, shared_memory=False), ov.Type.f32)
    if zeros is not None:
        node = ops.subtract(node, float32(zeros))
    node = ops.multiply(node, float32(scales))
    return ops.reshape(node, ops.constant(np.array(weight.shape, np.int64)), False)


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
    is_constant = constant.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)  # (out, in)
    codes = codes.masked_fill(is_constant, _NF4_ZERO if kind.type == "nf4" else 0)
    narrow = zeros.to(weight.offsets.dtype)
    return codes, scales, narrow if bool(narrow.isfinite().all()) else zeros


def export_openvino(model: nn.Module, file: Path, card: ExportMetadata, reference: Neighbours | None = None) -> None:
    """Write a model with a batch of any size: `images` (B, 3, S, S) normalised float32, to `logits` (B, classes).

    Args:
        model: a Vision Transformer whose adapters are merged (`merge`), quantized or not; it stays as it is.
        file: ends in .xml, with the weights beside it in a file that ends in .bin; both are replaced if they exist.
        card: what the file says of the model.
        reference: see `export_onnx`.

    Raises:
        UserError: if a package is missing, the model carries adapters, a layer's format is none of OpenVINO's, or a
            file can't be written.
    """
    require_extra("openvino", "OpenVINO export")
    openvino = load_openvino()
    from onnxscript.optimizer import fold_constants
    from openvino import opset13
    from openvino.frontend.onnx import ConversionExtension

    check_merged(model)
    packed = packed_weights(model)
    for name, weight in packed.items():
        if weight.format.type == "fp4":
            raise UserError(
                f"{name} is in fp4, which OpenVINO has no type for (its f4e2m1 has another value at code 1); export "
                "onnx or safetensors, or use nf4 or an int type",
                field="quantization_type",
            )
    layers = {name: layer for name, layer in adapted_modules(model) if name in packed}
    places = {name: PackedPlace(layer, name) for name, layer in layers.items()}
    proto = onnx_graph(model, card.image_size, places, reference)
    # A position embedding that is resized (NaFlexViT's): OpenVINO would leave the antialiasing out.
    fold_constants(proto, should_fold=lambda node: True if node.op_type == "Resize" else None)

    def product(node: Any) -> Any:
        weight = weight_node(packed[node.get_attribute("layer")])
        return opset13.matmul(node.get_input(0), weight, False, True).outputs()

    core = openvino.Core()
    core.add_extension(ConversionExtension(OPERATOR, DOMAIN, product))
    network = core.read_model(proto.SerializeToString(), b"")
    header = Header(card=card)
    network.set_rt_info(header.model_dump_json(), [HEADER])
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "model.xml"
        openvino.save_model(network, written, compress_to_fp16=False)
        description, weights = written.read_bytes(), written.with_suffix(".bin").read_bytes()
    digest = header.signed(openvino_content(description, weights)).sha256
    signed = description.replace(UNSIGNED.encode(), digest.encode(), 1)
    write_exported(file.with_suffix(".bin"), weights)
    write_exported(file, signed)
