"""Pretrained Vision Transformers: which there are, their weights, the matrices that may carry an adapter."""

from peft_vit.backbones.attention import choose_attention
from peft_vit.backbones.catalog import MODELS, BackboneShape, ModelInfo, describe, native_size, patch_size_of
from peft_vit.backbones.loading import LoadedBackbone, load_backbone, load_run_backbone
from peft_vit.backbones.sites import Site, find_sites, fused_sites, tokens_per_image
from peft_vit.backbones.weights import Weights, check_weights, read_weights

__all__ = [
    "MODELS",
    "BackboneShape",
    "LoadedBackbone",
    "ModelInfo",
    "Site",
    "Weights",
    "check_weights",
    "choose_attention",
    "describe",
    "find_sites",
    "fused_sites",
    "load_backbone",
    "load_run_backbone",
    "native_size",
    "patch_size_of",
    "read_weights",
    "tokens_per_image",
]
