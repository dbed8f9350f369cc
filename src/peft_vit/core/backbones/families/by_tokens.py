"""Linear layers found where tokens pass, for models whose class no family describes by hand.

Those are models of transformers, and any other model of timm that has linear layers on tokens: MaxViT, XCiT, DaViT,
CaiT, PVT v2, ConvNeXt and more. Layers are named as their library does. Fused matrices stay whole: nothing says what
their slices are.

Two forward passes, of one image and of two, tell which layers see tokens: inputs (N, T, in) whose tokens double with
the images. A layer on pooled features sees one token an image. Networks that make position biases see the same for any
number of images, or have it in their name. What lies outside of a list of blocks is left out: embeddings, pooling,
heads.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import AttentionPool2d, AttentionPoolLatent, RotAttentionPool2d
from torch import Tensor, nn

from peft_vit.base.errors import UserError, first_line
from peft_vit.core.backbones.families.family import Family, noted_input_size
from peft_vit.core.backbones.passes import capturing_inputs, evaluating
from peft_vit.core.backbones.site import LinearLayout
from peft_vit.core.records import Role

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_POOLS = (AttentionPool2d, AttentionPoolLatent, RotAttentionPool2d)
_POSITIONS = re.compile(r"(^|[._])(pos|position|cpb)([._]|$)")
_KINDS = {  # what matrices are called in timm and in transformers, by the name of their module
    **dict.fromkeys(("query", "q_proj", "q"), "query"),
    **dict.fromkeys(("key", "k_proj", "k"), "key"),
    **dict.fromkeys(("value", "v_proj", "v"), "value"),
    **dict.fromkeys(("o_proj", "out_proj"), "out"),
    "gate_proj": "gate",
    "down_proj": "fc2",
}
_STEPS = (32, 56)  # of an image's side, in pixels; 56 where patches have 14
_FOUND = "_peft_vit_linears_on_tokens"  # attribute of a model: what was found before adapters took the layers' places


@dataclass(frozen=True)
class TokenLayers:
    """What was found in a model: its linear layers on tokens, and the blocks that they lie in, as they are called."""

    linears: tuple[LinearLayout, ...]
    blocks: tuple[str, ...]


def token_layers(model: Any) -> TokenLayers:
    """Return what a model has; looked for once, while its layers are plain.

    Args:
        model: maps images to logits; its `pretrained_cfg` names their size, its `default_cfg` that of pretraining.

    Raises:
        UserError: if it has no such layer, or can't compute images of this size.
    """
    known = model.__dict__.get(_FOUND)
    if isinstance(known, TokenLayers):
        return known
    name, size = type(model).__name__, noted_input_size(model)
    try:
        layers = _find(model, size)
    except Exception as error:
        raise wrong_size(name, size[1], model.default_cfg, error) from None
    if not layers.linears:
        raise UserError(
            f"{name} has no linear layer in a block that sees tokens, as a convolutional network; "
            "choose a Vision Transformer"
        )
    model.__dict__[_FOUND] = layers
    return layers


def wrong_size(name: str, image_size: int, native: Mapping[str, Any], error: Exception) -> UserError:
    """Return what a model says, in whatever way, of images that its windows or stages do not divide."""
    reason = first_line(error)[:150]
    message = f"{name} can't compute images of {image_size} px ({reason}); it is made for {native['input_size'][1]} px"
    return UserError(message, field="data.image_size")


def _prepare(model: nn.Module) -> bool:
    """Look for a model's layers while they are plain; each is called, or it would not be found."""
    token_layers(model)
    return False


# Fields of a `Family` whose layers are found so.
BY_TOKENS: dict[str, Any] = {
    "layout": lambda model: list(token_layers(model).linears),
    "blocks": lambda model: list(token_layers(model).blocks),
    "prepare": _prepare,
    "input_size": noted_input_size,
    "in_turn": False,
}


def _find(model: nn.Module, input_size: tuple[int, int, int]) -> TokenLayers:
    shapes, shapes_of_two = (_shapes(model, (images, *input_size)) for images in (1, 2))
    modules = dict(model.named_modules())
    pools = tuple(f"{name}." for name, module in modules.items() if isinstance(module, _POOLS))
    names = [
        name
        for name, shape in shapes.items()
        if len(shape) >= 3
        and shape[:-1].numel() > 1
        and shapes_of_two[name][:-1].numel() == 2 * shape[:-1].numel()
        and not _POSITIONS.search(name)
        and not name.startswith(pools)
    ]

    def members(name: str) -> list[str]:
        """Return the members of lists that a module lies in, from the outermost."""
        parts = name.split(".")
        paths = [".".join(parts[:count]) for count in range(1, len(parts))]
        return [path for path in paths if isinstance(modules[path.rpartition(".")[0]], _LISTS)]

    counts = Counter(path for name in names for path in members(name))
    # of each layer the innermost member of a list that holds several layers
    members_of = {name: [path for path in members(name) if counts[path] > 1] for name in names}
    member_of = {name: paths[-1] for name, paths in members_of.items() if paths}
    unique = tuple(dict.fromkeys(member_of.values()))
    blocks = [path for path in unique if not any(other.startswith(f"{path}.") for other in unique)]
    linears: list[LinearLayout] = []
    kind_counts: Counter[tuple[int, str]] = Counter()
    layer = 0
    for name, block in member_of.items():  # in the order of calls
        layer = blocks.index(block) if block in blocks else layer
        kind = _kind(name, member_of)
        kind_counts[layer, kind] += 1
        if (count := kind_counts[layer, kind]) > 1:
            kind = f"{kind}_{count}"
        linears.append(LinearLayout(name, layer, (kind,), _role(name, kind)))
    return TokenLayers(tuple(linears), tuple(blocks))


def _shapes(model: nn.Module, shape: tuple[int, ...]) -> dict[str, torch.Size]:
    """Return the shape of the inputs of each linear layer in a forward pass, in the order of first calls."""
    shapes: dict[str, torch.Size] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    record = capturing_inputs(layers, lambda name, x: shapes.setdefault(name, x.shape))
    with record, evaluating(model), torch.no_grad():
        model(torch.zeros(shape).to(next(model.parameters())))
    return shapes


def _kind(name: str, names: dict[str, str]) -> str:
    """Return what a matrix is, in the words of plain blocks where its name tells."""
    path = name.split(".")
    leaf, parent = path[-1], ".".join(path[:-1])
    if leaf == "up_proj":
        return "up" if f"{parent}.gate_proj" in names else "fc1"
    if leaf == "dense":  # transformers: attention.output.dense, intermediate.dense, output.dense
        if path[-2:-1] == ["intermediate"]:
            return "fc1"
        return "out" if "attention" in path[-3:-2] else "fc2"
    if leaf == "proj" and _is_attention(path[-2:-1]):
        return "out"
    if leaf in _KINDS:
        return _KINDS[leaf]
    plain = re.sub(r"[^a-z0-9]+", "_", (leaf if leaf[0].isalpha() else f"{path[-2]}_{leaf}").lower()).strip("_")
    return plain[:29] if plain[:1].isalpha() else f"matrix_{plain}"[:29]


def _role(name: str, kind: str) -> Role:
    parents = name.split(".")[:-1]
    if kind.startswith(("fc1", "fc2", "gate", "up")) or any(re.search("mlp|ffn", part) for part in parents):
        return "mlp"
    return "attention" if kind.startswith(("query", "key", "value")) or _is_attention(parents) else "other"


def _is_attention(parents: Sequence[str]) -> bool:
    return any(re.search("attn|attention", part) for part in parents)


# --- other models of timm ---


def _build(name: str, image_size: int, num_classes: int) -> nn.Module:
    """Build a model, and note for which images; some classes ask for their size, to others it is all the same."""
    try:
        model: Any = timm.create_model(name, num_classes=num_classes, img_size=image_size)
    except TypeError:
        model = timm.create_model(name, num_classes=num_classes)
    except Exception as error:
        native = timm.get_pretrained_cfg(name)
        assert native is not None
        raise wrong_size(name, image_size, native.to_dict(), error) from None
    channels = model.pretrained_cfg["input_size"][0]
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (channels, image_size, image_size)}
    return model


def _size_step(model: Any) -> int:
    """Return 32 px, the total stride of most models with stages, or what else a model of this class takes.

    A model that takes no other size than its own has that one.
    """
    return _tried_step(model.pretrained_cfg["architecture"], model.default_cfg["input_size"][1])


@functools.cache
def _tried_step(name: str, native: int) -> int:
    def takes(size: int) -> bool:
        try:
            with torch.device("meta"):
                _shapes(_build(name, size, 1), (1, 3, size, size))
        except Exception:  # what a model says of a size that its stages do not divide
            return False
        return True

    return next((step for step in _STEPS if takes(2 * step) and takes((native - 1) // step * step)), native)


def _fit_weights(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Let the module of timm that a model's class comes from rename other projects' tensors, if it does."""
    fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return tensors if fit is None else fit(tensors, model)


TIMM_OTHER = Family(
    nn.Module, fit_weights=_fit_weights, build=_build, size_step=_size_step, sizes_are_tried=True, **BY_TOKENS
)
