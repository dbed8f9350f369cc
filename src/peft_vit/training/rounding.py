"""How the weights of a model become low-bit ones: each by itself, or layer by layer on calibration images (GPTQ)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from peft_vit.backbones import Backbone, ReplayedPass, evaluating
from peft_vit.config import QaLoraConfig
from peft_vit.errors import UserError
from peft_vit.quantization import QuantizationFormat, QuantizedTensor, quantize, quantize_with_compensation
from peft_vit.training.quantized_layers import QuantizedLayer

_AT_ONCE = 16  # images


def packed_weights(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    formats: Mapping[str, QuantizationFormat],
    config: QaLoraConfig,
    images: Tensor | None,
    packed: Mapping[str, Mapping[str, Tensor]] | None,
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield each layer's weight in its format; the layer is to use it before the next one is asked for.

    With `rounding: gptq` layers come in the order of a forward pass, and the inputs of each are what the layers before
    it, quantized already, make of the images, in float32 and evaluation mode.

    Args:
        model: with the layers' float weights.
        layers: by name.
        formats: likewise.
        config: says how to round.
        images: calibration images (N, C, S, S), normalised; with `rounding: gptq` alone.
        packed: weights that were saved, by layer; then nothing is rounded.

    Raises:
        UserError: if calibration images are missing or have no effect, a forward pass calls a layer not, or saved
            weights are not these layers'.
    """
    if packed is not None:
        if images is not None:
            raise UserError("have no effect on saved weights; leave one of both out", field="images")
        yield from saved_weights(layers, formats, packed)
        return
    _check_images(config, images)
    if images is None:
        for name, (module, _) in layers.items():
            assert module.weight is not None
            yield name, quantize(module.weight, formats[name], name=name)
        return
    backbone = Backbone.within(model)
    images = images.to(next(backbone.model.parameters()).device)
    passes = [ReplayedPass(backbone, partial(backbone.model, part)) for part in images.split(_AT_ONCE)]
    for name in _in_order(backbone, layers, images[:1]):
        module = layers[name].module
        with torch.no_grad(), evaluating(model):
            hessian = _hessian(one.inputs(module)[0] for one in passes)
        assert module.weight is not None
        yield name, quantize_with_compensation(module.weight, formats[name], hessian, name=name)


def _check_images(config: QaLoraConfig, images: Tensor | None) -> None:
    if config.rounding == "gptq" and (images is None or not len(images)):
        problem = "rounding: gptq measures layers' inputs; give calibration images (N, C, S, S), normalised"
        raise UserError(problem, field="images")
    if config.rounding == "nearest" and images is not None:
        raise UserError("have no effect with rounding: nearest; leave them out, or set rounding: gptq", field="images")


def _in_order(backbone: Backbone, layers: Mapping[str, QuantizedLayer], image: Tensor) -> list[str]:
    """Return the layers' names as a forward pass calls them first.

    Raises:
        UserError: if it leaves one out.
    """
    called: dict[str, None] = {}

    def note(name: str, *_: object) -> None:
        called[name] = None  # once called, it keeps its place

    handles = [one.module.register_forward_pre_hook(partial(note, name)) for name, one in layers.items()]
    try:
        with torch.no_grad(), evaluating(backbone.model):
            backbone.model(image)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in layers if name not in called]:
        problem = f"gptq needs the inputs of {missing[0]}, which no forward pass calls; leave it out of targets"
        raise UserError(problem, field="qa_lora.rounding")
    return list(called)


def _hessian(inputs: Iterator[Tensor]) -> Tensor:
    """Return 2 X^T X, (in, in) float64 on the CPU, of inputs (..., in) in parts, each multiplied in float32."""
    total: Tensor | float = 0.0
    for part in inputs:
        x = part.float().flatten(0, -2)  # (..., in) -> (N, in)
        total = total + 2 * (x.T @ x).double().cpu()
    assert isinstance(total, Tensor)
    return total


def saved_weights(
    layers: Mapping[str, QuantizedLayer],
    formats: Mapping[str, QuantizationFormat],
    packed: Mapping[str, Mapping[str, Tensor]],
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield each layer's packed weight as it was saved, in place of rounding anew.

    Raises:
        UserError: if the saved weights are of other layers, or a tensor is not of the layer's shape and format.
    """
    if different := set(packed) ^ set(layers):
        raise UserError(f"saved weights and the model's layers differ at {min(different)}", field="packed")
    for name, (module, _) in layers.items():
        shape = (module.out_features, module.in_features)
        there = module.weight if module.quantized is None else module.quantized.scales
        assert there is not None
        yield name, QuantizedTensor.from_tensors(packed[name], shape, formats[name]).to(there.device)
