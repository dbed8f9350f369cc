"""Any other model of timm that has linear layers on tokens: MaxViT, XCiT, DaViT, CaiT, PVT v2, ConvNeXt and more.

Their layers are found by a forward pass, see `by_tokens`, and named as timm does. Fused matrices stay whole: nothing
says what their slices are.
"""

from __future__ import annotations

import sys
from typing import Any

import timm
from torch import Tensor, nn

from peft_vit.backbones.families.by_tokens import OnTokens, on_tokens
from peft_vit.backbones.families.family import Family
from peft_vit.backbones.site import LinearLayout
from peft_vit.errors import UserError


def is_of_timm(model: nn.Module) -> bool:
    """Tell whether timm has built a model."""
    return hasattr(model, "pretrained_cfg") and hasattr(model, "get_classifier")


def _found(model: Any) -> OnTokens:
    name = type(model).__name__
    size = _input_size(model)
    try:
        found = on_tokens(model, size)
    except Exception as error:
        raise _wrong_size(name, size[1], model.default_cfg, error) from None
    if not found.linears:
        raise UserError(
            f"{name} has no linear layer in a block that sees tokens, as a convolutional network; "
            "choose a Vision Transformer"
        )
    return found


def _wrong_size(name: str, image_size: int, native: dict[str, Any], error: Exception) -> UserError:
    """Return what a model says, in whatever way, of images that its windows or stages do not divide."""
    reason = f"{type(error).__name__}: {error}".split("\n")[0][:150]
    problem = f"{name} can't compute images of {image_size} px ({reason}); it is made for {native['input_size'][1]} px"
    return UserError(problem, field="data.image_size")


def _layout(model: nn.Module) -> list[LinearLayout]:
    return list(_found(model).linears)


def _blocks(model: nn.Module) -> list[str]:
    return list(_found(model).blocks)


def _prepare(model: nn.Module) -> bool:
    _found(model)  # while layers are plain
    return False


def _input_size(model: Any) -> tuple[int, int, int]:
    channels, height, width = model.pretrained_cfg["input_size"]
    return int(channels), int(height), int(width)


def _build(name: str, image_size: int, num_classes: int, **settings: Any) -> nn.Module:
    """Build a model, and note for which images; some classes ask for their size, to others it is all the same."""
    try:
        model: Any = timm.create_model(name, num_classes=num_classes, img_size=image_size, **settings)
    except TypeError:
        model = timm.create_model(name, num_classes=num_classes, **settings)
    except Exception as error:
        raise _wrong_size(name, image_size, timm.get_pretrained_cfg(name).to_dict(), error) from None  # type: ignore[union-attr]
    channels = model.pretrained_cfg["input_size"][0]
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (channels, image_size, image_size)}
    return model


def _fit_weights(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Let the module of timm that a model's class comes from rename other projects' tensors, if it does."""
    fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return tensors if fit is None else fit(tensors, model)


def _size_step(model: nn.Module) -> int:
    return 1  # a forward pass tells which sizes a model takes


TIMM_OTHER = Family(
    nn.Module,
    _layout,
    _blocks,
    _fit_weights,
    prepare=_prepare,
    input_size=_input_size,
    build=_build,
    size_step=_size_step,
    shallow={},
    in_turn=False,
)
