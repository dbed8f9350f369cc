"""Pretrained Vision Transformers: which there are, their weights, the matrices that may carry an adapter."""

from peft_vit.core.backbones.backbone import (
    Backbone,
    Head,
    apply_temperature,
    choose_attention,
    fill_head,
    find_sites,
    freeze_batch_norm,
)
from peft_vit.core.backbones.catalog import (
    MODELS,
    BackboneShape,
    architecture_of,
    describe,
    interpolation_of,
    native_size,
    size_step_of,
    supports_head_blocks,
)
from peft_vit.core.backbones.families import Architecture
from peft_vit.core.backbones.passes import capturing_inputs, evaluating
from peft_vit.core.backbones.replay import ReplayedPass, visit_blocks
from peft_vit.core.backbones.site import Site, fused_sites, select_modules, select_sites
from peft_vit.core.backbones.weights import (
    LoadedBackbone,
    check_weights,
    default_weights_source,
    load_backbone,
    load_run_backbone,
    weights_licence,
)
