"""Which sites a controller allocates to: ours, put on a plain model, or those that PEFT has made."""

from __future__ import annotations

from torch import nn

from peft_vit.adapters import adapted_kinds, adapted_sites, attach_adapters, peft_sites, site_adapters
from peft_vit.backbones import Backbone, Site, chosen, find_sites
from peft_vit.config import AdaLoraConfig, AdapterConfig
from peft_vit.errors import UserError


def attach_or_check(model: nn.Module, config: AdaLoraConfig, *, seed: int, pool: int = 1) -> tuple[Site, ...]:
    """Return the sites that carry adapters, block by block; on a plain model they are put there first, at rank 0.

    Raises:
        UserError: if the model is of another class, carries adapters of ours, or such of PEFT that don't fit the
            settings.
    """
    found = peft_sites(model)
    if found:
        _check_peft(model, config, pool)
        return found
    sites = find_sites(model, config.targets)
    attach_adapters(
        model,
        sites,
        0,
        scale=config.scale,
        seed=seed,
        parametrization=config.parametrization,
        factor_start=config.factor_start,
        lambda_gain=config.lambda_gain,
        pool=pool,
        check=False,  # the ranks come later, and the check after them
    )
    return sites


def _check_peft(model: nn.Module, config: AdaLoraConfig, pool: int) -> None:
    """Refuse settings that LoRA of PEFT can't follow, and such that say otherwise what PEFT has decided."""
    if pool != 1:
        raise UserError("PEFT's LoRA does not pool its inputs; leave it out", field="pool")
    if config.minimum_rank < 1:
        raise UserError("PEFT has no layer of rank 0; set minimum_rank to 1 or more", field="adalora.minimum_rank")
    if config.parametrization != "product":
        raise UserError("PEFT's LoRA is the plain product; set product", field="adalora.parametrization")
    check_stays(model, config, "adalora")


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
