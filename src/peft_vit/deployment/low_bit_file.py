"""A model without adapters in one safetensors file; quantized layers stay packed (docs/reference/exported_files.md)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer
from safetensors.torch import save
from torch import Tensor, nn

from peft_vit.adapters import AdaptedLinear, packed_weights
from peft_vit.adapters.adapter_file import read_safetensors
from peft_vit.backbones.catalog import create_skeleton
from peft_vit.config import QuantizationType
from peft_vit.deployment.merging import check_merged
from peft_vit.deployment.model_card import HEADER, ModelCard, read_json, write_exported
from peft_vit.errors import UserError, one_line
from peft_vit.quantization import QuantizationFormat, QuantizedTensor
from peft_vit.quantization.formats import dtype_name


class _Layer(BaseModel):
    """The format of one quantized layer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    type: QuantizationType
    group_size: int | None
    offset: bool
    scale_dtype: Literal["float16", "float32"]
    double_quant: bool = False
    shape: tuple[int, int]  # (out, in)

    def format(self) -> QuantizationFormat:
        return QuantizationFormat.from_json(self.model_dump(exclude={"shape"}))

    @model_serializer(mode="wrap")
    def _as_older_files(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave double_quant out where it is false, or the hash of older files would be another one."""
        fields: dict[str, Any] = serialize(self)
        return fields if self.double_quant else {name: fields[name] for name in fields if name != "double_quant"}


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = 1
    card: ModelCard
    layers: dict[str, _Layer]
    sha256: str = ""


def save_low_bit(model: nn.Module, file: Path, card: ModelCard) -> None:
    """Write a model: packed weights of its quantized layers, every other tensor as timm has it.

    Args:
        model: a Vision Transformer of timm whose adapters are merged (`merge`); float layers only are fine too.
        file: replaced if it exists.
        card: what the file says of the model.

    Raises:
        UserError: if the model carries adapters or float weights that fade out, is not the one that the card names,
            or the file can't be written.
    """
    check_merged(model)
    tensors, layers = dict(model.state_dict()), {}
    for name, weight in packed_weights(model).items():
        layers[name] = _Layer(**weight.format.as_json(), shape=weight.shape)
        tensors |= {f"{name}.weight.{part}": tensor for part, tensor in weight.tensors().items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = _Header(card=card, layers=layers)
    _build(header, tensors, file)  # what could not be read again is not written
    header = header.model_copy(update={"sha256": _digest(header, tensors)})
    write_exported(file, save(tensors, metadata={HEADER: header.model_dump_json()}))


def load_low_bit(file: Path) -> tuple[nn.Module, ModelCard]:
    """Return the model, which computes on packed weights, in evaluation mode on the CPU, and its card.

    Raises:
        UserError: if the file is cut off, was changed after it was written, or is not of this layout.
    """
    texts, tensors = read_safetensors(file)
    if HEADER not in texts:
        raise UserError("was not written by `peft-vit export --format safetensors`", file=file)
    header = read_json(_Header, texts[HEADER], file)
    found = _digest(header, tensors)
    if found != header.sha256:
        raise UserError(
            f"was changed after it was written: content of SHA-256 {found}, its header says {header.sha256}; "
            "export the run again",
            file=file,
        )
    return _build(header, tensors, file), header.card


def _digest(header: _Header, tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 over the header without its hash, and over name, dtype, shape and bytes of each tensor."""
    said = header.model_dump(mode="json", exclude={"sha256"})
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(tensors.items()):
        described = [name, dtype_name(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(described, separators=(",", ":")).encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _build(header: _Header, tensors: dict[str, Tensor], file: Path) -> nn.Module:
    """Return the model that header and tensors describe, on the tensors' own memory."""
    card = header.card
    model: nn.Module = create_skeleton(card.architecture, card.image_size, len(card.class_names))
    tensors = dict(tensors)
    for name, layer in header.layers.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear) or (linear.out_features, linear.in_features) != layer.shape:
            raise UserError(
                f"{card.model} has no linear layer of shape {layer.shape} there", file=file, field=f"layers.{name}"
            )
        prefix = f"{name}.weight."
        parts = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        module = AdaptedLinear(linear)
        try:
            module.quantized = QuantizedTensor.from_tensors(parts, layer.shape, layer.format())
        except UserError as error:
            raise UserError(error.message, file=file, field=f"{prefix}{error.field or 'codes'}") from None
        module.drop_float()
        model.set_submodule(name, module)
    like = model.state_dict()
    for name, tensor in tensors.items():
        dtype = like[name].dtype if name in like else torch.float32  # BatchNorm counts its batches in whole numbers
        if tensor.dtype != dtype or not tensor.isfinite().all():
            wanted = str(dtype).removeprefix("torch.")
            raise UserError(f"expected finite {wanted} numbers, got {tensor.dtype}", file=file, field=name)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise UserError(f"does not hold the tensors of {card.model} ({one_line(error)})", file=file) from None
    return model.requires_grad_(False).eval()
