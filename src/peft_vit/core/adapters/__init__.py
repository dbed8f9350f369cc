"""Low-rank adapters on sites: update, attaching, whether they act, resizing, merging, files."""

from peft_vit.core.adapters.adapted_model import (
    AdaptedLinear,
    Adapter,
    adapted_modules,
    adapted_sites,
    current_ranks,
    float_matmul,
    merge_by_requantizing,
    merge_into_offsets,
    merged_state_dict,
    packed_weights,
    plain_model,
    save_memory,
    site_adapters,
    update_ranks,
    use_float_matmul,
    use_int8_matmul,
    without_updates,
)
from peft_vit.core.adapters.adapted_product import remember_sources
from peft_vit.core.adapters.adapter_file import (
    adapter_bytes,
    check_tensors,
    load_trained,
    read_adapter_file,
    restore_trained,
    set_ranks,
    trained_tensors,
)
from peft_vit.core.adapters.attach import (
    Effect,
    attach_adapters,
    check_adapters_match,
    check_gradients,
    effects,
    effects_of,
    freeze_backbone,
    store_in_bits,
)
from peft_vit.core.adapters.low_rank import GradientProbe, SiteAdapter
from peft_vit.core.adapters.peft_layers import peft_sites
from peft_vit.core.adapters.resizing import check_resizable, resize_adapters
