"""Whether adapters act: with an update that is not zero, each site must change the logits and get a gradient.

A model may compute with a module's weight past the module, `F.linear(x, self.qkv.weight)`. What stands in the module's
place, an adapter of this package or of the PEFT library, then has neither effect nor gradient, and training would say
nothing of it. One forward and backward pass of one image tells: where the derivative of the logits by the factors of an
update is not zero, and no factor is, the update changes the logits to first order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_vit.adapters.adapted_model import adapted_sites, site_adapters
from peft_vit.adapters.peft_layers import sites_of_layers, tuner_layers
from peft_vit.backbones import Backbone, evaluating
from peft_vit.errors import UserError

_STD = 0.02  # of what stands in for zeros during the check


@dataclass(frozen=True)
class Effect:
    """What an adapter does to the logits of one image.

    Attributes:
        gradient: norm of the derivative of a random sum of the logits by the adapter's parameters; 0 without any.
        fault: why the adapter has no effect; None if it has one, or has no rank yet.
    """

    gradient: float
    fault: str | None


def check_acting(model: nn.Module) -> None:
    """Refuse a model on which an adapter has no effect; the model and all generators are left as they were.

    Args:
        model: with adapters. Of a site without rank only the call of its module is checked.

    Raises:
        UserError: naming sites, and why their adapters have no effect.
    """
    if next(model.parameters()).is_meta:
        return  # it has shapes and no values
    faults = {name: effect.fault for name, effect in effects(model).items() if effect.fault}
    if faults:
        fault = next(iter(faults.values()))
        alike = [name for name, other in faults.items() if other == fault]
        named = ", ".join(alike[:3]) + (f" and {len(alike) - 3} more" if len(alike) > 3 else "")
        raise UserError(f"adapters have no effect on {named}: {fault}; leave them out", field="targets")


def effects(model: nn.Module) -> dict[str, Effect]:
    """Return the effect of each adapter, by the name of its site; the model and all generators stay as they were."""
    modules = {name: site.module for name, site in adapted_sites(model).items()}
    owners = {name: one for name, one in site_adapters(model).items() if isinstance(one, nn.Module)}
    layers = tuner_layers(model)
    owners |= {site.name: layers[key] for key, site in sites_of_layers(model).items()}
    parameters = {
        name: [one for one in owner.parameters() if one.requires_grad and one.numel()] for name, owner in owners.items()
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
    with _without_zeros(model), evaluating(model), _called(backbone, set(modules.values())) as called:
        norms = _gradient_norms(backbone, [one for group in parameters.values() for one in group])
    found = {}
    for name, module in modules.items():
        gradient = math.hypot(*(norms[id(one)] for one in parameters[name]))
        fault = None
        if module not in called:
            fault = f"{type(model).__name__} computes with its module's weight and never calls the module"
        elif parameters[name] and gradient == 0:
            fault = "at this image size the logits do not depend on it"
        found[name] = Effect(gradient, fault)
    return found


@contextmanager
def _called(backbone: Backbone, modules: Iterable[str]) -> Iterator[set[str]]:
    """Gather which modules are called."""
    called: set[str] = set()
    handles = [
        backbone.model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name in modules
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _gradient_norms(backbone: Backbone, parameters: list[nn.Parameter]) -> dict[int, float]:
    """Return the norm of the derivative of a random sum of an image's logits by each parameter, by the latter's id."""
    generator = torch.Generator().manual_seed(0)
    like = next(backbone.model.parameters())
    image = torch.randn(1, *backbone.input_size, generator=generator).to(like)
    with torch.enable_grad():
        logits: Tensor = backbone.model(image)  # (1, classes)
        direction = torch.randn(logits.shape, generator=generator).to(logits)
        total = (logits * direction).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True) if parameters else ()
    return {id(one): 0.0 if by is None else float(by.norm()) for one, by in zip(parameters, gradients, strict=True)}


@contextmanager
def _without_zeros(model: nn.Module) -> Iterator[None]:
    """Put noise in place of all tensors of zeros but biases, for a while: updates start there, and some norms do."""
    generator = torch.Generator().manual_seed(1)
    zeros = [
        one for name, one in model.named_parameters() if not name.endswith("bias") and one.numel() and not one.any()
    ]
    try:
        for one in zeros:
            one.data.copy_(_STD * torch.randn(one.shape, generator=generator))
        yield
    finally:
        for one in zeros:
            one.data.zero_()
