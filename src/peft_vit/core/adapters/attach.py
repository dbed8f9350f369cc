"""Put adapters on a model's sites, see whether those that it carries are what settings ask for, and have a gradient.

A model may compute with a module's weight past the module, `F.linear(x, self.qkv.weight)`. What is in the module's
place, an adapter of this package or of the PEFT library, then has neither effect nor gradient, and training would say
nothing of it. One forward and backward pass of an image shows it: where the derivative of the logits by the factors of
an update is not zero, and no factor is, the update changes the logits to first order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_vit.base.console import some_of
from peft_vit.base.errors import UserError
from peft_vit.base.seeding import torch_generator
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.core.adapters.adapted_model import AdaptedLinear, adapted_sites, site_adapters
from peft_vit.core.adapters.low_rank import FactorStart, Parametrization, SiteAdapter
from peft_vit.core.adapters.peft_layers import sites_of_layers, tuner_layers
from peft_vit.core.backbones import Backbone, Site, capturing_inputs, evaluating, freeze_batch_norm, select_sites
from peft_vit.core.config import AdapterConfig

_STD = 0.02  # of what stands in for zeros during the gradient check


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
    """Freeze the backbone and put one adapter on each target module; the model's outputs do not change.

    One forward and backward pass of one image checks that each has an effect, see `check_gradients`.

    Args:
        model: a Vision Transformer of timm, changed in place.
        sites: from `backbones.find_sites`, or `fused_sites` of them.
        ranks: of each target module by name, or one for all; 0 is allowed.
        scale: factor on the update, in the same form.
        seed: the run's seed. Each target module has its own stream, so other target modules or ranks do not move its
            start.
        parametrization: of the update, see `low_rank`; so for `factor_start` and `lambda_gain`.
        pool: inputs per group on which the update is constant; 1 for a plain adapter.
        check: refuse adapters without effect.

    Raises:
        UserError: if the model carries adapters, has no head, or an adapter has no effect.
    """
    if site_adapters(model):
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
    if check:
        check_gradients(model)


def store_in_bits(model: nn.Module, bits: int | None, *, while_training: bool) -> None:
    """Let adapters compute with values as a file of so many bits holds them, see `quantization.row_rounding`.

    Args:
        model: with adapters.
        bits: 1, 2, 4, 8 or 16; None: as they are.
        while_training: in training mode, too, with gradients as if nothing were rounded; else in evaluation mode alone.
    """
    for adapter in site_adapters(model).values():
        if isinstance(adapter, SiteAdapter):
            adapter.bits, adapter.rounds_while_training = bits, while_training


def check_adapters_match(model: nn.Module, config: AdapterConfig, section: str) -> None:
    """Refuse a scale or targets that were set and say otherwise what the model's adapters have decided."""
    scales = {adapter.scale for adapter in site_adapters(model).values()}
    if "scale" in config.model_fields_set and scales != {config.scale}:
        stated = ", ".join(map(str, sorted(scales)))
        raise UserError(f"the model's adapters have {stated}; leave it out", field=f"{section}.scale")
    if "targets" not in config.model_fields_set:
        return
    backbone = Backbone.within(model)
    kinds_of = {linear.module: linear.kinds for linear in backbone.layout()}
    adapted = set()  # kinds of matrices by module: several where they are fused and share an adapter
    for site in adapted_sites(model).values():
        kinds = kinds_of[site.module]
        adapted |= {(site.module, kind) for kind in ((site.kind,) if site.kind in kinds else kinds)}
    if adapted != {(site.module, site.kind) for site in select_sites(backbone.sites, config.targets)}:
        stated = ", ".join(sorted({kind for _, kind in adapted}))
        raise UserError(f"adapters are on {stated}; leave it out", field=f"{section}.targets")


@dataclass(frozen=True)
class Effect:
    """What an adapter does to the logits of one image.

    Attributes:
        gradient: norm of the derivative of a random sum of the logits by the adapter's parameters; 0 without any.
        fault: why the adapter has no effect; None if it has one, or has no rank yet.
    """

    gradient: float
    fault: str | None


def check_gradients(model: nn.Module) -> None:
    """Refuse a model on which an adapter has no effect; the model and all generators are left as they were.

    Args:
        model: with adapters. Of a site without rank only the call of its module is checked.

    Raises:
        UserError: naming sites, and why their adapters have no effect.
    """
    if next(model.parameters()).is_meta:
        return  # it has shapes and no values
    by_fault = grouped((effect.fault, name) for name, effect in effects(model).items())
    for fault, names in by_fault.items():
        if fault:
            raise UserError(f"adapters have no effect on {some_of(names)}: {fault}; leave them out", field="targets")


def effects(model: nn.Module) -> dict[str, Effect]:
    """Return the effect of each adapter, by the name of its site; the model and all generators stay as they were."""
    modules = {name: site.module for name, site in adapted_sites(model).items()}
    owners = {name: adapter for name, adapter in site_adapters(model).items() if isinstance(adapter, nn.Module)}
    layers = tuner_layers(model)
    owners |= {site.name: layers[key] for key, site in sites_of_layers(model).items()}
    parameters = {
        name: [p for p in owner.parameters() if p.requires_grad and p.numel()] for name, owner in owners.items()
    }
    return effects_of(Backbone.within(model), modules, parameters)


def effects_of(
    backbone: Backbone, modules: Mapping[str, str], parameters: Mapping[str, list[nn.Parameter]]
) -> dict[str, Effect]:
    """Return effects as `effects` does.

    Args:
        backbone: of the model.
        modules: of the model that carry adapters, by the names that the effects shall have.
        parameters: of the adapters, by the same names.
    """
    model = backbone.model
    watched = {name: model.get_submodule(name) for name in set(modules.values())}
    called: set[str] = set()
    with _without_zeros(model), evaluating(model), capturing_inputs(watched, lambda name, _: called.add(name)):
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, *backbone.input_size, generator=generator).to(next(model.parameters()))  # (1, C, S, S)
        leaves = [parameter for group in parameters.values() for parameter in group]
        with torch.enable_grad():
            logits: Tensor = model(image)  # (1, classes)
            direction = torch.randn(logits.shape, generator=generator).to(logits)  # (1, classes)
            total = (logits * direction).sum()  # (1, classes) -> ()
            gradients = torch.autograd.grad(total, leaves, materialize_grads=True) if leaves else ()
    norms = {id(parameter): float(gradient.norm()) for parameter, gradient in zip(leaves, gradients, strict=True)}
    result = {}
    for name, module in modules.items():
        norm = math.hypot(*(norms[id(parameter)] for parameter in parameters[name]))
        fault = None
        if module not in called:
            fault = f"{type(model).__name__} computes with its module's weight and never calls the module"
        elif parameters[name] and norm == 0:
            fault = "at this image size the logits do not depend on it"
        result[name] = Effect(norm, fault)
    return result


@contextmanager
def _without_zeros(model: nn.Module) -> Iterator[None]:
    """Put noise instead of all tensors of zeros but biases, for a while: updates start there, and some norms do."""
    generator = torch.Generator().manual_seed(1)
    zeros = [
        parameter
        for name, parameter in model.named_parameters()
        if not name.endswith("bias") and parameter.numel() and not parameter.any()
    ]
    try:
        for parameter in zeros:
            parameter.data.copy_(_STD * torch.randn(parameter.shape, generator=generator))
        yield
    finally:
        for parameter in zeros:
            parameter.data.zero_()
