"""The tiny model with packed layers, and how far an exported file of it is from the model that it was made of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import random_model
from torch import Tensor, nn

from peft_vit.core.adapters import AdaptedLinear
from peft_vit.core.backbones import find_sites
from peft_vit.core.quantization import QuantizationFormat, QuantizedTensor, quantize
from peft_vit.deploy import ExportMetadata, open_exported
from peft_vit.deploy.formats.header import HEADER, Header
from peft_vit.deploy.formats.runtimes import onnx_content
from peft_vit.deploy.formats.torch_files import tensor_content


def quantized(weight: Tensor, format: QuantizationFormat) -> QuantizedTensor:
    """Quantize, and move the offsets, if there are any, as a merge would."""
    packed_weight = quantize(weight.detach(), format)
    if packed_weight.offsets is None:
        return packed_weight
    generator = torch.Generator().manual_seed(1)
    return packed_weight.with_offset_added(0.02 * torch.randn(packed_weight.scales.shape, generator=generator))


def packed(linear: Any, format: QuantizationFormat) -> AdaptedLinear:
    """Quantize a layer with a constant row."""
    layer = AdaptedLinear(linear)
    assert layer.weight is not None
    layer.weight.detach()[0] = 0.03
    layer.set_quantized(quantized(layer.weight, format))
    layer.drop_float()
    return layer


def packed_model(formats: Sequence[QuantizationFormat], model: nn.Module | None = None) -> nn.Module:
    """Quantize the k-th linear layer to the k-th format, the last for all that remain."""
    model = random_model("test_vit") if model is None else model
    for index, name in enumerate(dict.fromkeys(site.module for site in find_sites(model))):
        model.set_submodule(name, packed(model.get_submodule(name), formats[min(index, len(formats) - 1)]))
    return model.eval()


def logits_of(file: Path, images: Tensor) -> Tensor:
    """Return what an exported file says of images, (B, classes)."""
    return torch.from_numpy(open_exported(file).logits(images.numpy()))


def compared(model: nn.Module, file: Path, batch: int) -> tuple[float, float]:
    """Return the largest relative difference of the logits and the share of equal predictions."""
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model(images)
    logits = logits_of(file, images)
    same = (logits.argmax(1) == expected.argmax(1)).float().mean()
    return float((logits - expected).abs().max() / expected.abs().max()), float(same)


def signed_tensors(file: Path, header: Header, tensors: dict[str, Tensor]) -> None:
    """Write tensors with a header and the hash that belongs to it, as anybody can who wants to be believed."""
    save_file(tensors, file, metadata={HEADER: header.signed(tensor_content(header, tensors)).model_dump_json()})


def signed_onnx(content: bytes, card: ExportMetadata) -> bytes:
    """Return an ONNX file with another card and the hash that belongs to it, likewise."""
    import onnx

    proto = onnx.load_from_string(content)
    header = Header(card=card).signed(onnx_content(card, proto))
    onnx.helper.set_model_props(proto, {HEADER: header.model_dump_json()})
    return bytes(proto.SerializeToString())


def damaged(content: bytes, data: Any) -> bytes:
    """Cut a file, or alter one of its bytes, as hypothesis draws."""
    from hypothesis import strategies as st

    spoiled, place = bytearray(content), data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del spoiled[place:]
    else:
        spoiled[place] ^= data.draw(st.integers(1, 255))
    return bytes(spoiled)
