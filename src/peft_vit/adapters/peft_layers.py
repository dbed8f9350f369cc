"""Layers that the PEFT library has put into a model: their sites, ranks and updates.

PEFT is not imported: where nobody else has, a model has none of its layers.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from peft_vit.backbones import Backbone, Site, fused_sites
from peft_vit.errors import UserError

ADAPTER = "default"  # PEFT's name for a model's first adapter
_SITE = "peft_vit_site"  # a layer keeps its site under this name


def peft_layers(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's LoRA and AdaLoRA layers by the name of the module that they took the place of."""
    peft = sys.modules.get("peft.tuners.lora.layer")
    if peft is None:
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, peft.LoraLayer)}


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers of any tuner of PEFT by the name of the module that they took the place of."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None:
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, peft.BaseTunerLayer)}


def sites_of_layers(model: nn.Module) -> dict[str, Site]:
    """Return the site of each of PEFT's layers, `blocks.3.attn.qkv`, by the layer's name as above.

    The model is or wraps one of a class that a family knows. A fused matrix is one site with one rank. Layers that
    stand elsewhere than on a block's matrices are left out.
    """
    layers = tuner_layers(model)
    if not all(hasattr(layer, _SITE) for layer in layers.values()):
        backbone = Backbone.within(model)
        backbone.prepare()
        known = {id(backbone.model.get_submodule(name)): site for name, site in fused_sites(backbone.sites).items()}
        for layer in layers.values():
            setattr(layer, _SITE, known.get(id(layer)))
    sites = {name: getattr(layer, _SITE) for name, layer in layers.items()}
    return {name: site for name, site in sites.items() if site is not None}


def peft_ranks(model: nn.Module) -> dict[str, int]:
    """Return the rank of each site that PEFT adapts, `blocks.3.attn.qkv`: what its last mask left, or what it made.

    A tuner without ranks, as IA3, has none.
    """
    layers = {name: layer for name, layer in tuner_layers(model).items() if ADAPTER in getattr(layer, "r", {})}
    if not layers:
        return {}
    pattern = getattr(model.peft_config[ADAPTER], "rank_pattern", None) or {}  # type: ignore[index]
    # LoRA's pattern holds ranks that its layers have already; AdaLoRA's holds masks.
    masks = {name.partition(".lora_E")[0]: mask for name, mask in pattern.items() if not isinstance(mask, int)}
    return {
        site.name: sum(masks[name]) if name in masks else layers[name].r[ADAPTER]
        for name, site in sites_of_layers(model).items()
        if name in layers
    }


@torch.no_grad()
def merged_base(layer: Any) -> Any:
    """Return a copy of the layer that a tuner wraps, with the update in its weight, as PEFT merges it."""
    merged = copy.deepcopy(layer)
    merged.merge(adapter_names=[ADAPTER])
    base: nn.Module = merged.get_base_layer()
    return base


def is_plain(layer: Any) -> bool:
    """Tell whether a layer computes no more than W x + scale * B A x."""
    return type(layer).__name__ in ("Linear", "SVDLinear") and hasattr(layer, "lora_A") and not layer.lora_variant


def check_plain(name: str, layer: Any, adapter: str = ADAPTER) -> None:
    """Refuse a layer that computes more than W x + scale * B A x, or whose factors are not all of it.

    Raises:
        UserError: naming the module.
    """
    if type(layer).__name__ not in ("Linear", "SVDLinear") or list(layer.lora_A) != [adapter]:
        raise UserError(
            f"PEFT's {type(layer).__name__} is more there than one plain LoRA or AdaLoRA named '{adapter}'; use PEFT's "
            "own save_pretrained or merge_and_unload",
            field=name,
        )
    if any(layer.lora_bias.values()):
        raise UserError("lora_bias does not belong to a rank; switch it off", field=name)
    if layer.lora_variant:
        variant = next(iter(layer.lora_variant.values()))
        raise UserError(f"{type(variant).__name__} is more than plain LoRA; switch it off (DoRA and so on)", field=name)
    if layer.merged:
        raise UserError("its update is merged into the weight; call unmerge_adapter first", field=name)


@torch.no_grad()
def peft_factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    """Return A (r, in), B (out, r) and the scale of a layer, so that dW = scale * B A; masked triplets are left out."""
    if hasattr(layer, "lora_E"):
        diagonal = layer.lora_E[ADAPTER].flatten()  # (r0,); a mask sets its triplets' to exactly 0
        kept = diagonal != 0
        left = (layer.lora_B[ADAPTER] * diagonal)[:, kept]
        return layer.lora_A[ADAPTER][kept], left, layer.scaling[ADAPTER] / (float(layer.ranknum[ADAPTER]) + 1e-5)
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]
