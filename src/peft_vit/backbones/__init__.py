"""Pretrained Vision Transformers: which there are, their weights, the matrices that may carry an adapter."""

from peft_vit.backbones.architecture import Architecture
from peft_vit.backbones.backbone import Backbone, choose_attention, find_sites, freeze_batch_norm
from peft_vit.backbones.catalog import (
    MODELS,
    BackboneShape,
    architecture_of,
    describe,
    interpolation_of,
    native_size,
    size_step_of,
)
from peft_vit.backbones.head import Head, fill_head, soften
from peft_vit.backbones.loading import LoadedBackbone, load_backbone, load_run_backbone
from peft_vit.backbones.replay import ReplayedPass, visit_blocks
from peft_vit.backbones.site import Site, chosen, fused_sites, whole_modules
from peft_vit.backbones.watching import evaluating, watching
from peft_vit.backbones.weights import Weights, check_weights, read_weights
