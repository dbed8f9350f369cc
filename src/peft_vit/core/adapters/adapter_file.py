"""A file that holds only what was trained: adapters and head."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters.adapted_model import current_ranks, packed_weights, site_adapters
from peft_vit.core.adapters.low_rank import TRIPLETS, SiteAdapter
from peft_vit.core.quantization import QuantizationFormat

_PACKED = "packed/"  # before `blocks.3.attn.qkv/codes`


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every trainable tensor by name: adapters and head, or the whole model under full fine-tuning."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}


def adapter_bytes(model: nn.Module, metadata: dict[str, Any], *, packed: bool = False) -> bytes:
    """Return the content of an adapter file: trained tensors as safetensors, the rest as JSON in its header.

    Args:
        model: with adapters.
        metadata: goes into the header.
        packed: add the packed weights, where rounding the float ones again would not give them.
    """
    tensors = {name: tensor for name, tensor in trained_tensors(model).items() if tensor.numel()}
    if packed:
        for name, weight in packed_weights(model).items():
            tensors |= {f"{_PACKED}{name}/{key}": tensor for key, tensor in weight.tensors().items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    formats = {name: weight.format.as_json() for name, weight in packed_weights(model).items()}
    header = {**metadata, "ranks": current_ranks(model), "form": _form(model), "formats": formats}
    return save(tensors, metadata={"peft_vit": json.dumps(header, sort_keys=True)})


def _form(model: nn.Module) -> dict[str, Any]:
    """Return what else decides an update beside its tensors, by site; sites that are alike once."""
    forms = {}
    for name, adapter in site_adapters(model).items():
        forms[name] = {"scale": adapter.scale, "parametrization": adapter.parametrization, "pool": adapter.pool}
        if adapter.lora_lambda is not None:
            forms[name]["lambda_gain"] = adapter.lambda_gain
        if isinstance(adapter, SiteAdapter) and adapter.bits is not None:
            forms[name]["bits"] = adapter.bits
    values = list(forms.values())
    return values[0] if values and all(value == values[0] for value in values) else forms


def load_trained(model: nn.Module, file: Path, *, keep: Collection[str] = ()) -> dict[str, Any]:
    """Load an adapter file into a model that carries adapters on the same sites, at any rank.

    Args:
        model: changed in place.
        file: of its adapters and head.
        keep: names of parameters that stay the model's own.

    Returns:
        The metadata that was saved with it.

    Raises:
        UserError: if the file is not an adapter file or does not fit the model.
    """
    saved, form = read_adapter_file(file), _form(model)
    if saved.form != form:
        message = f"holds adapters of the form {saved.form}, the model's are {form}; attach them in the same form"
        raise UserError(message, file=file)
    present = {name: weight.format for name, weight in packed_weights(model).items()}
    for name, format in saved.formats.items():
        if format != present.get(name):
            message = (
                f"was trained on {name} as {format}, the model has {present.get(name, 'floats')}; quantize "
                "it in the same way"
            )
            raise UserError(message, file=file)
    set_ranks(model, saved.ranks, file=file)
    own = {name: parameter for name, parameter in model.named_parameters() if name in keep}
    restore_trained(model, saved.tensors | own, file=file)
    return saved.metadata


@torch.no_grad()
def load_head_rows(head: Mapping[str, nn.Parameter], file: Path, class_names: Sequence[str]) -> None:
    """Give classes that an adapter file knows by name the rows of its head; the others keep theirs.

    Args:
        head: weights and biases by their names in the model, (classes, ...); changed in place.
        file: of adapters and head.
        class_names: of the model's rows.
    """
    saved = read_adapter_file(file)
    names = saved.metadata["class_names"]
    known = [row for row, name in enumerate(class_names) if name in names]
    rows = [names.index(class_names[row]) for row in known]
    for name, parameter in head.items():
        parameter[known] = saved.tensors[name][rows].to(parameter.device)  # (known classes, ...)


class AdapterFile(NamedTuple):
    """The content of an adapter file."""

    metadata: dict[str, Any]  # as it was saved
    tensors: dict[str, Tensor]
    form: dict[str, Any]  # what else decides the updates
    ranks: dict[str, int]  # by site; likewise
    scales: dict[str, float]
    packed: dict[str, dict[str, Tensor]]  # weights by module, where rounding the float ones again would not give them
    formats: dict[str, QuantizationFormat]  # of the quantized weights that the adapters were trained on, by module


def read_adapter_file(file: Path) -> AdapterFile:
    """Read an adapter file.

    Raises:
        UserError: if it is none, or damaged.
    """
    header, tensors = read_safetensors(file)
    if "peft_vit" not in header:
        raise UserError("has no peft_vit header; it was not written by this package", file=file)
    try:
        metadata = json.loads(header["peft_vit"])
        form, formats = metadata["form"], metadata.get("formats", {})  # older files hold no formats
        if not isinstance(form, dict) or not isinstance(formats, dict):
            raise TypeError("form and formats are mappings")
        ranks: dict[str, int] = metadata["ranks"]
        if not all(type(rank) is int for rank in ranks.values()):
            raise TypeError("a rank is a whole number")
        packed: dict[str, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith(_PACKED)]:
            layer, _, key = name.removeprefix(_PACKED).rpartition("/")
            packed.setdefault(layer, {})[key] = tensors.pop(name)
        return AdapterFile(
            metadata,
            tensors,
            form,
            ranks,
            packed=packed,
            scales={name: float((form if "scale" in form else form[name])["scale"]) for name in ranks},
            formats={name: QuantizationFormat.from_json(fields) for name, fields in formats.items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, UserError) as error:
        raise UserError(
            f"has a damaged peft_vit header, or one of another version ({type(error).__name__}: {error})", file=file
        ) from None


def read_safetensors(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return header and tensors of a file that may come from anybody."""
    try:
        if not os.path.isfile(file):  # opening a pipe could wait for ever
            raise ValueError("is not a regular file")
        with safe_open(file, framework="pt") as handle:
            return handle.metadata() or {}, {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except Exception as error:  # a foreign file can fail in any way; the user needs one line
        raise UserError(f"is not a readable safetensors file ({error})", file=file) from None


def set_ranks(model: nn.Module, ranks: dict[str, int], *, file: Path | None = None) -> None:
    """Give every site the named rank with fresh triplets; for models that no optimiser holds yet or any more.

    Raises:
        UserError: naming the file that the ranks came from, if a site is missing, unknown, or can't have its rank.
    """
    adapters = site_adapters(model)
    if set(ranks) != set(adapters):
        raise UserError("names other modules than the model's adapters", file=file, field="ranks")
    for name, adapter in adapters.items():
        if not 0 <= ranks[name] <= adapter.largest_rank:
            message = f"expected 0 to {adapter.largest_rank}, got {ranks[name]}"
            raise UserError(message, file=file, field=f"ranks[{name}]")
        if adapter.rank != ranks[name]:
            device = adapter.lora_A.device
            for key, tensor in zip(TRIPLETS, adapter.fresh_triplets(ranks[name]), strict=True):
                setattr(adapter, key, None if tensor is None else nn.Parameter(tensor.to(device)))


@torch.no_grad()
def restore_trained(model: nn.Module, tensors: Mapping[str, Tensor], *, file: Path | None = None) -> None:
    """Copy trained tensors back; every trainable parameter must be there with its shape."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    check_tensors(parameters, {name: tensor for name, tensor in tensors.items() if tensor.numel()}, file=file)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def check_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], *, file: Path | None = None) -> None:
    """Refuse tensors that are not those of a model by name and shape."""
    for name in sorted(expected.keys() ^ given.keys()):
        side = "model" if name in expected else "file"
        message = f"is only in the {side}; the adapter belongs to another configuration"
        raise UserError(message, file=file, field=name)
    for name, tensor in expected.items():
        if tensor.shape != given[name].shape:
            shapes = f"expected shape {tuple(tensor.shape)}, got {tuple(given[name].shape)}"
            raise UserError(f"{shapes}; the adapter belongs to another configuration", file=file, field=name)
