"""The module that takes the place of a Linear: a frozen weight, float or quantized, and the sites' adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from peft_vit.adapters.adapted_product import adapted_product
from peft_vit.adapters.frozen_weight import FrozenWeight
from peft_vit.adapters.low_rank import GradientProbe, SiteAdapter
from peft_vit.backbones import Site
from peft_vit.quantization import QuantizedTensor, relative_error


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
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach(), requires_grad=False)
        self.quantized: QuantizedTensor | None = None
        self.quantized_share = 0.0
        self.sites = nn.ModuleDict()  # adapters, by the kind of their site
        self._sites: dict[str, Site] = {}  # likewise
        self.ablated: frozenset[str] = frozenset()  # names of sites whose updates `without_updates` skips for now

    def add_site(self, site: Site, adapter: SiteAdapter) -> None:
        """Put an adapter on a site's rows; all of a layer act on the same groups of inputs."""
        if self.sites and adapter.pool != self.pool:
            raise ValueError(f"the layer's adapters pool {self.pool} inputs, this one {adapter.pool}")
        self.sites[site.kind] = adapter
        self._sites[site.kind] = site

    def remove_sites(self) -> None:
        """Leave a frozen linear layer without adapters."""
        self.sites = nn.ModuleDict()
        self._sites = {}

    def set_quantized(self, quantized: QuantizedTensor) -> float:
        """Hold a packed copy of the weight beside the float one; return its relative error."""
        if self.weight is None:
            raise RuntimeError("the float weight is gone; quantize before it is dropped")
        self.quantized = quantized
        return relative_error(self.weight, quantized)

    def drop_float(self) -> None:
        """Free the float weight; only the packed weight is left from here on."""
        if self.quantized is None:
            raise RuntimeError("there is no quantized weight to fall back on")
        self.quantized_share = 1.0
        self.weight = None

    def _frozen(self) -> FrozenWeight:
        return FrozenWeight(self.weight, self.quantized, self.quantized_share)

    def frozen_weight(self) -> Tensor:
        """Return a copy of the weight in use without the adapters, (out, in) float32."""
        return self._frozen().unpack()

    def merged_weight(self) -> Tensor:
        """Return the weight with every update added, (out, in) float32."""
        total = self.frozen_weight()
        for site, adapter in self.adapters():
            total[site.span] += adapter.delta()
        return total

    @property
    def pool(self) -> int:
        """Return how many adjacent inputs share an update; 1 without adapters."""
        return next((adapter.pool for _, adapter in self.adapters()), 1)

    def adapters(self) -> list[tuple[Site, SiteAdapter]]:
        """Return each site and its adapter, in the order of the rows."""
        return [(self._sites[kind], one) for kind, one in self.sites.items() if isinstance(one, SiteAdapter)]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        adapters = [(site.span, adapter) for site, adapter in self.adapters() if site.name not in self.ablated]
        updates: list[tuple[slice, SiteAdapter | GradientProbe]]
        updates = [(span, adapter) for span, adapter in adapters if adapter.rank]
        if torch.is_grad_enabled():  # a probe adds exactly nothing and is there for its gradient alone
            updates += [(span, adapter.probe) for span, adapter in adapters if adapter.probe is not None]
        return adapted_product(x, self._frozen(), self.bias, updates, pool=self.pool)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.quantized is not None:
            # Moves follow; changes of type do not: they would alter scales and so the weights.
            self.quantized = self.quantized.to(fn(self.quantized.scales).device)
        return self
