"""Families of Vision Transformers: what differs from one class of models to the next, a module each."""

from peft_vit.backbones.families.family import Family
from peft_vit.backbones.families.timm_beit import TIMM_BEIT
from peft_vit.backbones.families.timm_deit import TIMM_DEIT
from peft_vit.backbones.families.timm_eva import TIMM_EVA
from peft_vit.backbones.families.timm_hiera import TIMM_HIERA
from peft_vit.backbones.families.timm_naflexvit import TIMM_NAFLEXVIT
from peft_vit.backbones.families.timm_swin import TIMM_SWIN, TIMM_SWIN_V2
from peft_vit.backbones.families.timm_vit import TIMM_VIT

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
)

__all__ = ["FAMILIES", "Family"]
