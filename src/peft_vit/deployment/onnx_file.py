"""A model without adapters as an ONNX file that onnxruntime runs, low-bit layers by its own kernels.

torch.onnx.export (dynamo) writes the float part of any Vision Transformer of timm; packed layers are replaced by
modules that are exported as onnxruntime's operators first, in one of three ways.

**Packed** (`OnnxLinear`). With c the stored code, s the scale and o the offset of its group, y = x W^T + b is

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

**Expanded** (`ExpandedLinear`): onnxruntime expands the codes once, when it loads a file that holds the codes all the
same. The weight is written as operators on constants: for codes of 2 and 4 bits, and of 3 in fields of 4, a byte is
looked up in the table of the values that it holds (Gather), 8 bits are a Cast; then Mul by the scales and Add of the
offsets, all in float32. onnxruntime's constant folding, which is on by default, computes that when the session is made.
Seen with 1.32: the optimized model has the nodes of the float32 model's, MatMul on float32 initializers, and a call
takes as long. DequantizeLinear would be less to write, but constant folding leaves it alone. While folding goes on,
onnxruntime keeps what every operator has computed, so codes are stored in the order of the folded matrix, (in, out), to
need few of them: loading takes about 20 bytes a weight for a moment, where a float32 file takes 6. torch's exporter
folds too, where codes are few: up to 8,192 bytes of a matrix are in the file as floats.

**In 8 bits** (`Int8Linear`): from the expanded weight to whole numbers, also when the file is loaded, and a product in
8 bits: y = (q_x - z) a  (q_W s) + b, by onnxruntime's MatMulIntegerToFloat. Inputs are rounded to a step a and a zero
point z of the layer, from the smallest and largest input that training images give, so what comes out for an image does
not depend on the others of its batch. Weights are rounded to [-64, 64] with a step s for each output: without VNNI the
CPU adds pairs of products of 8 bits in 16, and 255 * 64 * 2 is the largest that fits (onnxruntime's `reduce_range`).
Against that, of ViT-S at 112 px and batch 1, one thread with AVX-512 VNNI, over float32's time: this 0.38; ranges of
each call by DynamicQuantizeMatMul 0.38, but they depend on the batch; of each token 0.44; int8 inputs in place of uint8
more than 4; MatMulNBits with accuracy_level 4, which needs no expanding, 0.95 in 4 and in 8 bits.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models.hiera import MaskUnitAttention
from torch import Tensor, nn

from peft_vit.adapters import AdaptedLinear, adapted_modules, packed_weights
from peft_vit.backbones import watching
from peft_vit.deployment.model_card import HEADER, Header, ModelCard, write_exported
from peft_vit.deployment.runtimes import INPUT, OUTPUT, onnx_digest
from peft_vit.deployment.torch_files import check_merged
from peft_vit.errors import UserError
from peft_vit.extras import require_extra
from peft_vit.quantization import QuantizationFormat, QuantizedTensor, pack_codes, unpack_codes
from peft_vit.quantization.packing import field_bits

OnnxRuntime = Literal["small", "fast"]
_OPSET = 20
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 128  # powers of two that the low-bit operators' CPU kernels take
_BNB4_TYPE = {"fp4": 0, "nf4": 1}
Range = tuple[float, float]  # the smallest and the largest of a layer's inputs
_LARGEST_WEIGHT = 64
_LARGEST_INPUT = 255
_TINY = 1e-30  # in place of the step of weights that are all 0


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


def export_onnx(
    model: nn.Module,
    file: Path,
    card: ModelCard,
    *,
    runtime: OnnxRuntime = "small",
    input_ranges: Mapping[str, Range] | None = None,
) -> None:
    """Write a model with a batch of any size: `images` (B, 3, S, S) normalised float32, to `logits` (B, classes).

    Args:
        model: a Vision Transformer of timm whose adapters are merged (`merge`), quantized or not; it stays as it is.
        file: replaced if it exists.
        card: what the file's metadata says of the model.
        runtime: small: low-bit layers stay packed in memory too; fast: onnxruntime expands them when it loads the file.
        input_ranges: of every packed layer (`input_ranges`): they are multiplied in 8 bits. In place of
            `runtime`.

    Raises:
        UserError: if a package is missing, the model carries adapters, small: a layer's groups are too small for
            onnxruntime's operators, `input_ranges`: a layer is in int2, or the file can't be written.
    """
    require_extra("onnx", "ONNX export")
    check_merged(model)
    if input_ranges is not None:
        check_int8(model)

    def exported(layer: AdaptedLinear, name: str) -> nn.Module:
        if input_ranges is not None:
            return Int8Linear(layer, input_ranges[name])
        return ExpandedLinear(layer) if runtime == "fast" else OnnxLinear(layer, name)

    proto = onnx_graph(model, card.image_size, exported)
    header = Header(card=card)
    proto.metadata_props.add(key=HEADER, value=header.signed(onnx_digest(card, proto)))
    write_exported(file, proto.SerializeToString())


def check_int8(model: nn.Module) -> None:
    """Refuse a model with a layer whose codes are not multiplied by activations in 8 bits."""
    for name, weight in packed_weights(model).items():
        if weight.format.bits == 2:
            raise UserError(
                f"{name} is in int2, and int8 takes codes of 3, 4 or 8 bits; leave it out, or take --runtime fast",
                field="--activations",
            )


def onnx_graph(model: nn.Module, image_size: int, packed: Callable[[AdaptedLinear, str], nn.Module]) -> Any:
    """Return a merged model as onnx.ModelProto; the model stays as it is.

    Args:
        model: what `export_onnx` takes.
        image_size: of its square images, in pixels.
        packed: makes what is exported in place of a packed layer, from the layer and its name.
    """
    model = copy.deepcopy(model).eval()
    for name, module in list(adapted_modules(model)):
        if module.quantized is not None:
            model.set_submodule(name, packed(module, name))
    for part in model.modules():
        if isinstance(part, MaskUnitAttention):
            setattr(part, "fused_attn", False)  # noqa: B010 - final for timm; the exporter takes no fused one of 5 D
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own insides
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, image_size, image_size),),
            dynamo=True,
            opset_version=_OPSET,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
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
