"""From adapters back to weights without: sums of float weights, or low-bit layers that took the updates in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_vit.adapters.adapted_linear import AdaptedLinear
from peft_vit.adapters.adapted_model import adapted_modules
from peft_vit.adapters.peft_layers import check_plain, is_plain, merged_base, peft_factors, tuner_layers
from peft_vit.errors import UserError
from peft_vit.quantization import QuantizedTensor, quantize, relative_error


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


@torch.no_grad()
def merge_into_offsets(model: nn.Module, *, offset_dtype: torch.dtype | None = None) -> dict[str, float]:
    """Move each update into its layer's offsets: offset <- offset + scale * B A; no code and no scale changes.

    The adapters are removed. `offset_dtype` is float32 or float16; None: as the layer's format stores offsets.

    This is QA-LoRA's merge, arXiv 2309.14717, sec. 3.3. It is exact but for the rounding of the offsets. It takes
    adapters whose input is summed over the quantizer's groups.

    Returns:
        By module, ||W_merged - W_trained||_F / ||W_trained||_F.

    Raises:
        UserError: if a layer is not quantized for good, its adapters act on other groups, or an offset overflows; then
            the model is as it was.
    """
    merged = {}
    for name, module, quantized in _layers_to_merge(model):
        groups = quantized.groups
        if any(adapter.lora_A.shape[1] != groups for _, adapter in module.adapters()):
            raise UserError(
                f"the adapters of {name} do not act on its {groups} groups of inputs, so no offset can take them; "
                "use merge_by_requantizing, which reports its error",
                field="model",
            )
        delta = torch.zeros(quantized.shape[0], groups, device=quantized.codes.device)  # (out, groups)
        for site, adapter in module.adapters():
            left, right = adapter.factors()
            delta[site.span] += left @ right
        merged[name] = (module, quantized.with_offset_added(delta, offset_dtype, name=name))
    return _put_in_place(merged)


@torch.no_grad()
def merge_by_requantizing(model: nn.Module) -> dict[str, float]:
    """Replace adapters by their sum with the layer's weight, quantized anew to the layer's own format.

    For adapters over a quantized weight that act on single inputs (QLoRA, arXiv 2305.14314). The update is rounded to
    codes with the weight, each to the nearest, and what is smaller than half a code's step may be lost: look at the
    error, and at the accuracy before and after. A layer without update keeps its codes.

    Returns:
        By module, ||W_merged - W_trained||_F / ||W_trained||_F.

    Raises:
        UserError: if a layer is not quantized for good, its adapters could be merged into offsets, or the sum does not
            fit the format; then the model is as it was.
    """
    merged = {}
    for name, module, quantized in _layers_to_merge(model):
        if any(adapter.pool > 1 for _, adapter in module.adapters()):
            raise UserError(
                f"the adapters of {name} act on groups of inputs; use merge_into_offsets, which changes no code",
                field="model",
            )
        updated = any(adapter.rank for _, adapter in module.adapters())
        anew = quantize(module.merged_weight(), quantized.format, name=name) if updated else quantized
        merged[name] = (module, anew)
    return _put_in_place(merged)


def _layers_to_merge(model: nn.Module) -> list[tuple[str, AdaptedLinear, QuantizedTensor]]:
    layers = []
    for name, module in adapted_modules(model):
        if not module.sites:
            continue
        if module.quantized is None or module.weight is not None:
            raise UserError(
                f"{name} still has its float weight; finish the quantization schedule, or use merged_state_dict for "
                "float weights",
                field="model",
            )
        layers.append((name, module, module.quantized))
    if not layers:
        raise UserError(
            "the model carries no adapters of this package on quantized weights; nothing to merge", field="model"
        )
    return layers


def _put_in_place(merged: dict[str, tuple[AdaptedLinear, QuantizedTensor]]) -> dict[str, float]:
    errors = {}
    for name, (module, quantized) in merged.items():
        trained: Tensor = module.merged_weight()
        errors[name] = relative_error(trained, quantized)
        module.quantized = quantized
        module.remove_sites()
    return errors
