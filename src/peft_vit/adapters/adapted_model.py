"""The adapters that a model carries, and their sites."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from torch import nn

from peft_vit.adapters.adapted_linear import AdaptedLinear
from peft_vit.adapters.low_rank import SiteAdapter
from peft_vit.adapters.peft_layers import sites_of_layers
from peft_vit.adapters.peft_sites import PeftSite, peft_site_adapters
from peft_vit.backbones import Backbone, Site
from peft_vit.quantization import QuantizedTensor

Adapter: TypeAlias = SiteAdapter | PeftSite


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Yield (name, module) of every linear layer that carries adapters, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


def packed_weights(model: nn.Module) -> dict[str, QuantizedTensor]:
    """Return the packed weight of each quantized layer, by the layer's name."""
    return {name: module.quantized for name, module in adapted_modules(model) if module.quantized is not None}


def site_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapter of each site by the site's name, block by block; PEFT's LoRA layers count as adapters."""
    found: dict[str, Adapter] = {**peft_site_adapters(model)}
    for _, module in adapted_modules(model):
        for site, adapter in module.adapters():
            found[site.name] = adapter
    return found


def adapted_sites(model: nn.Module) -> dict[str, Site]:
    """Return the sites that carry an adapter of this package's or of the PEFT library's, by name, block by block."""
    by_peft = sites_of_layers(model)
    found: dict[str, Site] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            found |= {site.name: site for site, _ in module.adapters()}
        elif name in by_peft:
            found[by_peft[name].name] = by_peft[name]
    return found


def adapted_kinds(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the kinds of the matrices that each adapted site covers: several where they are fused and share it."""
    kinds = {linear.module: linear.kinds for linear in Backbone.within(model).layout()}
    sites = adapted_sites(model)
    return {
        name: (site.kind,) if site.kind in kinds[site.module] else kinds[site.module] for name, site in sites.items()
    }


def current_ranks(model: nn.Module) -> dict[str, int]:
    """Return the rank of each site as its tensors have it now."""
    return {name: adapter.rank for name, adapter in site_adapters(model).items()}
