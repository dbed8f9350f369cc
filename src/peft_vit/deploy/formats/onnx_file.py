"""A model without adapters as an ONNX file that onnxruntime runs, low-bit layers by its own kernels.

torch.onnx.export (dynamo) writes the float part of any Vision Transformer of timm; packed layers are replaced by
modules that are exported as onnxruntime's operators first, in one of three ways.

**Packed** (`OnnxLinear`). With c the stored code, s the scale and o the offset of its group, y = x W^T + b is

    int2, int4, int8    MatMulNBits: (c - 2^(bits - 1)) s, its default zero point
    int3                the same in fields of 4 bits, which hold c + 4: the operator takes 2, 4 and 8
    nf4, fp4            MatMulBnb4: value[c] s
    with offset         the same, plus (sum of x over the group) (o + 2^(bits - 1) s), for nf4 and fp4 (...) o

MatMulNBits also takes float zero points -o / s, at 2 and 4 bits. The CPU kernel of onnxruntime 1.32 then unpacks the
weights at each call: ViT-S at 112 px and batch 1 takes 39 ms where the sums over groups take 20 and float32 takes 19.
And constant groups, whose s is 0, would need another way. The attribute accuracy_level stays at its default, inputs in
float32: in 8 bits (level 4) they put logits off by 2.6e-2 where they are off by 4e-6.

What depends on stored numbers alone (casts to float32, o + 2^(bits - 1) s) is written as operators on float16
constants, so the file stays small; onnxruntime computes it once, when it loads the file.

**Expanded** (`ExpandedLinear`): onnxruntime expands the codes once, when it loads a file that holds the codes all the
same. The weight is written as operators on constants: for codes of 2 and 4 bits, and of 3 in fields of 4, a byte is
looked up in the table of the values that it holds (Gather), 8 bits are a Cast; then Mul by the scales and Add of the
offsets, all in float32. onnxruntime's constant folding, which is on by default, computes that when the session is made.
Seen with 1.32: the optimized model has the nodes of the float32 model's, MatMul on float32 initializers, and a call
takes as long. DequantizeLinear would be less to write, but constant folding leaves it alone. While folding continues,
onnxruntime keeps what every operator has computed, so codes are stored in the order of the folded matrix, (in, out), to
need few of them: loading takes about 20 bytes a weight for a moment, where a float32 file takes 6. torch's exporter
folds too, where codes are few: up to 8,192 bytes of a matrix are in the file as floats.

**In 8 bits** (`Int8Linear`): the product that `training.compute: int8` makes (`quantization.integers`), step for step:
y = t s (q C) + b with int8 codes q of the inputs and a scale t for each token, and codes C of the weights and a scale s
for each output; sums are int32. onnxruntime's own dynamic quantization has one scale and zero point for a whole batch,
so q comes from plain operators. It is stored as q + 128 with zero point 128, since int8 inputs took four times as long,
and MatMulIntegerToFloat gives s (q C). Codes of packed weights are computed when the file is loaded, from the expanded
weight; those of float weights are in the file. Weights take 7 bits, within [-64, 64]: without VNNI the CPU adds pairs
of products in 16 bits, and 255 * 64 * 2 is the largest that fits (onnxruntime's `reduce_range`). Weights as uint8 would
be exact with 8 bits on every processor, but have no VNNI kernel: a call takes nearly as long as float32's.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models.hiera import MaskUnitAttention
from torch import Tensor, nn

from peft_vit.base.errors import UserError
from peft_vit.base.extras import require_extra
from peft_vit.base.statistics import Neighbours
from peft_vit.core.adapters import AdaptedLinear, adapted_modules
from peft_vit.core.backbones import Backbone
from peft_vit.core.quantization import QuantizedTensor, pack_codes, unpack_codes
from peft_vit.core.quantization.integers import EXPORTED_MATMUL, LARGEST, Int8Weight
from peft_vit.core.quantization.packing import field_bits
from peft_vit.deploy.formats.header import HEADER, ExportMetadata, Header, write_exported
from peft_vit.deploy.formats.runtimes import DISTANCE, INPUT, OPSET, OUTPUT, onnx_content
from peft_vit.deploy.formats.torch_files import check_merged
from peft_vit.runs.measures.neighbours import WithDistance

OnnxRuntime = Literal["small", "fast"]
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 128  # powers of two that the low-bit operators' CPU kernels take
_BNB4_TYPE = {"fp4": 0, "nf4": 1}
_ZERO = 128  # what stands for 0 among the inputs' codes


class OnnxLinear(nn.Module):
    """A packed linear layer whose forward pass can only be exported.

    Raises:
        UserError: if the operators have no blocks that fit its groups.
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
        # What the codes in each of the 256 bytes mean before scale and offset.
        in_bytes = (torch.arange(256).unsqueeze(1) >> bits * torch.arange(per_byte)) & (2**kind.bits - 1)
        self.table = nn.Buffer(kind.values()[in_bytes]) if kind.bits < 8 else None  # (256, codes a byte)
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
    """A frozen linear layer, packed or not, that is multiplied in 8 bits; its forward pass can only be exported."""

    def __init__(self, layer: nn.Linear | AdaptedLinear) -> None:
        super().__init__()
        packed = layer.quantized if isinstance(layer, AdaptedLinear) else None
        if packed is None:
            assert layer.weight is not None
            integers = Int8Weight.from_float(layer.weight, EXPORTED_MATMUL)
        else:
            integers = Int8Weight.from_quantized(packed, EXPORTED_MATMUL)
        self.expanded = None if packed is None else ExpandedWeight(packed)
        self.codes = nn.Buffer(integers.codes.T.contiguous()) if packed is None else None  # (in, out)
        self.scales = nn.Buffer(integers.scales)  # (out,)
        self.no_zeros = nn.Buffer(torch.zeros(layer.out_features, dtype=torch.int8))
        self.one = nn.Buffer(torch.ones(()))
        self.zero = nn.Buffer(torch.tensor(_ZERO, dtype=torch.uint8))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        codes = self.codes if self.expanded is None else _quantized(self.expanded(), self.scales, self.no_zeros, axis=1)
        largest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
        scales = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)  # (..., 1)
        inputs = _quantized(x * torch.div(self.one, scales), self.one, self.zero)  # Reciprocal may be approximate
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulIntegerToFloat",
            (inputs, codes, self.one, self.scales, self.zero, self.no_zeros),
            dtype=torch.float32,
            shape=(*x.shape[:-1], len(self.scales)),
            version=1,
        )
        y = y * scales
        return y if self.bias is None else y + self.bias


def _quantized(values: Tensor, steps: Tensor, zeros: Tensor, **attributes: int) -> Tensor:
    return torch.onnx.ops.symbolic(
        "QuantizeLinear", (values, steps, zeros), dict(attributes), dtype=zeros.dtype, shape=values.shape, version=19
    )


def export_onnx(
    model: nn.Module,
    file: Path,
    card: ExportMetadata,
    reference: Neighbours | None = None,
    *,
    runtime: OnnxRuntime = "small",
    activations: Literal["int8"] | None = None,
) -> None:
    """Write a model with a batch of any size: `images` (B, 3, S, S) normalised float32, to `logits` (B, classes).

    Args:
        model: a Vision Transformer of timm whose adapters are merged (`merge`), quantized or not; it stays as it is.
        file: replaced if it exists.
        card: what the file's metadata says of the model.
        runtime: small: low-bit layers stay packed in memory too; fast: onnxruntime expands them when it loads the file.
        activations: int8: linear layers of the blocks, packed or not, multiply 8-bit integers. Instead of `runtime`.
        reference: features of training images, by which it recognises out-of-distribution images: a second output,
            `distance` (B,), says how far an image is from these.

    Raises:
        UserError: if a package is missing, the model carries adapters, small: a layer's groups are too small for
            onnxruntime's operators, or the file can't be written.
    """
    require_extra("onnx", "ONNX export")
    check_merged(model)
    packed = {name: layer for name, layer in adapted_modules(model) if layer.quantized is not None}
    if activations == "int8":
        model = copy.deepcopy(model)
        backbone = Backbone.within(model)
        backbone.prepare()
        layers = {name: model.get_submodule(name) for name in (*packed, *(site.module for site in backbone.sites))}
        replaced: dict[str, nn.Module] = {
            name: Int8Linear(layer) for name, layer in layers.items() if isinstance(layer, nn.Linear | AdaptedLinear)
        }
        card = card.model_copy(update={"integer_bits": 7})
    elif runtime == "fast":
        replaced = {name: ExpandedLinear(layer) for name, layer in packed.items()}
    else:
        replaced = {name: OnnxLinear(layer, name) for name, layer in packed.items()}
    proto = onnx_graph(model, card.image_size, replaced, reference)
    header = Header(card=card)
    proto.metadata_props.add(key=HEADER, value=header.signed(onnx_content(card, proto)).model_dump_json())
    write_exported(file, proto.SerializeToString())


def onnx_graph(
    model: nn.Module, image_size: int, replaced: Mapping[str, nn.Module], reference: Neighbours | None = None
) -> Any:
    """Return a merged model as onnx.ModelProto; the model stays as it is.

    Args:
        model: what `export_onnx` takes.
        image_size: of its square images, in pixels.
        replaced: what is exported instead of layers, by their names.
        reference: see `export_onnx`.
    """
    model = copy.deepcopy(model).eval()
    for name, module in replaced.items():
        model.set_submodule(name, module)
    for part in model.modules():
        if isinstance(part, MaskUnitAttention):
            setattr(part, "fused_attn", False)  # noqa: B010 - final for timm; the exporter takes no fused one of 5 D
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own insides
        program = torch.onnx.export(
            model if reference is None else WithDistance(model, reference).eval(),
            (torch.zeros(2, 3, image_size, image_size),),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT] if reference is None else [OUTPUT, DISTANCE],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table={torch.ops.aten._is_all_true.default: _all_true},
        )
    assert program is not None
    proto: Any = program.model_proto
    # What only explains the graph to people goes: half a megabyte of where each node comes from.
    graph = proto.graph
    for entry in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del entry.metadata_props[:]
        entry.doc_string = ""
    del graph.value_info[:]
    proto.producer_name = "peft-vit"
    return proto


def _all_true(values: Any) -> Any:
    """Translate what the exporter does not know: SigLIP 2 of transformers asks it of the shapes of its images."""
    from onnx import TensorProto
    from onnxscript import opset20

    op: Any = opset20

    return op.Cast(op.ReduceMin(op.Cast(values, to=TensorProto.INT32), keepdims=0), to=TensorProto.BOOL)
