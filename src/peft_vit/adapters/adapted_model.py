"""The adapters that a model carries, their sites, and what the model computes without some of their updates."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from torch import nn

from peft_vit.adapters.adapted_linear import AdaptedLinear
from peft_vit.adapters.low_rank import SiteAdapter
from peft_vit.adapters.peft_layers import PeftSite, peft_layers, peft_ranks, peft_site_adapters, sites_of_layers
from peft_vit.backbones import Backbone, Site
from peft_vit.errors import UserError
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


def update_ranks(model: nn.Module) -> dict[str, int]:
    """Return the rank of every site that has an update of this package's or of the PEFT library's."""
    return current_ranks(model) | peft_ranks(model)


@contextmanager
def without_updates(model: nn.Module, sites: Collection[str]) -> Iterator[None]:
    """Leave the updates of some sites out of every forward pass, as if B (or lambda) were zero.

    No tensor is touched. Afterwards the model is as it was, whatever happened inside.

    Args:
        model: carries adapters of this package, or LoRA or AdaLoRA of the PEFT library.
        sites: by name, `blocks.3.attn.query`; of PEFT's `blocks.3.attn.qkv`.

    Raises:
        UserError: if the model has no adapter on a site.
    """
    unknown = sorted(set(sites) - set(update_ranks(model)))
    if unknown:
        raise UserError(f"the model has no adapter on {unknown[0]}; name sites that have one", field="sites")
    with ExitStack() as stack:
        for _, module in adapted_modules(model):
            named = {site.name for site, _ in module.adapters()}.intersection(sites)
            if named:
                stack.callback(setattr, module, "ablated", module.ablated)
                module.ablated = module.ablated.union(named)
        places = sites_of_layers(model)
        for name, layer in peft_layers(model).items():
            if name in places and places[name].name in sites and not layer.disable_adapters:
                stack.enter_context(_disabled(layer))
        yield


@contextmanager
def _disabled(layer: Any) -> Iterator[None]:
    """Use PEFT's own switch, which also says that the factors are not, and then that they are to be trained."""
    trained = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    layer.enable_adapters(False)
    try:
        yield
    finally:
        layer.enable_adapters(True)
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)
