"""Put adapters on a model's sites, or see whether those that it carries are what settings ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from peft_vit.adapters.acting import check_acting
from peft_vit.adapters.adapted_linear import AdaptedLinear
from peft_vit.adapters.adapted_model import adapted_kinds, adapted_sites, site_adapters
from peft_vit.adapters.layer_input import remember_sources
from peft_vit.adapters.low_rank import FactorStart, Parametrization, SiteAdapter
from peft_vit.backbones import Backbone, Site, chosen, freeze_batch_norm
from peft_vit.config import AdapterConfig
from peft_vit.errors import UserError
from peft_vit.seeding import torch_generator


def freeze_backbone(model: nn.Module) -> None:
    """Leave only the classification head trainable, and BatchNorm at its statistics."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    freeze_batch_norm(model)
    backbone = Backbone(model)
    backbone.prepare()
    for parameter in backbone.head.parameters():
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
    check: bool = True,
) -> None:
    """Freeze the backbone and put one adapter on each site; the model's outputs do not change.

    One forward and backward pass of one image checks that each has an effect, see `acting`.

    Args:
        model: a Vision Transformer of timm, changed in place.
        sites: from `backbones.find_sites`, or `fused_sites` of them.
        ranks: of each site by name, or one for all; 0 is allowed.
        scale: factor on the update, likewise.
        seed: the run's seed. Each site has its own stream, so other sites or ranks do not move its start.
        parametrization: of the update, see `low_rank`; so for `factor_start` and `lambda_gain`.
        pool: inputs per group on which the update is constant; 1 for a plain adapter.
        check: refuse adapters without effect.

    Raises:
        UserError: if the model carries adapters, has no head, or an adapter has no effect.
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
    remember_sources(model)
    if check:
        check_acting(model)


def check_stays(model: nn.Module, config: AdapterConfig, section: str) -> None:
    """Refuse a scale or targets that were set and say otherwise what the model's adapters have decided."""
    scales = sorted({adapter.scale for adapter in site_adapters(model).values()})
    if "scale" in config.model_fields_set and scales != [config.scale]:
        stated = ", ".join(map(str, scales))
        raise UserError(f"the model's adapters have {stated}; leave it out", field=f"{section}.scale")
    if "targets" not in config.model_fields_set:
        return
    sites = adapted_sites(model)
    adapted = {(sites[name].module, kind) for name, kinds in adapted_kinds(model).items() for kind in kinds}
    wanted = {(site.module, site.kind) for site in chosen(Backbone.within(model).sites, config.targets)}
    if wanted != adapted:
        kinds = ", ".join(sorted({kind for _, kind in adapted}))
        raise UserError(f"adapters are on {kinds}; leave it out", field=f"{section}.targets")
