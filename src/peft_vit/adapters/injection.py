"""Put adapters on a model's sites, and find them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from torch import nn

from peft_vit.adapters.adapted_linear import AdaptedLinear
from peft_vit.adapters.low_rank import FactorStart, Parametrization, SiteAdapter
from peft_vit.adapters.peft_layers import sites_of_layers
from peft_vit.adapters.peft_sites import PeftSite, peft_site_adapters
from peft_vit.backbones import Backbone, Site
from peft_vit.errors import UserError
from peft_vit.seeding import torch_generator

Adapter: TypeAlias = SiteAdapter | PeftSite


def freeze_backbone(model: nn.Module) -> None:
    """Leave only the classification head trainable."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    backbone = Backbone(model)
    backbone.prepare()
    head = backbone.head
    if not any(True for _ in head.parameters()):
        raise UserError("the model has no classification head; create it with num_classes", field="num_classes")
    for parameter in head.parameters():
        parameter.requires_grad_(True)


def attach_adapters(
    model: nn.Module,
    sites: Sequence[Site],
    ranks: Mapping[str, int] | int,
    *,
    scale: Mapping[str, float] | float,
    seed: int,
    parametrization: Parametrization = "product",
    factor_start: FactorStart = "normal",
    lambda_gain: float = 1.0,
    pool: int = 1,
) -> None:
    """Freeze the backbone and put one adapter on each site; the model's outputs do not change.

    Args:
        model: a Vision Transformer of timm, changed in place.
        sites: from `backbones.find_sites`, or `fused_sites` of them.
        ranks: of each site by name, or one for all; 0 is allowed.
        scale: factor on the update, likewise.
        seed: the run's seed. Each site has its own stream, so other sites or ranks do not move its start.
        parametrization: of the update, see `low_rank`; so for `factor_start` and `lambda_gain`.
        pool: inputs per group on which the update is constant; 1 for a plain adapter.
    """
    if next(iter(site_adapters(model)), None) is not None:
        raise UserError("the model already carries adapters; attach once", field="model")
    freeze_backbone(model)
    backbone = Backbone(model)
    layout = backbone.layout()
    order = {name: index for index, name in enumerate(name for linear in layout for name in linear.site_names())}
    order |= {linear.module: order[linear.site_names()[0]] for linear in layout}  # of a fused matrix as one site
    for site in sites:
        module = model.get_submodule(site.module)
        if isinstance(module, nn.Linear):
            module = AdaptedLinear(module)
            model.set_submodule(site.module, module)
        assert isinstance(module, AdaptedLinear)
        adapter = SiteAdapter(
            site.in_features,
            site.out_features,
            ranks[site.name] if isinstance(ranks, Mapping) else ranks,
            scale=scale[site.name] if isinstance(scale, Mapping) else scale,
            generator=torch_generator(seed, "adapter_init", order[site.name]),
            parametrization=parametrization,
            factor_start=factor_start,
            lambda_gain=lambda_gain,
            pool=pool,
        )
        module.add_site(site, adapter.to(next(model.parameters()).device))


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Yield (name, module) of every linear layer that carries adapters, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


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
