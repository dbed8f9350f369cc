"""What a low-bit model takes: packed layers with their scales and offsets, and everything that is left in float."""

from __future__ import annotations

from safetensors.torch import save
from torch import Tensor, nn

from peft_vit.adapters import adapted_modules, packed_weights, site_adapters
from peft_vit.backbones import Backbone
from peft_vit.evaluation.footprint import storage_bytes
from peft_vit.quantization import QuantizedTensor
from peft_vit.records import FloatPart, LayerSize, ModelSize


def model_size(model: nn.Module) -> ModelSize:
    """Count a low-bit model live and as a file, without adapters, with float copies that layers have beside codes."""
    packed = packed_weights(model)
    adapters = {id(p) for adapter in site_adapters(model).values() for p in adapter.parameters()}
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    left = {name: tensor for name, tensor in named.items() if id(tensor) not in adapters}
    by_part: dict[FloatPart, list[Tensor]] = {}
    for name, tensor in left.items():
        by_part.setdefault(_part(model, name, tensor), []).append(tensor)
    stored = left | {
        f"{name}.{kind}": t for name, quantized in packed.items() for kind, t in quantized.tensors().items()
    }
    computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys()  # rotary embeddings, say
    in_file = {name: tensor for name, tensor in stored.items() if name not in computed}
    once = [tensor.numel() for name, tensor in left.items() if name.removesuffix(".weight") not in packed]
    sizes = {name: _layer_size(quantized) for name, quantized in packed.items()}
    return ModelSize(
        weights=sum(once) + sum(size.weights for size in sizes.values()),
        layers=sizes,
        float_bytes={part: storage_bytes(tensors) for part, tensors in by_part.items()},
        merging_bytes=sum(
            packed[name].scales.nbytes
            for name, module in adapted_modules(model)
            if name in packed
            and packed[name].offsets is None
            and any(adapter.pool > 1 and adapter.rank for _, adapter in module.adapters())
        ),
        live_bytes=storage_bytes(stored.values()),
        file_bytes=len(save({name: tensor.detach().cpu().contiguous() for name, tensor in in_file.items()})),
    )


def _layer_size(quantized: QuantizedTensor) -> LayerSize:
    kept = {kind: tensor.nbytes for kind, tensor in quantized.tensors().items()}
    return LayerSize(
        weights=quantized.shape[0] * quantized.shape[1],
        codes_bytes=kept["codes"],
        scales_bytes=quantized.nbytes - kept["codes"] - kept.get("offsets", 0),
        offsets_bytes=kept.get("offsets", 0),
    )


def _part(model: nn.Module, name: str, tensor: Tensor) -> FloatPart:
    """Return which part of the model a float tensor belongs to."""
    words = name.split(".")
    if any(tensor is parameter for parameter in Backbone(model).head.parameters()):
        return "head"
    if "patch_embed" in words:
        return "patch embedding"
    if "pos_embed" in words:
        return "position embedding"
    if isinstance(model.get_submodule(".".join(words[:-1])), nn.LayerNorm):
        return "norms"
    if words[-1].endswith("bias"):
        return "biases"
    return "matrices" if words[-1] == "weight" and tensor.ndim == 2 else "other"
