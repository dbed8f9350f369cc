"""LoRA that the PEFT library has put into a Vision Transformer, seen as sites whose rank can change.

A LoRA layer of PEFT is one site, named as a block's matrices are here: `blocks.3.attn.qkv` (the fused matrix with one
rank), `blocks.3.attn.out`, `blocks.3.mlp.fc1`, `blocks.3.mlp.fc2`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peft_vit.adapters.peft_layers import check_plain, peft_layers, sites_of_layers
from peft_vit.backbones import Site
from peft_vit.errors import UserError

_STARTS = (True, False, "gaussian")  # other starts change the base's weights too, or allow some ranks only
_generators: WeakKeyDictionary[nn.Module, torch.Generator] = WeakKeyDictionary()  # held by a layer it would bar copying


class PeftSite:
    """One LoRA layer of PEFT in the role of a `SiteAdapter`: what is set here, PEFT computes and saves.

    Args:
        holder: the model that PEFT was given, which has its configuration too.
        key: a layer's name below it, as PEFT's patterns match it; the layer is a `peft.tuners.lora.Linear`.
    """

    smallest_rank = 1  # PEFT has no layer, and its file no place, for rank 0
    parametrization: Literal["product"] = "product"
    pool = 1
    lora_lambda: nn.Parameter | None = None
    lambda_gain = 1.0
    probe = None

    def __init__(self, holder: Any, key: str) -> None:
        self._holder = holder
        self._key = key
        self._layer = holder.get_submodule(key)
        self._adapter, self._config = next(iter(holder.peft_config.items()))
        self.in_features: int = self._layer.in_features
        self.out_features: int = self._layer.out_features

    @property
    def lora_A(self) -> nn.Parameter:  # noqa: N802 - the field's name, and SiteAdapter's
        """Return A (r, in)."""
        weight: nn.Parameter = self._layer.lora_A[self._adapter].weight
        return weight

    @lora_A.setter
    def lora_A(self, parameter: nn.Parameter) -> None:  # noqa: N802 - the field's name, and SiteAdapter's
        if not len(parameter):
            raise UserError("PEFT has no layer of rank 0; keep at least rank 1", field=self._key)
        linear = self._layer.lora_A[self._adapter]
        linear.weight, linear.out_features = parameter, len(parameter)
        self._declare_rank(len(parameter))

    @property
    def lora_B(self) -> nn.Parameter:  # noqa: N802 - the field's name, and SiteAdapter's
        """Return B (out, r)."""
        weight: nn.Parameter = self._layer.lora_B[self._adapter].weight
        return weight

    @lora_B.setter
    def lora_B(self, parameter: nn.Parameter) -> None:  # noqa: N802 - the field's name, and SiteAdapter's
        linear = self._layer.lora_B[self._adapter]
        linear.weight, linear.in_features = parameter, parameter.shape[1]

    @property
    def rank(self) -> int:
        """Return the number of triplets that exist now."""
        return self.lora_A.shape[0]

    @property
    def largest_rank(self) -> int:
        """Return the rank above which more triplets can't change the update."""
        return min(self.in_features, self.out_features)

    @property
    def scale(self) -> float:
        """Return the factor on B A, which stays when the rank moves."""
        return float(self._layer.scaling[self._adapter])

    @property
    def generator(self) -> torch.Generator | None:
        """Return the source of triplets that grow; None: torch's global generator, from which PEFT draws its start."""
        return _generators.get(self._layer)

    @generator.setter
    def generator(self, generator: torch.Generator) -> None:
        _generators[self._layer] = generator

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield A and B."""
        yield from (self.lora_A, self.lora_B)

    def fresh_triplets(self, count: int, beside: int = 0) -> tuple[Tensor, Tensor, None]:
        """Return A (count, in), uniform with bound 1 / sqrt(in) as PEFT starts it, B (out, count) zero, no lambda."""
        bound = 1 / math.sqrt(self.in_features)
        lora_A = (torch.rand(count, self.in_features, generator=self.generator) * 2 - 1) * bound
        return lora_A, torch.zeros(self.out_features, count), None

    def start_size(self, rank: int) -> float:
        """Return how large A is at a rank, over LoRA's own start: 1."""
        return 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return left (out, r), scale included, and right (r, in): left @ right is dW."""
        return self.lora_B * self.scale, self.lora_A

    def delta(self) -> Tensor:
        """Return the update dW (out, in)."""
        left, right = self.factors()
        return left @ right

    def _declare_rank(self, rank: int) -> None:
        """Say the rank wherever PEFT does; alpha moves with it, so that the scale stays."""
        alpha = self.scale * (math.sqrt(rank) if self._layer.use_rslora[self._adapter] else rank)
        self._layer.r[self._adapter], self._layer.lora_alpha[self._adapter] = rank, alpha
        # Full names for all, in place of the user's patterns: PEFT sorts the keys and lets the first that fits win.
        layers = peft_layers(self._holder).items()
        self._config.rank_pattern = {key: layer.r[self._adapter] for key, layer in layers}
        self._config.alpha_pattern = {key: layer.lora_alpha[self._adapter] for key, layer in layers}


def _holder_of(model: nn.Module) -> Any | None:
    """Return the innermost module that holds PEFT's configuration; None without layers of LoRA's kind."""
    if not peft_layers(model):
        return None
    holder = next((module for module in reversed([*model.modules()]) if "peft_config" in vars(module)), None)
    if holder is None:
        raise UserError("PEFT has put LoRA into it; hand over the model that get_peft_model returned", field="model")
    return holder


def _can_resize(layer: Any) -> bool:
    return type(layer).__name__ == "Linear"  # of LoRA's kinds; others are AdaLoRA's, or on other modules


def peft_site_adapters(model: nn.Module) -> dict[str, PeftSite]:
    """Return PEFT's LoRA layers on a model's linear layers by the names of their sites; none without PEFT."""
    holder = _holder_of(model)
    if holder is None:
        return {}
    layers = peft_layers(holder)
    sites = sites_of_layers(holder).items()
    return {site.name: PeftSite(holder, key) for key, site in sites if _can_resize(layers[key])}


def peft_sites(model: nn.Module) -> tuple[Site, ...]:
    """List the sites on which PEFT has put LoRA, block by block; none without PEFT.

    Raises:
        UserError: if PEFT computes more than plain LoRA, or elsewhere than on a block's matrices.
    """
    holder = _holder_of(model)
    if holder is None:
        return ()
    adapter, *others = holder.peft_config
    if others:
        raise UserError(
            f"PEFT holds the adapters {', '.join(holder.peft_config)}; keep one, see delete_adapter", field="peft"
        )
    start = holder.peft_config[adapter].init_lora_weights
    if start not in _STARTS:
        raise UserError(
            f"ranks can't change after a start that depends on them, got {start!r}; "
            f"use one of {', '.join(map(repr, _STARTS))}",
            field="init_lora_weights",
        )
    sites = sites_of_layers(holder)
    for key, layer in peft_layers(holder).items():
        if key not in sites:
            raise UserError(
                r"PEFT has adapted it too, and it is no matrix of a block; narrow target_modules, e.g. to "
                r"r'.*blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])'",
                field=key,
            )
        if not _can_resize(layer):
            raise UserError(
                f"PEFT's {type(layer).__name__} can't change its rank here; only LoRA on nn.Linear can", field=key
            )
        check_plain(key, layer, adapter)
    return tuple(sites.values())
