"""Families of Vision Transformers: what differs from one class of models to the next, a module each."""

from peft_vit.backbones.families.family import Family
from peft_vit.backbones.families.timm_eva import TIMM_EVA
from peft_vit.backbones.families.timm_vit import TIMM_VIT

FAMILIES: tuple[Family, ...] = (TIMM_VIT, TIMM_EVA)

__all__ = ["FAMILIES", "Family"]
