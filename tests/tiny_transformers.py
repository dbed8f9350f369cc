"""Small models of transformers, and folders as save_pretrained writes them: the files of hub models, without a hub."""

from pathlib import Path
from typing import Any

import torch
import transformers

_VIT = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_CONFIGS: dict[str, dict[str, Any]] = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _VIT,
    "dinov2_with_registers": {**_VIT, "num_register_tokens": 2},
    "dinov3_vit": {**_VIT, "num_register_tokens": 2},
    "clip": {"vision_config": _VIT},
    "clip_vision_model": _VIT,
    "siglip": {"vision_config": _VIT},
    "siglip_vision_model": _VIT,
    "siglip2": {"vision_config": {**_VIT, "num_patches": 16}},
    "siglip2_vision_model": {**_VIT, "num_patches": 16},
    "beit": _VIT,
    "swin": _SWIN,
    "swinv2": _SWIN,
}
TYPES = tuple(_CONFIGS)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def model_of(kind: str) -> Any:
    """Make a model of transformers with random values everywhere: with a head for 7 classes where there is a class."""
    config = transformers.AutoConfig.for_model(kind, **_CONFIGS[kind])
    config.num_labels = 7
    found = transformers.AutoModelForImageClassification._model_mapping.get(type(config), None)
    kinds = found if isinstance(found, tuple) else (found or transformers.AutoModel._model_mapping[type(config)],)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kinds[0]._from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def folder_of(kind: str, folder: Path) -> Any:
    """Write a model's folder, image processor included, and return the model."""
    model = model_of(kind)
    model.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=side, image_mean=MEAN, image_std=STD, resample=2).save_pretrained(folder)
    return model
