"""Any other model of timm that has linear layers on tokens: MaxViT, XCiT, DaViT, CaiT, PVT v2, ConvNeXt and more.

Their layers are found by a forward pass, see `by_tokens`, and named as timm does. Fused matrices stay whole: nothing
says what their slices are.
"""

from __future__ import annotations

import sys
from typing import Any

import timm
from torch import Tensor, nn

from peft_vit.backbones.families.by_tokens import BY_TOKENS, wrong_size
from peft_vit.backbones.families.family import Family


def is_of_timm(model: nn.Module) -> bool:
    """Tell whether timm has built a model, and not whether it is wrapped by something that hands its attributes out."""
    return "pretrained_cfg" in vars(model) and hasattr(model, "get_classifier")


def _build(name: str, image_size: int, num_classes: int, **settings: Any) -> nn.Module:
    """Build a model, and note for which images; some classes ask for their size, to others it is all the same."""
    try:
        model: Any = timm.create_model(name, num_classes=num_classes, img_size=image_size, **settings)
    except TypeError:
        model = timm.create_model(name, num_classes=num_classes, **settings)
    except Exception as error:
        native = timm.get_pretrained_cfg(name)
        assert native is not None
        raise wrong_size(name, image_size, native.to_dict(), error) from None
    channels = model.pretrained_cfg["input_size"][0]
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (channels, image_size, image_size)}
    return model


def _fit_weights(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Let the module of timm that a model's class comes from rename other projects' tensors, if it does."""
    fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return tensors if fit is None else fit(tensors, model)


TIMM_OTHER = Family(
    nn.Module,
    fit_weights=_fit_weights,
    build=_build,
    size_step=lambda model: 1,  # a forward pass tells which sizes a model takes
    shallow={},
    **BY_TOKENS,
)
