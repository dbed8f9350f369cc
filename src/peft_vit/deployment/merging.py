"""From a model with adapters to one without: what the exports are made of."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

from torch import nn

from peft_vit.adapters import (
    adapted_modules,
    merge_by_requantizing,
    merge_into_offsets,
    merged_state_dict,
    packed_weights,
)
from peft_vit.backbones.catalog import create_skeleton
from peft_vit.deployment.model_card import ModelCard
from peft_vit.errors import UserError
from peft_vit.quantization.formats import SCALE_DTYPES, dtype_name


@dataclass(frozen=True)
class Merged:
    """A model without adapters.

    Attributes:
        model: of timm; its quantized layers compute on packed weights.
        how: float weights took the updates exactly; the groups' offsets took them; or the sums were quantized anew.
        errors: by what offsets are stored in ("float32", "float16") and by layer,
            ||W_merged - W_trained||_F / ||W_trained||_F; re-quantized: under "codes"; float weights: none.
        offset_dtype: which of both the model has; None: no offset took an update.
    """

    model: nn.Module
    how: Literal["float", "offsets", "codes"]
    errors: dict[str, dict[str, float]]
    offset_dtype: str | None = None


def merge(model: nn.Module, card: ModelCard) -> Merged:
    """Merge every adapter; the given model stays as it is.

    Updates on float weights are added to them. On quantized weights they go into the groups' offsets, which stay in
    the format's dtype (the error is given for both dtypes), or, without groups, the sum is quantized anew.

    Raises:
        UserError: if float weights are still in use beside quantized ones, or an offset overflows.
    """
    layers = [module for _, module in adapted_modules(model) if module.quantized is not None]
    if not layers:
        return Merged(with_float_weights(model, card), "float", {})
    if all(adapter.pool == 1 for layer in layers for _, adapter in layer.adapters()):
        merged = copy.deepcopy(model)
        return Merged(merged, "codes", {"codes": merge_by_requantizing(merged)})
    copies = {dtype: copy.deepcopy(model) for dtype in SCALE_DTYPES}
    errors = {dtype_name(dtype): merge_into_offsets(merged, offset_dtype=dtype) for dtype, merged in copies.items()}
    (stored,) = {weight.format.scale_dtype for weight in packed_weights(model).values()}
    return Merged(copies[stored], "offsets", errors, dtype_name(stored))


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
