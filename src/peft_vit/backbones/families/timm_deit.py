"""timm's distilled DeiT: a VisionTransformer with a second token and a head on each, whose logits are averaged."""

from timm.models.deit import VisionTransformerDistilled

from peft_vit.backbones.families.family import Family
from peft_vit.backbones.families.timm_vit import TIMM_VIT

TIMM_DEIT = Family(VisionTransformerDistilled, TIMM_VIT.layout, TIMM_VIT.blocks, TIMM_VIT.fit_weights)
