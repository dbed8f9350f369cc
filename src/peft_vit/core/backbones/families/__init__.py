"""Families of Vision Transformers: what differs from one class of models to the next."""

from timm.models.vision_transformer import ParallelThingsBlock
from torch import nn

from peft_vit.core.backbones.families.by_tokens import TIMM_OTHER
from peft_vit.core.backbones.families.family import Architecture, Family
from peft_vit.core.backbones.families.timm_families import TIMM_FAMILIES
from peft_vit.core.backbones.families.transformers_models import TRANSFORMERS_VISION

FAMILIES: tuple[Family, ...] = (*TIMM_FAMILIES, TRANSFORMERS_VISION)


def family_of(model: nn.Module) -> Family | None:
    """Return the family of a model; None: neither one of these nor of timm."""
    named = next((family for family in FAMILIES if isinstance(model, family.model_class)), None)
    if any(isinstance(block, ParallelThingsBlock) for block in getattr(model, "blocks", ())):
        named = None  # its blocks have several attentions
    # timm has built it, and it is not wrapped by something that hands its attributes out
    of_timm = "pretrained_cfg" in vars(model) and hasattr(model, "get_classifier")
    return TIMM_OTHER if named is None and of_timm else named


__all__ = ["FAMILIES", "Architecture", "Family", "family_of"]
