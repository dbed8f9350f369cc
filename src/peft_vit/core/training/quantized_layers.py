"""The layers whose weights are quantized, and the adapters on them: new ones, those a model carries, or PEFT's.

Weights become low-bit ones each by itself, or layer by layer on calibration images (GPTQ).

With W the float weight of a layer, Wq what its codes stand for, E = W - Wq the error at full quantization, and dW the
adapters' update: the adapted quantized layer differs from the float one by E - dW. Whether dW removes the error is
measured on the weights and on the layer's outputs; an update that learns the task need not remove any.

Managing the balance is proportional control of rho, the mean of ||dW|| / ||E||, towards a target rho*: either the
gradients' scale follows how far rho is below rho*, or the schedule's pace follows how far it is ahead of rho* * share,
the target over the error in use. Both are bounded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from peft_vit.base.errors import SilentNoEffectWarning, UserError
from peft_vit.core.adapters import (
    AdaptedLinear,
    Adapter,
    adapted_modules,
    attach_adapters,
    check_adapters_match,
    current_ranks,
    peft_sites,
    site_adapters,
)
from peft_vit.core.adapters.peft_layers import peft_layers, sites_of_layers
from peft_vit.core.backbones import Backbone, ReplayedPass, Site, capturing_inputs, evaluating, find_sites
from peft_vit.core.config import QaLoraConfig, QuantizationType, Rounding
from peft_vit.core.quantization import QuantizationFormat, QuantizedTensor, quantize, quantize_with_compensation

_AT_ONCE = 16  # images
MEASURE_EVERY_STEPS = 4  # of a managed balance: a measurement takes a few thousandths of a step
_SCALE_BOUNDS = (1 / 16, 4.0)
_PACE_BOUNDS = (0.5, 1.5)  # below 2, so that the schedule does not end before its end step
_SAME_WEIGHT = 1e-4  # largest relative difference between the errors of one weight, computed twice


class QuantizedLayer(NamedTuple):
    """A linear layer and the adapters on its rows."""

    module: AdaptedLinear
    updates: tuple[tuple[slice, Adapter], ...]


QuantizedLayers: TypeAlias = Mapping[str, QuantizedLayer]  # by module, blocks.3.attn.qkv
Formats: TypeAlias = Mapping[str, QuantizationFormat]  # by module
PackedTensors: TypeAlias = Mapping[str, Mapping[str, Tensor]]  # of saved weights, by module


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the layers that carry adapters by the model's name, `blocks.3.attn.qkv`, whatever it is wrapped in."""
    layers = {}
    for _, module in adapted_modules(model):
        if adapted := module.adapters():
            updates = tuple((site.span, adapter) for site, adapter in adapted)
            layers[adapted[0][0].module] = QuantizedLayer(module, updates)
    adapters, by_peft = site_adapters(model), peft_layers(model)
    for name, site in sites_of_layers(model).items():
        if isinstance(base := by_peft[name].base_layer, AdaptedLinear):
            layers[site.module] = QuantizedLayer(base, ((site.span, adapters[site.name]),))
    return layers


def attach_layers(model: nn.Module, config: QaLoraConfig, ranks: Mapping[str, int] | None, *, seed: int) -> None:
    """Put adapters on a plain model, with ranks by site or the section's everywhere, or take those that it carries.

    Whether each has an effect is left to check: that takes a forward pass, and so all weights at once.
    """
    if any(module.quantized is not None for _, module in adapted_modules(model)):
        raise UserError("its weights are quantized already; hand over a model with float weights", field="model")
    if peft_sites(model):  # refuses what is more than plain LoRA
        for layer in peft_layers(model).values():
            layer.base_layer = AdaptedLinear(layer.base_layer)
    pools = {adapter.pool for adapter in site_adapters(model).values()}
    if not pools:
        sites = find_sites(model, config.targets)
        if ranks is None:
            ranks = dict.fromkeys((site.name for site in sites), config.fixed_rank)
        if different := set(ranks) ^ {site.name for site in sites}:
            raise UserError(f"ranks and the model's modules differ at {min(different)}", field="ranks")
        check_ranks(sites, ranks, config.pool)
        attach_adapters(model, sites, ranks, scale=config.scale, seed=seed, pool=config.pool, check=False)
        return
    if not pools <= {1, config.pool}:
        message = f"the model's adapters pool {max(pools)} inputs, the settings quantize groups of {config.pool}"
        raise UserError(f"{message}; make them equal", field="qa_lora.group_size")
    if ranks is not None:
        raise UserError("the model carries adapters, whose ranks stay; leave it out", field="ranks")
    if config.rank is not None and {config.rank} != set(current_ranks(model).values()):
        raise UserError("the model's adapters have ranks of their own; leave it out", field="qa_lora.rank")
    check_adapters_match(model, config, "qa_lora")
    if config.pool > 1 and config.offset and pools == {1}:
        text = (
            f"groups of {config.pool} serve storage alone: the model's adapters are not pooled over them, so a merge "
            "quantizes again; quantization_offset: false does without the offsets"
        )
        warnings.warn(text, SilentNoEffectWarning, stacklevel=3)


def check_ranks(sites: Sequence[Site], ranks: Mapping[str, int] | int, pool: int = 1, *, field: str = "rank") -> None:
    """Refuse a rank or a group size that a site can't carry.

    Args:
        sites: that will carry adapters.
        ranks: of each by name, or one for all.
        pool: inputs of a group; 1 without groups.
        field: that says the rank, for errors.

    Raises:
        UserError: naming the site and what it allows.
    """
    for site in sites:
        if site.in_features % pool:
            common = math.gcd(*(site.in_features for site in sites))
            message = f"{pool} does not divide the {site.in_features} inputs of {site.name}; use a divisor of {common}"
            raise UserError(message, field="qa_lora.group_size")
        rank = ranks if isinstance(ranks, int) else ranks[site.name]
        largest = min(site.out_features, site.in_features // pool)
        if rank > largest:
            reason = f"{site.in_features} inputs in groups of {pool} allow" if pool > 1 else "its smaller side allows"
            raise UserError(f"rank {rank} is wasted on {site.name}: {reason} at most {largest}; lower it", field=field)


def format_of(config: QaLoraConfig, type: QuantizationType | None = None) -> QuantizationFormat:
    """Return the storage of the frozen weights, of the section's type or of another one."""
    type = config.quantization_type if type is None else type
    if type is None:
        raise UserError(
            "adaptive_bits chooses the types before training; choose them first and give them as `formats`",
            field="qa_lora.adaptive_bits",
        )
    return QuantizationFormat(
        type=type,
        group_size=config.group_size if config.use_group_quantization else None,
        offset=config.offset,
        scale_dtype=torch.float32 if config.scale_precision == "fp32" else torch.float16,
    )


def formats_of(layers: QuantizedLayers, config: QaLoraConfig, given: Formats | None) -> dict[str, QuantizationFormat]:
    """Return each layer's format: the given one, or the section's."""
    given = given or {}
    if unknown := sorted(given.keys() - layers.keys()):
        raise UserError(
            f"there is no adapted layer {unknown[0]}; expected names as {next(iter(layers))}", field="formats"
        )
    formats = {name: given[name] if name in given else format_of(config) for name in layers}
    for name, layer in layers.items():
        pool, group = max((adapter.pool for _, adapter in layer.updates), default=1), formats[name].group_size
        if pool not in (1, group):
            message = f"groups of {group}, but its adapters pool {pool} inputs; make them equal"
            raise UserError(message, field=f"formats[{name}]")
    return formats


def packed_weights(
    model: nn.Module,
    layers: QuantizedLayers,
    formats: Formats,
    rounding: Rounding,
    images: Tensor | None,
    packed: PackedTensors | None = None,
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield each layer's weight in its format; the layer is to use it before the next one is asked for.

    With gptq layers come in the order of a forward pass, and the inputs of each are what the layers before
    it, quantized already, make of the images, in float32 and evaluation mode.

    Args:
        model: with the layers' float weights.
        layers: by name.
        formats: by layer.
        rounding: nearest or gptq, see `quantization.quantizer`.
        images: calibration images (N, C, S, S), normalised; with gptq alone.
        packed: weights that were saved, by layer; then nothing is rounded.
    """
    if images is not None and (packed is not None or rounding == "nearest"):
        over = "on saved weights" if packed is not None else "with rounding: nearest, only with gptq"
        raise UserError(f"have no effect {over}; leave them out", field="images")
    if packed is not None:
        yield from saved_weights(layers, formats, packed)
    elif rounding == "nearest":
        for name, (module, _) in layers.items():
            assert module.weight is not None
            yield name, quantize(module.weight, formats[name], name=name)
    elif images is None or not len(images):
        message = "rounding: gptq measures layers' inputs; give calibration images (N, C, S, S), normalised"
        raise UserError(message, field="images")
    else:
        backbone = Backbone.within(model)
        images = images.to(next(backbone.model.parameters()).device)
        passes = [ReplayedPass(backbone, partial(backbone.model, part)) for part in images.split(_AT_ONCE)]
        for name in _in_order(backbone, layers, images[:1]):
            module = layers[name].module
            total: Tensor | float = 0.0  # 2 X^T X, (in, in) float64 on the CPU, each part multiplied in float32
            with torch.no_grad(), evaluating(model):
                for replayed in passes:
                    x = replayed.inputs(module)[0].float().flatten(0, -2)  # (B, ..., in) -> (N, in)
                    total = total + 2 * (x.T @ x).double().cpu()  # (in, N) @ (N, in)
            assert module.weight is not None
            assert isinstance(total, Tensor)
            yield name, quantize_with_compensation(module.weight, formats[name], total, name=name)


def _in_order(backbone: Backbone, layers: QuantizedLayers, image: Tensor) -> list[str]:
    """Return the layers' names as a forward pass calls them first."""
    called: dict[str, None] = {}
    watched = {name: layer.module for name, layer in layers.items()}
    # Once called, a layer keeps its place.
    with (
        capturing_inputs(watched, lambda name, _: called.setdefault(name)),
        torch.no_grad(),
        evaluating(backbone.model),
    ):
        backbone.model(image)
    if missing := [name for name in layers if name not in called]:
        message = f"gptq needs the inputs of {missing[0]}, which no forward pass calls; leave it out of targets"
        raise UserError(message, field="qa_lora.rounding")
    return list(called)


def saved_weights(
    layers: QuantizedLayers, formats: Formats, packed: PackedTensors
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield each layer's packed weight as it was saved, instead of rounding again."""
    if different := set(packed) ^ set(layers):
        raise UserError(f"saved weights and the model's layers differ at {min(different)}", field="packed")
    for name, (module, _) in layers.items():
        shape = (module.out_features, module.in_features)
        present = module.weight if module.quantized is None else module.quantized.scales
        assert present is not None
        yield name, QuantizedTensor.from_tensors(packed[name], shape, formats[name]).to(present.device)


# --- the balance of adapters and error --------------------------------------------------------------------------------


def managed_scale(ratio: float, target: float) -> float:
    """Return the factor on the adapters' gradients: 4 (1 - ratio / target), within 1/16 and 4.

    It is 1 at three quarters of the target, and brakes above: gradients seldom take back what has grown too large.
    """
    return float(np.clip(4 * (1 - ratio / target), *_SCALE_BOUNDS))


def managed_pace(ratio: float, target: float, share: float) -> float:
    """Return the schedule's pace: 1 + ratio / target - share, within a half and one and a half.

    At ratio = target * share the adapters are as large as the target says over the error in use, and the pace is even.
    """
    return float(np.clip(1 + ratio / target - share, *_PACE_BOUNDS))


@torch.no_grad()
def adapter_to_error_ratio(layers: QuantizedLayers, error_norms: Mapping[str, float]) -> float:
    """Return the mean of ||dW||_F / ||E||_F over the layers that have an error; infinity if none has.

    ||L R||^2 = sum of (L^T L) * (R R^T) needs products of size r alone, and each column of a pooled R counts `pool`
    times.
    """
    ratios = []
    for name, layer in layers.items():
        if error_norms[name]:
            energy = 0.0
            for _, adapter in layer.updates:
                left, right = adapter.factors()  # (out, r), (r, in / pool)
                energy += adapter.pool * float(((left.T @ left) * (right @ right.T)).sum())  # of (r, r)
            ratios.append(math.sqrt(max(energy, 0.0)) / error_norms[name])
    return float(np.mean(ratios)) if ratios else math.inf


def float_weights(
    layers: QuantizedLayers, reference: Mapping[str, Tensor], relative_errors: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return the weight (out, in) of each layer before quantization, from a state dict of the plain model.

    It holds `<layer>.weight` for each; the errors are those of when the layers were quantized.
    """
    weights = {}
    for name, (module, _) in layers.items():
        weight = reference.get(f"{name}.weight")
        assert module.quantized is not None
        if weight is None or weight.shape != module.quantized.shape:
            given = "nothing" if weight is None else f"shape {tuple(weight.shape)}"
            message = f"expected its float weight of shape {module.quantized.shape}, got {given}"
            raise UserError(message, field=f"reference[{name}]")
        weights[name] = weight = weight.detach().to(module.quantized.scales.device, torch.float32)
        norm = float(weight.norm())
        error = float((weight - module.quantized.dequantize()).norm()) / norm if norm else 0.0
        if not math.isclose(error, relative_errors[name], rel_tol=_SAME_WEIGHT, abs_tol=1e-6):
            message = f"its relative error would be {error:.6g}, not {relative_errors[name]:.6g}"
            raise UserError(f"is not the weight that was quantized: {message}", field=f"reference[{name}]")
    return weights


@torch.no_grad()
def error_removed(
    model: nn.Module, layers: QuantizedLayers, weights: Mapping[str, Tensor], images: Tensor | None = None
) -> dict[str, float]:
    """Return which share of the error the updates have removed, each a mean over layers.

    Args:
        model: carries the layers.
        layers: by name.
        weights: their float weights, from `float_weights`.
        images: (B, 3, H, W), for the outputs.

    Returns:
        error_removed_in_weights: 1 - ||E - dW||_F^2 / ||E||_F^2.
        error_removed_in_outputs: 1 - ||X (E - dW)^T||_F^2 / ||X E^T||_F^2, given images; X (N, in) are the inputs of a
            layer in a forward pass of them, of all tokens.
    """

    def removed(name: str, x: Tensor | None = None) -> float:
        layer = layers[name]
        assert layer.module.quantized is not None
        error = weights[name] - layer.module.quantized.dequantize()  # (out, in)
        remainder = error.clone()
        for rows, adapter in layer.updates:
            remainder[rows] -= adapter.delta()  # (out_s, in)
        if x is not None:
            error, remainder = x @ error.T, x @ remainder.T  # (N, in) -> (N, out)
        energy = float(error.square().sum())
        return 1 - float(remainder.square().sum()) / energy if energy else 0.0  # 0: there is none to remove

    shares = {"error_removed_in_weights": float(np.mean([removed(name) for name in layers]))}
    if images is not None:
        of_outputs: list[float] = []

        def see(name: str, inputs: Tensor) -> None:
            of_outputs.append(removed(name, inputs.float().flatten(0, -2)))  # (B, ..., in) -> (N, in)

        with capturing_inputs({name: layer.module for name, layer in layers.items()}, see), evaluating(model):
            model(images)
        shares["error_removed_in_outputs"] = float(np.mean(of_outputs))
    return shares
