"""A model without adapters as OpenVINO's model.xml and model.bin, low-bit layers by its own kernels.

The float part takes the way over an ONNX graph (`onnx_file`), which OpenVINO reads; packed layers become operators on
the run's own codes, see `openvino_layers`.
"""

from __future__ import annotations

import hashlib
import html
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_vit.adapters import packed_weights
from peft_vit.deployment.merging import check_merged
from peft_vit.deployment.model_card import HEADER, Header, ModelCard, read_json, write_exported
from peft_vit.deployment.onnx_file import INPUT, onnx_graph
from peft_vit.errors import UserError, one_line, os_fault
from peft_vit.extras import load_openvino, require_extra
from peft_vit.quantization import QuantizedTensor
from peft_vit.safe_io import read_bytes

_UNSIGNED = "0" * 64  # in place of the hash while it is computed
_NO_TYPE = {"fp4": " (its f4e2m1 has another value at code 1)"}
# Products in float32, also where a CPU has bfloat16, and no activations in 8 bits.
SETTINGS = {"EXECUTION_MODE_HINT": "ACCURACY"}


def export_openvino(model: nn.Module, file: Path, card: ModelCard) -> None:
    """Write a model with a batch of any size: `images` (B, 3, S, S) normalised float32, to `logits` (B, classes).

    Args:
        model: a Vision Transformer whose adapters are merged (`merge`), quantized or not; it stays as it is.
        file: ends in .xml, with the weights beside it in a file that ends in .bin; both are replaced if they exist.
        card: what the file says of the model.

    Raises:
        UserError: if a package is missing, the model carries adapters, a layer's format is none of OpenVINO's, or a
            file can't be written.
    """
    require_extra("openvino", "OpenVINO export")
    openvino = load_openvino()
    check_merged(model)
    packed = packed_weights(model)
    for name, weight in packed.items():
        if weight.format.has_codebook and (kind := weight.format.type) != "nf4":
            raise UserError(
                f"{name} is in {kind}, which OpenVINO has no type for{_NO_TYPE.get(kind, '')}; export onnx or "
                "safetensors, or train with nf4 or an int type",
                field="quantization_type",
            )
    network = _network(model, card.image_size, packed)
    network.set_rt_info(Header(card=card, sha256=_UNSIGNED).model_dump_json(), [HEADER])
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "model.xml"
        openvino.save_model(network, written, compress_to_fp16=False)
        description, weights = written.read_bytes(), written.with_suffix(".bin").read_bytes()
    signed = description.replace(_UNSIGNED.encode(), _digest(description, weights).encode(), 1)
    write_exported(file.with_suffix(".bin"), weights)
    write_exported(file, signed)


def _network(model: nn.Module, image_size: int, packed: dict[str, QuantizedTensor]) -> Any:
    """Return OpenVINO's model, packed layers by their own codes."""
    openvino = load_openvino()
    from onnxscript.optimizer import fold_constants
    from openvino import opset13
    from openvino.frontend.onnx import ConversionExtension

    from peft_vit.deployment.openvino_layers import DOMAIN, OPERATOR, PackedPlace, weight_node

    def product(node: Any) -> Any:
        weight = weight_node(packed[node.get_attribute("layer")])
        return opset13.matmul(node.get_input(0), weight, False, True).outputs()

    proto = onnx_graph(model, image_size, PackedPlace)
    # A position embedding that is resized (NaFlexViT's): OpenVINO would leave the antialiasing out.
    fold_constants(proto, should_fold=lambda node: True if node.op_type == "Resize" else None)
    core = openvino.Core()
    core.add_extension(ConversionExtension(OPERATOR, DOMAIN, product))
    return core.read_model(proto.SerializeToString(), b"")


def _digest(description: bytes, weights: bytes) -> str:
    """Return the SHA-256 over the two files' SHA-256, the .xml with zeros in place of the hash."""
    return hashlib.sha256(hashlib.sha256(description).digest() + hashlib.sha256(weights).digest()).hexdigest()


def open_openvino(file: Path) -> tuple[Callable[[Tensor], Tensor], ModelCard]:
    """Return a function from normalised images (B, 3, S, S) to logits (B, classes) by OpenVINO on the CPU, and the
    card.

    Nothing of the file is given to OpenVINO before the hash is found right.

    Raises:
        UserError: if the .xml or .bin is cut off, was changed after it was written, was not written by this package, or
            OpenVINO is missing or can't run it.
    """
    require_extra("openvino", packages=("openvino",), file=file)
    parts = []
    for part in (file, file.with_suffix(".bin")):
        with os_fault("can't be read", part, remedy="export the run again"):
            parts.append(read_bytes(part, None))
    description, weights = parts
    found = re.search(rb'<%b value="([^"]*)"' % HEADER.encode(), description)
    if found is None:
        raise UserError("was not written by `peft-vit export --format openvino`, or was cut off", file=file)
    header = read_json(Header, html.unescape(found[1].decode(errors="replace")), file)
    unsigned = description.replace(header.sha256.encode(), _UNSIGNED.encode(), 1)
    if _digest(unsigned, weights) != header.sha256:
        raise UserError(
            f"it or {file.with_suffix('.bin').name} was changed after it was written; export the run again", file=file
        )
    openvino = load_openvino()
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(description, weights), "CPU", SETTINGS)
    except Exception as error:  # OpenVINO's errors share no public class
        raise UserError(f"OpenVINO {openvino.__version__} can't run it ({one_line(error)})", file=file) from None
    return lambda images: torch.from_numpy(compiled({INPUT: images.numpy()})[0]), header.card
