"""From adapters back to plain weights, and to a file that holds only what was trained."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from peft_vit.adapters.injection import adapted_modules, current_ranks, site_adapters
from peft_vit.adapters.low_rank import SiteAdapter
from peft_vit.adapters.peft_layers import check_plain, is_plain, merged_base, peft_factors, tuner_layers
from peft_vit.errors import UserError
from peft_vit.quantization import QuantizationFormat


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict of the plain timm model, with every update added to its weight (float32)."""
    adapted = dict(adapted_modules(model))
    by_peft = tuner_layers(model)
    state = {}
    for name, tensor in model.state_dict().items():
        owner = next((module for module in (*adapted, *by_peft) if name.startswith(f"{module}.")), None)
        if owner is None:
            state[name] = tensor
    for name, module in adapted.items():
        state[f"{name}.weight"] = module.merged_weight().detach()
        if module.bias is not None:
            state[f"{name}.bias"] = module.bias.detach()
    for name, layer in by_peft.items():
        if is_plain(layer):
            check_plain(name, layer)
            base = layer.get_base_layer()
            right, left, scale = peft_factors(layer)
            state[f"{name}.weight"] = base.weight.detach() + scale * (left @ right)
        else:
            base = merged_base(layer)
            state[f"{name}.weight"] = base.weight.detach()
        if base.bias is not None:
            state[f"{name}.bias"] = base.bias.detach()
    return state


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every trainable tensor by name: adapters and head, or the whole model under full fine-tuning."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}


def adapter_bytes(model: nn.Module, metadata: dict[str, Any]) -> bytes:
    """Return the content of an adapter file: trained tensors as safetensors, the rest as JSON in its header."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in trained_tensors(model).items() if tensor.numel()}
    formats = {name: format.as_json() for name, format in _formats(model).items()}
    header = {**metadata, "ranks": current_ranks(model), "form": _form(model), "formats": formats}
    return save(tensors, metadata={"peft_vit": json.dumps(header, sort_keys=True)})


def _form(model: nn.Module) -> dict[str, Any]:
    """Return what else decides an update beside its tensors, by site; sites that are alike once."""
    forms = {}
    for name, adapter in site_adapters(model).items():
        forms[name] = {"scale": adapter.scale, "parametrization": adapter.parametrization, "pool": adapter.pool}
        if isinstance(adapter, SiteAdapter) and adapter.lora_lambda is not None:
            forms[name]["lambda_gain"] = adapter.lambda_gain
    values = list(forms.values())
    return values[0] if values and all(value == values[0] for value in values) else forms


def _formats(model: nn.Module) -> dict[str, QuantizationFormat]:
    """Return the number format of each quantized weight, by module."""
    return {name: one.quantized.format for name, one in adapted_modules(model) if one.quantized is not None}


def saved_formats(file: Path) -> dict[str, QuantizationFormat]:
    """Return the number format of each quantized weight that the adapters of a file were trained on, by module.

    Raises:
        UserError: as `load_trained`.
    """
    formats: dict[str, QuantizationFormat] = _read(file)[0]["formats"]
    return formats


def saved_ranks(file: Path) -> dict[str, int]:
    """Return the rank of each site in an adapter file.

    Raises:
        UserError: as `load_trained`.
    """
    ranks: dict[str, int] = _read(file)[0]["ranks"]
    return ranks


def load_trained(model: nn.Module, file: Path) -> dict[str, Any]:
    """Load an adapter file into a model that carries adapters on the same sites, at any rank.

    Returns:
        The metadata that was saved with it.

    Raises:
        UserError: if the file is no adapter file or does not fit the model.
    """
    metadata, tensors = _read(file)
    if metadata["form"] != _form(model):
        raise UserError(
            f"holds adapters of the form {metadata['form']}, the model's are {_form(model)}; attach them alike",
            file=file,
        )
    present, saved = _formats(model), metadata["formats"]
    different = next((name for name in saved if saved[name] != present.get(name)), None)
    if different is not None:
        raise UserError(
            f"was trained on {different} as {saved[different]}, the model has {present.get(different, 'floats')}; "
            "quantize alike",
            file=file,
        )
    set_ranks(model, metadata["ranks"], file=file)
    restore_trained(model, tensors, file=file)
    return metadata


def saved_scales(file: Path) -> dict[str, float]:
    """Return the scale of each site in an adapter file.

    Raises:
        UserError: as `load_trained`.
    """
    metadata, _ = _read(file)
    form = metadata["form"]
    try:
        return {name: float(form["scale"] if "scale" in form else form[name]["scale"]) for name in metadata["ranks"]}
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(error, file) from None


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata of an adapter file, with ranks as numbers and formats as such, and its tensors."""
    try:
        if not os.path.isfile(file):  # opening a pipe could wait for ever
            raise ValueError("no regular file")
        with safe_open(file, framework="pt") as handle:
            header = (handle.metadata() or {}).get("peft_vit")
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except Exception as error:
        raise UserError(f"is not a readable safetensors file ({error})", file=file) from None
    if header is None:
        raise UserError("has no peft_vit header; it was not written by this package", file=file)
    try:
        metadata: dict[str, Any] = json.loads(header)
        metadata["ranks"] = {name: _rank(rank) for name, rank in metadata["ranks"].items()}
        saved = metadata.get("formats", {})  # older files hold none
        if not isinstance(metadata["form"], dict) or not isinstance(saved, dict):
            raise TypeError("form and formats are mappings")
        metadata["formats"] = {name: QuantizationFormat.from_json(fields) for name, fields in saved.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, UserError) as error:
        raise _damaged(error, file) from None
    return metadata, tensors


def _rank(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"a rank is a whole number, not {value!r}")
    return value


def _damaged(error: Exception, file: Path) -> UserError:
    return UserError(f"has a damaged peft_vit header ({type(error).__name__}: {error})", file=file)


def set_ranks(model: nn.Module, ranks: dict[str, int], *, file: Path | None = None) -> None:
    """Give every site the named rank with fresh triplets; for models that no optimiser holds yet or any more.

    Raises:
        UserError: naming the file that the ranks came from, if a site is missing, unknown, or can't have its rank.
    """
    adapters = site_adapters(model)
    if set(ranks) != set(adapters):
        raise UserError("names other sites than the model's adapters", file=file, field="ranks")
    for name, adapter in adapters.items():
        if not 0 <= ranks[name] <= adapter.largest_rank:
            problem = f"expected 0 to {adapter.largest_rank}, got {ranks[name]}"
            raise UserError(problem, file=file, field=f"ranks[{name}]")
        if adapter.rank != ranks[name]:
            lora_A, lora_B, lora_lambda = adapter.fresh_triplets(ranks[name])
            device = adapter.lora_A.device
            adapter.lora_A = nn.Parameter(lora_A.to(device))
            adapter.lora_B = nn.Parameter(lora_B.to(device))
            adapter.lora_lambda = None if lora_lambda is None else nn.Parameter(lora_lambda.to(device))


@torch.no_grad()
def restore_trained(model: nn.Module, tensors: dict[str, Tensor], *, file: Path | None = None) -> None:
    """Copy trained tensors back; every trainable parameter must be there with its shape."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    for name in sorted(set(parameters) ^ {name for name, tensor in tensors.items() if tensor.numel()}):
        side = "model" if name in parameters else "file"
        raise UserError(
            f"stands only in the {side}; the adapter belongs to another configuration", file=file, field=name
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            shapes = f"expected shape {tuple(parameter.shape)}, got {tuple(tensors[name].shape)}"
            raise UserError(f"{shapes}; the adapter belongs to another configuration", file=file, field=name)
        parameter.copy_(tensors[name])
