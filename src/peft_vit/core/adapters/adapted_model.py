"""The module in a Linear's place, the adapters that a model carries so, and the way back to weights without."""

from __future__ import annotations

import copy
import mmap
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters.adapted_product import (
    FrozenWeight,
    InPlace,
    adapted_linear,
    is_activation,
    product_by_pieces,
)
from peft_vit.core.adapters.integer_product import int8_linear
from peft_vit.core.adapters.low_rank import RowUpdate, SiteAdapter
from peft_vit.core.adapters.matmuls import fastest_matmul
from peft_vit.core.adapters.peft_layers import (
    ADAPTER,
    PeftSite,
    check_plain,
    is_plain,
    peft_factors,
    peft_layers,
    peft_ranks,
    peft_site_adapters,
    sites_of_layers,
    tuner_layers,
)
from peft_vit.core.backbones import Backbone, Site
from peft_vit.core.backbones.catalog import create_skeleton
from peft_vit.core.backbones.families.family import Architecture
from peft_vit.core.quantization import QuantizedTensor, quantize, relative_error
from peft_vit.core.quantization.integers import Int8Matmul, Int8Weight, exact_matmuls

Adapter: TypeAlias = SiteAdapter | PeftSite


class AdaptedLinear(nn.Module):
    """A frozen linear layer whose rows carry one adapter, or several on slices (query, key, value).

    The weight in use is ``(1 - share) * float + share * quantized``. At share 1 for good (`drop_float`) only the
    packed weight is left.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight: Tensor | None
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)  # (out, in)
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach(), requires_grad=False)
        self.quantized: QuantizedTensor | None = None
        self.quantized_share = 0.0
        self.sites = nn.ModuleDict()  # adapters, by the kind of their site
        self._sites: dict[str, Site] = {}  # likewise
        self.ablated: frozenset[str] = frozenset()  # names of sites whose updates `without_updates` skips for now
        self.matmul: Int8Matmul | None = None  # by which the frozen weight is multiplied; None: in float
        self.unpacks_by_pieces = False
        self._int8: tuple[tuple[Any, ...], Int8Weight] | None = None  # with what it was made from

    def add_site(self, site: Site, adapter: SiteAdapter) -> None:
        """Put an adapter on a site's rows; all of a layer act on the same groups of inputs."""
        self.sites[site.kind] = adapter
        self._sites[site.kind] = site

    def set_quantized(self, quantized: QuantizedTensor) -> float:
        """Hold a packed copy of the weight beside the float one; return its relative error."""
        assert self.weight is not None
        self.quantized = quantized
        return relative_error(self.weight, quantized)

    def drop_float(self) -> None:
        """Free the float weight; only the packed weight is left from here on."""
        self.quantized_share = 1.0
        self.weight = None

    def frozen_weight(self) -> Tensor:
        """Return a copy of the weight in use without the adapters, (out, in) float32."""
        return self._frozen.unpack()

    @property
    def _frozen(self) -> FrozenWeight:
        return FrozenWeight(self.weight, self.quantized, self.quantized_share)

    @property
    def _in_use(self) -> tuple[Any, ...]:
        version = None if self.weight is None else (self.weight.data_ptr(), self.weight._version)
        return version, self.quantized, self.quantized_share, self.matmul

    def int8_weight(self) -> Int8Weight:
        """Return the weight in use in int8; it is kept until that changes."""
        if self._int8 is None or self._int8[0] != self._in_use:
            assert self.matmul is not None
            if self.quantized is not None and self.quantized_share == 1:
                weight = Int8Weight.from_quantized(self.quantized, self.matmul)
            else:
                weight = Int8Weight.from_float(self.frozen_weight(), self.matmul)
            self._int8 = (self._in_use, weight)
        return self._int8[1]

    def merged_weight(self) -> Tensor:
        """Return the weight with every update added, (out, in) float32."""
        total = self.frozen_weight()
        for site, adapter in self.adapters():
            total[site.span] += adapter.delta()  # (out_s, in)
        return total

    @property
    def pool(self) -> int:
        """Return how many adjacent inputs share an update; 1 without adapters."""
        return next((adapter.pool for _, adapter in self.adapters()), 1)

    def adapters(self) -> list[tuple[Site, SiteAdapter]]:
        """Return each site and its adapter, in the order of the rows."""
        return [
            (self._sites[kind], adapter) for kind, adapter in self.sites.items() if isinstance(adapter, SiteAdapter)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        adapters = [(site.span, adapter) for site, adapter in self.adapters() if site.name not in self.ablated]
        updates: list[RowUpdate] = [(span, adapter) for span, adapter in adapters if adapter.rank]
        if torch.is_grad_enabled():  # a probe adds exactly nothing and is there for its gradient alone
            updates += [(span, adapter.probe) for span, adapter in adapters if adapter.probe is not None]
        if self.unpacks_by_pieces and self.weight is None and not updates and not torch.is_grad_enabled():
            assert self.quantized is not None
            return product_by_pieces(x, self.quantized, self.bias)  # (..., out)
        if self.matmul is not None:
            return int8_linear(x, self.int8_weight(), self.bias, updates, pool=self.pool)  # (..., out)
        return adapted_linear(x, self._frozen, self.bias, updates, pool=self.pool)  # (..., out)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.quantized is not None:
            # Moves follow; changes of type do not: they would alter scales and so the weights.
            self.quantized = self.quantized.to(fn(self.quantized.scales).device)
        return self


def save_memory(model: nn.Module) -> None:
    """Let a model that only predicts take less memory and a tenth more time.

    Packed weights become floats piece by piece, and values of activation functions are written over their inputs.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            module.unpacks_by_pieces = True
        elif is_activation(module):
            model.set_submodule(name, InPlace(module))


def use_int8_matmul(model: nn.Module, matmul: Int8Matmul | None = None) -> Int8Matmul:
    """Let all frozen linear layers of a model's blocks multiply in int8 from here on, see `int8_linear`.

    On a CPU their float weights move into a temporary file that is mapped into memory. They take none until they are
    read, say when the model is merged. If there is no room for the file, they stay where they are.

    Args:
        model: whose methods have put their adapters on, changed in place.
        matmul: see `products.MatmulTimes`; None: the fastest exact one on this machine.

    Returns:
        The matmul; with fewer bits if that of a layer is not exact.

    Raises:
        UserError: if the device has no int8 matmul, or a layer is trained or somebody else's.
    """
    device = next(model.parameters()).device
    matmul = matmul or fastest_matmul(device)
    layers: list[AdaptedLinear] = []
    for name in dict.fromkeys(site.module for site in Backbone.within(model).sites):
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
            layer = AdaptedLinear(layer)
            model.set_submodule(name, layer)
        if not isinstance(layer, AdaptedLinear):
            reason = "is trained itself" if isinstance(layer, nn.Linear) else f"is a {type(layer).__name__}"
            raise UserError(
                f"int8 multiplies frozen linear layers, and {name} {reason}; use float", field="training.compute"
            )
        layers.append(layer)
    for inputs in {layer.in_features for layer in layers}:
        if matmul not in exact_matmuls(inputs, device.type):
            matmul = replace(matmul, bits=7)
    for layer in layers:
        layer.matmul = matmul
    if device.type == "cpu":
        _map_float_weights(layers)
    return matmul


def use_float_matmul(model: nn.Module) -> None:
    """Let a model multiply in float again, as the one does that is delivered; its int8 weights are gone."""
    for _, layer in adapted_modules(model):
        layer.matmul = layer._int8 = None


@contextmanager
def float_matmul(model: nn.Module) -> Iterator[None]:
    """Let a model multiply in float for a while."""
    with ExitStack() as stack:
        for _, layer in adapted_modules(model):
            stack.callback(setattr, layer, "matmul", layer.matmul)
            layer.matmul = None
        yield


def _map_float_weights(layers: Sequence[AdaptedLinear]) -> None:
    """Move float weights into a mapped file; the int8 weights that were made of them stay."""
    floats = [(layer, layer.weight) for layer in layers if layer.weight is not None]
    int8 = [layer.int8_weight() for layer, _ in floats]  # of what is in memory still
    try:
        with tempfile.TemporaryFile() as file:
            for _, weight in floats:
                file.write(weight.detach().contiguous().view(torch.uint8).numpy().data)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # lives as long as the weights
    except (OSError, ValueError):  # no room, or nothing to map
        return
    start = 0
    for (layer, weight), made in zip(floats, int8, strict=True):
        values = torch.frombuffer(mapped, dtype=weight.dtype, count=weight.numel(), offset=start)  # (out in,)
        weight.data = values.view(weight.shape)  # (out, in)
        layer._int8 = (layer._in_use, made)
        start += weight.nbytes


# --- what a model carries ---------------------------------------------------------------------------------------------


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
    ours = {site.name: adapter for _, module in adapted_modules(model) for site, adapter in module.adapters()}
    return {**peft_site_adapters(model), **ours}


def adapted_sites(model: nn.Module) -> dict[str, Site]:
    """Return the sites that carry an adapter of this package's or of the PEFT library's, by name, block by block."""
    ours = [site for _, module in adapted_modules(model) for site, _ in module.adapters()]
    return {site.name: site for site in (*ours, *sites_of_layers(model).values())}


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
    if unknown := sorted(set(sites) - set(update_ranks(model))):
        raise UserError(f"the model has no adapter on {unknown[0]}; name modules that have one", field="sites")
    with ExitStack() as stack:
        for _, module in adapted_modules(model):
            stack.callback(setattr, module, "ablated", module.ablated)
            module.ablated = module.ablated.union(sites)
        places = sites_of_layers(model)
        for name, layer in peft_layers(model).items():
            if name in places and places[name].name in sites and not layer.disable_adapters:
                # PEFT's own switch also says that the factors are not, and then that they are to be trained.
                for parameter in layer.parameters():
                    stack.callback(parameter.requires_grad_, parameter.requires_grad)
                stack.callback(layer.enable_adapters, True)
                layer.enable_adapters(False)
        yield


# --- back to weights without adapters ---------------------------------------------------------------------------------


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict of the plain timm model, with every update added to its weight (float32)."""
    adapted = dict(adapted_modules(model))
    by_peft = tuner_layers(model)
    replaced = tuple(f"{module}." for module in (*adapted, *by_peft))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(replaced)}
    for name, module in adapted.items():
        state[f"{name}.weight"] = module.merged_weight().detach()
        if module.bias is not None:
            state[f"{name}.bias"] = module.bias.detach()
    for name, layer in by_peft.items():
        if is_plain(layer):
            check_plain(name, layer)
            base = layer.get_base_layer()
            right, left, scale = peft_factors(layer)  # (r, in), (out, r)
            state[f"{name}.weight"] = base.weight.detach() + scale * (left @ right)  # (out, in)
        else:
            merged = copy.deepcopy(layer)
            with torch.no_grad():
                merged.merge(adapter_names=[ADAPTER])  # as PEFT does it
            base = merged.get_base_layer()
            state[f"{name}.weight"] = base.weight.detach()  # (out, in)
        if base.bias is not None:
            state[f"{name}.bias"] = base.bias.detach()
    return state


def plain_model(model: nn.Module, architecture: Architecture, image_size: int, outputs: int) -> nn.Module:
    """Return a plain model of its library with the weights that a model has, updates and low bits included.

    Args:
        model: with adapters; it stays as it is.
        architecture: its backbone's.
        image_size: in pixels.
        outputs: of the head.
    """
    plain = create_skeleton(architecture, image_size, outputs)
    plain.load_state_dict(merged_state_dict(model), assign=True)
    built: nn.Module = plain.requires_grad_(False).eval()
    return built


def merge_into_offsets(model: nn.Module, *, offset_dtype: torch.dtype | None = None) -> dict[str, float]:
    """Move each update into its layer's offsets: offset <- offset + scale * B A; no code and no scale changes.

    The adapters are removed. `offset_dtype` is float32 or float16; None: as the layer's format stores offsets.

    This is QA-LoRA's merge, arXiv 2309.14717, sec. 3.3. It is exact but for the rounding of the offsets. It takes
    adapters whose input is summed over the quantizer's groups.

    Returns:
        By module, ||W_merged - W_trained||_F / ||W_trained||_F.

    Raises:
        UserError: if a layer is not quantized for good, its adapters act on other groups, or an offset overflows; then
            the model is as it was.
    """

    def merged(name: str, module: AdaptedLinear, quantized: QuantizedTensor) -> QuantizedTensor:
        groups = quantized.groups
        delta = torch.zeros(quantized.shape[0], groups, device=quantized.codes.device)  # (out, groups)
        for site, adapter in module.adapters():
            left, right = adapter.factors()  # (out_s, r), (r, in / pool)
            if right.shape[1] != groups:
                raise UserError(
                    f"the adapters of {name} do not act on its {groups} groups of inputs, so no offset can take them; "
                    "use merge_by_requantizing, which reports its error",
                    field="model",
                )
            delta[site.span] += left @ right  # (out_s, groups)
        return quantized.with_offset_added(delta, offset_dtype, name=name)

    return _merge(model, merged)


def merge_by_requantizing(model: nn.Module) -> dict[str, float]:
    """Replace adapters by their sum with the layer's weight, quantized again to the layer's own format.

    For adapters over a quantized weight that act on single inputs (QLoRA, arXiv 2305.14314). The update is rounded to
    codes with the weight, each to the nearest, and what is smaller than half a code's step may be lost: look at the
    error, and at the accuracy before and after. A layer without update keeps its codes.

    Returns:
        By module, ||W_merged - W_trained||_F / ||W_trained||_F.

    Raises:
        UserError: if a layer is not quantized for good, its adapters could be merged into offsets, or the sum does not
            fit the format; then the model is as it was.
    """

    def merged(name: str, module: AdaptedLinear, quantized: QuantizedTensor) -> QuantizedTensor:
        if module.pool > 1:
            message = f"the adapters of {name} act on groups of inputs; use merge_into_offsets, which changes no code"
            raise UserError(message, field="model")
        if not any(adapter.rank for _, adapter in module.adapters()):
            return quantized
        return quantize(module.merged_weight(), quantized.format, name=name)

    return _merge(model, merged)


@torch.no_grad()
def _merge(
    model: nn.Module, merged: Callable[[str, AdaptedLinear, QuantizedTensor], QuantizedTensor]
) -> dict[str, float]:
    """Put the merged weight in the place of each layer's and remove the adapters; return the relative errors."""
    weights = []
    for name, module in adapted_modules(model):
        if not module.sites:
            continue
        if module.quantized is None or module.weight is not None:
            raise UserError(
                f"{name} still has its float weight; finish the quantization schedule, or use merged_state_dict for "
                "float weights",
                field="model",
            )
        weights.append((name, module, merged(name, module, module.quantized)))
    if not weights:
        message = "the model carries no adapters of this package on quantized weights; nothing to merge"
        raise UserError(message, field="model")
    errors = {}
    for name, module, quantized in weights:
        errors[name] = relative_error(module.merged_weight(), quantized)
        module.quantized = quantized
        module.sites = nn.ModuleDict()
    return errors
