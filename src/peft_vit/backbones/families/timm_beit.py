"""timm's Beit: BEiT and BEiT v2, whose blocks hold relative position biases. They have a window per image size."""

from timm.models.beit import Beit, checkpoint_filter_fn

from peft_vit.backbones.families.family import Family
from peft_vit.backbones.families.timm_vit import row_layout, row_of_blocks

TIMM_BEIT = Family(Beit, row_layout, row_of_blocks, checkpoint_filter_fn)
