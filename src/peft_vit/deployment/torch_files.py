"""A model without adapters, and its files that torch reads: one safetensors file, or a folder of its own library.

In the safetensors file quantized layers stay packed (docs/reference/exported_files.md); timm and transformers load the
folder without this package, with low-bit weights as floats.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from PIL import Image
from pydantic import SerializerFunctionWrapHandler, model_serializer
from safetensors.torch import load_file, save, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from peft_vit.adapters import (
    AdaptedLinear,
    adapted_modules,
    merge_by_requantizing,
    merge_into_offsets,
    merged_state_dict,
    packed_weights,
)
from peft_vit.adapters.adapter_file import read_safetensors
from peft_vit.backbones.catalog import create_skeleton
from peft_vit.backbones.families.transformers_models import TowerClassifier, inputs, quiet, vision_config
from peft_vit.config import QuantizationType
from peft_vit.deployment.model_card import HEADER, Classifier, Format, Header, ModelCard, Strict, write_exported
from peft_vit.errors import UserError, one_line, os_fault
from peft_vit.quantization import QuantizationFormat, QuantizedTensor
from peft_vit.quantization.formats import dtype_name

HEAD_FILE = "head.safetensors"  # of a tower of transformers: classifier.weight and classifier.bias


@dataclass(frozen=True)
class Merged:
    """A model without adapters.

    Attributes:
        model: of timm; its quantized layers compute on packed weights.
        how: float weights took the updates exactly; the groups' offsets took them; or the sums were quantized anew.
        errors: by quantized layer, ||W_merged - W_trained||_F / ||W_trained||_F.
    """

    model: nn.Module
    how: Literal["float", "offsets", "codes"]
    errors: dict[str, float]


def merge(model: nn.Module, card: ModelCard) -> Merged:
    """Merge every adapter; the given model stays as it is.

    Updates on float weights are added to them. On quantized weights they go into the groups' offsets, which stay in
    the format's dtype, or, without groups, the sum is quantized anew.

    Raises:
        UserError: if float weights are still in use beside quantized ones, or an offset overflows.
    """
    layers = [module for _, module in adapted_modules(model) if module.quantized is not None]
    if not layers:
        return Merged(with_float_weights(model, card), "float", {})
    merged = copy.deepcopy(model)
    if all(adapter.pool == 1 for layer in layers for _, adapter in layer.adapters()):
        return Merged(merged, "codes", merge_by_requantizing(merged))
    return Merged(merged, "offsets", merge_into_offsets(merged))


def check_merged(model: nn.Module) -> None:
    """Refuse a model that carries adapters, or float weights beside quantized ones."""
    for name, module in adapted_modules(model):
        if module.sites or (module.quantized is not None and module.weight is not None):
            raise UserError(f"{name} has adapters or a float weight beside the packed one; merge the model first")


def with_float_weights(model: nn.Module, card: ModelCard) -> nn.Module:
    """Return a plain model of its library with the weights that a model has, updates and low bits included."""
    plain = create_skeleton(card.architecture, card.image_size, len(card.class_names))
    plain.load_state_dict({key: tensor.detach() for key, tensor in merged_state_dict(model).items()}, assign=True)
    return plain.requires_grad_(False).eval()


def torch_classifier(model: nn.Module, card: ModelCard) -> Classifier:
    """Return a classifier that computes with torch, in float32."""
    model.eval()

    @torch.inference_mode()
    def logits(images: Tensor) -> Tensor:
        return model(images)

    return Classifier(logits, card)


class _Layer(Strict):
    """The format of one quantized layer."""

    type: QuantizationType
    group_size: int | None
    offset: bool
    scale_dtype: Literal["float16", "float32"]
    double_quant: bool = False
    shape: tuple[int, int]  # (out, in)

    @model_serializer(mode="wrap")
    def _as_older_files(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave double_quant out where it is false, or the hash of older files would be another one."""
        fields: dict[str, Any] = serialize(self)
        return fields if self.double_quant else {name: fields[name] for name in fields if name != "double_quant"}


class LowBitHeader(Header):
    """What a safetensors file says of itself and of its packed layers."""

    layers: dict[str, _Layer]


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
    header = LowBitHeader(card=card, layers=layers)
    _build(header, tensors, file)  # what could not be read again is not written
    write_exported(file, save(tensors, metadata={HEADER: header.signed(low_bit_digest(header, tensors))}))


def load_low_bit(file: Path) -> tuple[nn.Module, ModelCard]:
    """Return the model, which computes on packed weights, in evaluation mode on the CPU, and its card.

    Raises:
        UserError: if the file is cut off, was changed after it was written, or is not of this layout.
    """
    texts, tensors = read_safetensors(file)
    header = LowBitHeader.read(texts.get(HEADER), file, "safetensors")
    header.check(low_bit_digest(header, tensors), file)
    return _build(header, tensors, file), header.card


def low_bit_digest(header: LowBitHeader, tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 over the header without its hash, and over name, dtype, shape and bytes of each tensor."""
    fields = header.model_dump(mode="json", exclude={"sha256"})
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(tensors.items()):
        described = [name, dtype_name(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(described, separators=(",", ":")).encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _build(header: LowBitHeader, tensors: dict[str, Tensor], file: Path) -> nn.Module:
    """Return the model that header and tensors describe, on the tensors' own memory."""
    card = header.card
    model: nn.Module = create_skeleton(card.architecture, card.image_size, len(card.class_names))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tensors = dict(tensors)
    for name, layer in header.layers.items():
        linear = linears.get(name)
        if linear is None or (linear.out_features, linear.in_features) != layer.shape:
            raise UserError(
                f"{card.model} has no linear layer of shape {layer.shape} there", file=file, field=f"layers.{name}"
            )
        prefix = f"{name}.weight."
        parts = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        module = AdaptedLinear(linear)
        try:
            format = QuantizationFormat.from_json(layer.model_dump(exclude={"shape"}))
            module.quantized = QuantizedTensor.from_tensors(parts, layer.shape, format)
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


def save_pretrained(model: nn.Module, folder: Path, card: ModelCard) -> None:
    """Write a model's files: config.json, model.safetensors; of transformers preprocessor_config.json, too.

    timm loads them with `create_model("local-dir:FOLDER", pretrained=True)`, transformers with
    `AutoModelForImageClassification.from_pretrained(FOLDER)`. A tower, which transformers has no class with a head for,
    is loaded with `AutoModel`, and its head lies beside it in head.safetensors.

    Args:
        model: merged; stays as it is.
        folder: created; must be empty.
        card: names the model, its classes and its images.

    Raises:
        UserError: if the folder holds files, or can't be written to.
    """
    plain: Any = with_float_weights(model, card)
    with os_fault("can't be written to", folder, remedy="choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError("holds files already; choose another folder", file=folder, field="--output")
        if card.library == "timm":
            images = {
                "input_size": (3, card.image_size, card.image_size),
                "mean": card.mean,
                "std": card.std,
                "interpolation": card.interpolation,
                "crop_pct": 1.0,
                "crop_mode": "squash",
            }
            config = {"label_names": list(card.class_names)}
            save_for_hf(plain, str(folder), model_config=config, safe_serialization=True, data_config=images)
        else:
            with quiet():
                _save_transformers(plain, folder, card)


def _save_transformers(model: Any, folder: Path, card: ModelCard) -> None:
    import transformers

    if isinstance(model, TowerClassifier):
        model.tower.save_pretrained(folder)
        save_file({name: part.contiguous() for name, part in model.classifier.state_dict().items()}, folder / HEAD_FILE)
    else:
        model.config.id2label = dict(enumerate(card.class_names))
        model.config.label2id = {name: number for number, name in enumerate(card.class_names)}
        model.save_pretrained(folder)
    settings: dict[str, Any] = {
        "image_mean": list(card.mean),
        "image_std": list(card.std),
        "resample": int(Image.Resampling[card.interpolation.upper()]),
    }
    config = vision_config(model.config)
    if config.model_type.startswith("siglip2"):
        settings |= {"patch_size": config.patch_size, "max_num_patches": (card.image_size // config.patch_size) ** 2}
        processor: Any = transformers.Siglip2ImageProcessor(**settings)
    else:
        processor = transformers.ViTImageProcessor(
            size={"height": card.image_size, "width": card.image_size}, **settings
        )
    processor.save_pretrained(folder)


def load_pretrained(folder: Path, card: ModelCard) -> nn.Module:
    """Return what timm or transformers makes of a folder that `save_pretrained` has written: images to logits."""
    if card.library == "timm":
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return model.eval()
    import transformers

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (folder / HEAD_FILE).is_file():
            tower = transformers.AutoModel.from_pretrained(folder)
            whole = TowerClassifier(tower, len(card.class_names))
            whole.classifier.load_state_dict(load_file(folder / HEAD_FILE))
            return whole.eval()
        return _Logits(transformers.AutoModelForImageClassification.from_pretrained(folder)).eval()


class _Logits(nn.Module):
    """A model of transformers as it is loaded there, that maps images to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> torch.Tensor:
        return self.model(**inputs(self.model, images)).logits


def _open_pretrained(folder: Path, card: ModelCard | None) -> Classifier:
    if card is None:
        raise UserError("holds no card of how images become its input; load it with timm or transformers", file=folder)
    return torch_classifier(load_pretrained(folder, card), card)


FORMATS = {
    "safetensors": Format(save_low_bit, lambda file, _: torch_classifier(*load_low_bit(file))),
    "pretrained": Format(save_pretrained, _open_pretrained),
}
