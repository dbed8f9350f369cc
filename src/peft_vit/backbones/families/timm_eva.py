"""timm's Eva: EVA-02, DINOv3, PE, RoPE-ViT and other Vision Transformers with rotary position embeddings.

Blocks stand in one row as in VisionTransformer. Query, key and value are fused or three modules, and MLPs may be gated.
"""

from timm.models.eva import Eva, checkpoint_filter_fn

from peft_vit.backbones.families.family import Family
from peft_vit.backbones.families.timm_vit import row_layout, row_of_blocks

TIMM_EVA = Family(Eva, row_layout, row_of_blocks, checkpoint_filter_fn)
