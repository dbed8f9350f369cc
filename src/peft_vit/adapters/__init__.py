"""Low-rank adapters on sites: update, attaching, whether they act, resizing, merging, files."""

from peft_vit.adapters.acting import Effect, check_acting, effects
from peft_vit.adapters.adapted_linear import AdaptedLinear
from peft_vit.adapters.adapted_model import (
    Adapter,
    adapted_kinds,
    adapted_modules,
    adapted_sites,
    current_ranks,
    packed_weights,
    site_adapters,
    update_ranks,
    without_updates,
)
from peft_vit.adapters.adapter_file import (
    adapter_bytes,
    by_layer,
    load_trained,
    read_adapter_file,
    restore_trained,
    set_ranks,
    trained_tensors,
)
from peft_vit.adapters.attach import attach_adapters, check_stays, freeze_backbone
from peft_vit.adapters.low_rank import GradientProbe, SiteAdapter
from peft_vit.adapters.merging import merge_by_requantizing, merge_into_offsets, merged_state_dict
from peft_vit.adapters.peft_layers import peft_sites
from peft_vit.adapters.resizing import check_resizable, resize_adapters

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "Effect",
    "GradientProbe",
    "SiteAdapter",
    "adapted_kinds",
    "adapted_modules",
    "adapted_sites",
    "adapter_bytes",
    "attach_adapters",
    "by_layer",
    "check_acting",
    "check_resizable",
    "check_stays",
    "current_ranks",
    "effects",
    "freeze_backbone",
    "load_trained",
    "merge_by_requantizing",
    "merge_into_offsets",
    "merged_state_dict",
    "packed_weights",
    "peft_sites",
    "read_adapter_file",
    "resize_adapters",
    "restore_trained",
    "set_ranks",
    "site_adapters",
    "trained_tensors",
    "update_ranks",
    "without_updates",
]
