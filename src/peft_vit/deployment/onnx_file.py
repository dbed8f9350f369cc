"""A model without adapters as an ONNX file that onnxruntime runs, low-bit layers by its own kernels.

torch.onnx.export (dynamo) writes the float part of any Vision Transformer of timm; packed layers are replaced by their
onnxruntime operators first, see `onnx_layers` and, for what is expanded when the file is loaded, `onnx_expanded`.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models.hiera import MaskUnitAttention
from torch import Tensor, nn

from peft_vit.adapters import AdaptedLinear, adapted_modules, packed_weights
from peft_vit.deployment.merging import check_merged
from peft_vit.deployment.model_card import HEADER, Header, ModelCard, read_json, write_exported
from peft_vit.deployment.onnx_expanded import ExpandedLinear, Int8Linear, Range
from peft_vit.deployment.onnx_layers import OnnxLinear
from peft_vit.errors import UserError, one_line
from peft_vit.extras import require_extra
from peft_vit.safe_io import read_bytes

INPUT, OUTPUT = "images", "logits"
OnnxRuntime = Literal["small", "fast"]
_OPSET = 20


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
        input_ranges: of every packed layer (`onnx_expanded.input_ranges`): they are multiplied in 8 bits. In place of
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
    header = Header(card=card, sha256=_digest(card, proto))
    proto.metadata_props.add(key=HEADER, value=header.model_dump_json())
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


def _digest(card: ModelCard, proto: Any) -> str:
    """Return the SHA-256 over the card and the model without its metadata, which are taken out of `proto`."""
    del proto.metadata_props[:]
    digest = hashlib.sha256(card.model_dump_json().encode())
    digest.update(proto.SerializeToString(deterministic=True))
    return digest.hexdigest()


def open_onnx(file: Path) -> tuple[Callable[[Tensor], Tensor], ModelCard]:
    """Return a function from normalised images (B, 3, S, S) to logits (B, classes) by onnxruntime, and the card.

    Raises:
        UserError: if the file is cut off, was changed after it was written, was not written by this package, or
            onnxruntime is missing or can't run it.
    """
    require_extra("onnx", packages=("onnx", "onnxruntime"), file=file)
    import onnx
    import onnxruntime

    try:
        content = read_bytes(file, None)
        proto = onnx.load_from_string(content)
        text = {entry.key: entry.value for entry in proto.metadata_props}.get(HEADER)
    except Exception as error:  # a damaged file can fail in any way; the user needs one line
        raise UserError(f"is not a readable ONNX file ({error}); export the run again", file=file) from None
    if text is None:
        raise UserError("was not written by `peft-vit export --format onnx`, or was cut off", file=file)
    if _names_other_files(proto):
        raise UserError(
            "keeps numbers in other files, which could be any of this machine; export the run again", file=file
        )
    header = read_json(Header, text, file)
    if _digest(header.card, proto) != header.sha256:
        raise UserError("was changed after it was written; export the run again", file=file)
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no public class
        raise UserError(f"onnxruntime {onnxruntime.__version__} can't run it ({one_line(error)})", file=file) from None
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0]), header.card


def _names_other_files(message: Any) -> bool:
    """Tell whether a tensor anywhere in a model lies outside of it."""
    from onnx import TensorProto

    if isinstance(message, TensorProto):
        return bool(message.data_location == TensorProto.EXTERNAL or message.external_data)
    for field, value in message.ListFields():
        if field.message_type is not None:
            parts = [value] if hasattr(value, "ListFields") else value
            if any(_names_other_files(part) for part in parts):
                return True
    return False
