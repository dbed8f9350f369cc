"""What a model computes without some of its updates: the adapters stay as they are, forward passes skip them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from peft_vit.adapters.adapted_linear import AdaptedLinear
from peft_vit.adapters.adapted_model import adapted_modules, current_ranks
from peft_vit.adapters.peft_layers import peft_layers, peft_ranks, sites_of_layers
from peft_vit.errors import UserError


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
                stack.enter_context(_skipping(module, named))
        places = sites_of_layers(model)
        for name, layer in peft_layers(model).items():
            if name in places and places[name].name in sites and not layer.disable_adapters:
                stack.enter_context(_disabled(layer))
        yield


@contextmanager
def _skipping(module: AdaptedLinear, sites: set[str]) -> Iterator[None]:
    before = module.ablated
    module.ablated = before.union(sites)
    try:
        yield
    finally:
        module.ablated = before


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
