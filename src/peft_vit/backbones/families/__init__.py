"""Families of Vision Transformers: what differs from one class of models to the next."""

from torch import nn

from peft_vit.backbones.families.family import Family
from peft_vit.backbones.families.timm_hiera import TIMM_HIERA
from peft_vit.backbones.families.timm_naflexvit import TIMM_NAFLEXVIT
from peft_vit.backbones.families.timm_other import TIMM_OTHER, is_of_timm
from peft_vit.backbones.families.timm_swin import TIMM_SWIN, TIMM_SWIN_V2
from peft_vit.backbones.families.timm_vit import TIMM_BEIT, TIMM_DEIT, TIMM_EVA, TIMM_VIT
from peft_vit.backbones.families.transformers_vision import TRANSFORMERS_VISION

# A class stands before the one that it derives from.
FAMILIES: tuple[Family, ...] = (
    TIMM_DEIT,
    TIMM_VIT,
    TIMM_EVA,
    TIMM_BEIT,
    TIMM_SWIN,
    TIMM_SWIN_V2,
    TIMM_HIERA,
    TIMM_NAFLEXVIT,
    TRANSFORMERS_VISION,
)


def family_of(model: nn.Module) -> Family | None:
    """Return the family of a model; None: neither one of these nor of timm."""
    named = next((family for family in FAMILIES if isinstance(model, family.model_class)), None)
    return TIMM_OTHER if named is None and is_of_timm(model) else named


__all__ = ["FAMILIES", "Family", "family_of"]
