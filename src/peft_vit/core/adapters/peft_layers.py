"""Layers that the PEFT library has put into a model: their sites, ranks and updates.

PEFT is not imported: where nobody else has, a model has none of its layers. A LoRA layer of PEFT is one site whose rank
can change, named as a block's matrices are here: `blocks.3.attn.qkv` (the fused matrix with one rank),
`blocks.3.attn.out`, `blocks.3.mlp.fc1`, `blocks.3.mlp.fc2`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters.low_rank import LowRankUpdate, Parametrization
from peft_vit.core.backbones import Backbone, Site, fused_sites

ADAPTER = "default"  # PEFT's name for a model's first adapter
PREFIX = "base_model.model."  # of the tensors' names in its files
_SITE = "peft_vit_site"  # a layer keeps its site under this name
_STARTS = (True, False, "gaussian")  # other starts change the base's weights too, or allow some ranks only


def peft_layers(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's LoRA and AdaLoRA layers by the name of the module that they took the place of."""
    return _layers_of(model, "LoraLayer")


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers of any tuner of PEFT by the name of the module that they took the place of."""
    return _layers_of(model, "BaseTunerLayer")


def _layers_of(model: nn.Module, kind: str) -> dict[str, Any]:
    layer_type = getattr(sys.modules.get("peft.tuners.lora.layer"), kind, ())  # which knows both kinds
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, layer_type)}


def sites_of_layers(model: nn.Module) -> dict[str, Site]:
    """Return the site of each of PEFT's layers, `blocks.3.attn.qkv`, by the layer's name as above.

    The model is or wraps one of a class that a family knows. A fused matrix is one site with one rank. Layers that
    are elsewhere than on a block's matrices are left out.
    """
    layers = tuner_layers(model)
    if not all(hasattr(layer, _SITE) for layer in layers.values()):
        backbone = Backbone.within(model)
        backbone.prepare()
        known = {backbone.model.get_submodule(name): site for name, site in fused_sites(backbone.sites).items()}
        for layer in layers.values():
            setattr(layer, _SITE, known.get(layer))
    return {name: site for name, layer in layers.items() if (site := getattr(layer, _SITE)) is not None}


def peft_ranks(model: nn.Module) -> dict[str, int]:
    """Return the rank of each site that PEFT adapts, `blocks.3.attn.qkv`: what its last mask left, or what it made.

    A tuner without ranks, as IA3, has none.
    """
    layers = {name: layer for name, layer in tuner_layers(model).items() if ADAPTER in getattr(layer, "r", {})}
    if not layers:
        return {}
    pattern = getattr(model.peft_config[ADAPTER], "rank_pattern", None) or {}  # type: ignore[index]
    # LoRA's pattern holds ranks that its layers have already; AdaLoRA's holds masks.
    masks = {name.partition(".lora_E")[0]: mask for name, mask in pattern.items() if not isinstance(mask, int)}
    return {
        site.name: sum(masks[name]) if name in masks else layers[name].r[ADAPTER]
        for name, site in sites_of_layers(model).items()
        if name in layers
    }


def is_plain(layer: Any) -> bool:
    """Tell whether a layer computes no more than W x + scale * B A x."""
    return type(layer).__name__ in ("Linear", "SVDLinear") and hasattr(layer, "lora_A") and not layer.lora_variant


def check_plain(name: str, layer: Any, adapter: str = ADAPTER) -> None:
    """Refuse a layer that computes more than W x + scale * B A x, or whose factors are not all of it."""
    if type(layer).__name__ not in ("Linear", "SVDLinear") or list(layer.lora_A) != [adapter]:
        raise UserError(
            f"PEFT's {type(layer).__name__} is more there than one plain LoRA or AdaLoRA named '{adapter}'; keep one "
            "(delete_adapter), or use PEFT's own save_pretrained or merge_and_unload",
            field=name,
        )
    if any(layer.lora_bias.values()):
        raise UserError("lora_bias does not belong to a rank; switch it off", field=name)
    if layer.lora_variant:
        variant = next(iter(layer.lora_variant.values()))
        raise UserError(f"{type(variant).__name__} is more than plain LoRA; switch it off (DoRA and so on)", field=name)
    if layer.merged:
        raise UserError("its update is merged into the weight; call unmerge_adapter first", field=name)


@torch.no_grad()
def peft_factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    """Return A (r, in), B (out, r) and the scale of a layer, so that dW = scale * B A; masked triplets are left out."""
    if hasattr(layer, "lora_E"):
        diagonal = layer.lora_E[ADAPTER].flatten()  # (r0,); a mask sets its triplets' to exactly 0
        unmasked = diagonal != 0  # (r0,)
        left = (layer.lora_B[ADAPTER] * diagonal)[:, unmasked]  # (out, r0) -> (out, r)
        return layer.lora_A[ADAPTER][unmasked], left, layer.scaling[ADAPTER] / (float(layer.ranknum[ADAPTER]) + 1e-5)
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]


class PeftSite(LowRankUpdate):
    """One LoRA layer of PEFT in the role of a `SiteAdapter`: what is set here, PEFT computes and saves.

    Args:
        holder: the model that PEFT was given, which has its configuration too.
        key: a layer's name below it, as PEFT's patterns match it; the layer is a `peft.tuners.lora.Linear`.
    """

    smallest_rank = 1  # PEFT has no layer, and its file no place, for rank 0
    parametrization: Parametrization = "product"
    lora_lambda = None
    lambda_gain = 1.0
    pool = 1
    probe = None
    generator = None  # torch's global one, from which PEFT draws its start, unless a change of rank names another

    def __init__(self, holder: Any, key: str) -> None:
        self._holder = holder
        self._key = key
        self._layer = holder.get_submodule(key)
        self._adapter, self._config = next(iter(holder.peft_config.items()))
        self.in_features, self.out_features = self._layer.in_features, self._layer.out_features

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
        # The rank is said wherever PEFT does; alpha moves with it, so that the scale stays.
        divisor = math.sqrt(len(parameter)) if self._layer.use_rslora[self._adapter] else len(parameter)
        self._layer.r[self._adapter], self._layer.lora_alpha[self._adapter] = len(parameter), self.scale * divisor
        # Full names for all, instead of the user's patterns: PEFT sorts the keys and lets the first that fits win.
        layers = peft_layers(self._holder).items()
        self._config.rank_pattern = {key: layer.r[self._adapter] for key, layer in layers}
        self._config.alpha_pattern = {key: layer.lora_alpha[self._adapter] for key, layer in layers}

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
    def scale(self) -> float:  # type: ignore[override]
        """Return the factor on B A, which stays when the rank moves."""
        return float(self._layer.scaling[self._adapter])

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield A and B."""
        yield from (self.lora_A, self.lora_B)


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
    """List the sites on which PEFT has put LoRA, block by block; none without PEFT."""
    holder = _holder_of(model)
    if holder is None:
        return ()
    adapter, config = next(iter(holder.peft_config.items()))
    start = config.init_lora_weights
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
                "PEFT has adapted it too, and it is not a matrix of a block; narrow target_modules, e.g. to "
                "r'.*blocks\\.\\d+\\.(attn\\.(qkv|proj)|mlp\\.fc[12])'",
                field=key,
            )
        if not _can_resize(layer):
            raise UserError(
                f"PEFT's {type(layer).__name__} can't change its rank here; only LoRA on nn.Linear can", field=key
            )
        check_plain(key, layer, adapter)
    return tuple(sites.values())
