"""How the adapters compare with the error that quantization made, and what follows for scale and pace.

With W the float weight of a layer, Wq what its codes stand for, E = W - Wq the error at full quantization, and dW the
adapters' update: the adapted quantized layer differs from the float one by E - dW. Whether dW removes the error is
asked of the weights and of the layer's outputs; an update that learns the task need not remove any.

Managing the balance is proportional control of rho, the mean of ||dW|| / ||E||, towards a target rho*: either the
gradients' scale follows how far rho is below rho*, or the schedule's pace follows how far it is ahead of rho* * share,
the target over the error in use. Both are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from peft_vit.backbones import evaluating, watching
from peft_vit.errors import UserError
from peft_vit.training.quantized_layers import QuantizedLayer

MEASURE_EVERY_STEPS = 4  # of a managed balance: a measurement takes a few thousandths of a step
_SCALE_BOUNDS = (1 / 16, 4.0)
_PACE_BOUNDS = (0.5, 1.5)  # below 2, so that the schedule does not end before its end step
_SAME_WEIGHT = 1e-4  # largest relative difference between the errors of one weight, computed twice


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
def adapter_to_error_ratio(layers: Mapping[str, QuantizedLayer], error_norms: Mapping[str, float]) -> float:
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
    layers: Mapping[str, QuantizedLayer], reference: Mapping[str, Tensor], relative_errors: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return the weight of each layer before quantization, from a state dict of the plain model.

    It holds `<layer>.weight`, or `<layer>`, for each; the errors are those of when the layers were quantized.
    """
    weights = {}
    for name, (module, _) in layers.items():
        weight = reference.get(f"{name}.weight", reference.get(name))
        assert module.quantized is not None
        if weight is None or weight.shape != module.quantized.shape:
            given = "nothing" if weight is None else f"shape {tuple(weight.shape)}"
            problem = f"expected its float weight of shape {module.quantized.shape}, got {given}"
            raise UserError(problem, field=f"reference[{name}]")
        weights[name] = weight = weight.detach().to(module.quantized.scales.device, torch.float32)
        norm = float(weight.norm())
        error = float((weight - module.quantized.dequantize()).norm()) / norm if norm else 0.0
        if not math.isclose(error, relative_errors[name], rel_tol=_SAME_WEIGHT, abs_tol=1e-6):
            problem = f"its relative error would be {error:.6g}, not {relative_errors[name]:.6g}"
            raise UserError(f"is not the weight that was quantized: {problem}", field=f"reference[{name}]")
    return weights


@torch.no_grad()
def error_removed(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], weights: Mapping[str, Tensor], images: Tensor | None = None
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
        rest = error.clone()
        for rows, adapter in layer.updates:
            rest[rows] -= adapter.delta()
        if x is not None:
            error, rest = x @ error.T, x @ rest.T  # (N, in) -> (N, out)
        energy = float(error.square().sum())
        return 1 - float(rest.square().sum()) / energy if energy else 0.0  # 0: there is none to remove

    shares = {"error_removed_in_weights": float(np.mean([removed(name) for name in layers]))}
    if images is not None:
        of_outputs: list[float] = []

        def see(name: str, inputs: Tensor) -> None:
            of_outputs.append(removed(name, inputs.float().flatten(0, -2)))  # (B, ..., in) -> (N, in)

        with watching({name: layer.module for name, layer in layers.items()}, see), evaluating(model):
            model(images)
        shares["error_removed_in_outputs"] = float(np.mean(of_outputs))
    return shares
