"""A trained model as a folder that timm or transformers loads without this package; low-bit weights become floats."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from peft_vit.backbones.families.transformers_models import TowerClassifier, inputs, quiet, vision_config
from peft_vit.deployment.merging import with_float_weights
from peft_vit.deployment.model_card import ModelCard
from peft_vit.errors import UserError, os_fault

HEAD_FILE = "head.safetensors"  # of a tower of transformers: classifier.weight and classifier.bias


def save_pretrained(model: nn.Module, folder: Path, card: ModelCard) -> None:
    """Write a model's files: config.json, model.safetensors; of transformers preprocessor_config.json, too.

    timm loads them with `create_model("local-dir:FOLDER", pretrained=True)`, transformers with
    `AutoModelForImageClassification.from_pretrained(FOLDER)`. A tower, which transformers has no class with a head for,
    is loaded with `AutoModel`, and its head lies beside it in head.safetensors.

    Args:
        model: merged; stays as it is.
        folder: created; must be empty.
        card: names the model, its classes and its images.

    Raises:
        UserError: if the folder holds files, or can't be written to.
    """
    plain: Any = with_float_weights(model, card)
    with os_fault("can't be written to", folder, remedy="choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError("holds files already; choose another folder", file=folder, field="--output")
        if card.library == "timm":
            save_for_hf(
                plain,
                str(folder),
                model_config={"label_names": list(card.class_names)},
                safe_serialization=True,
                data_config={
                    "input_size": (3, card.image_size, card.image_size),
                    "mean": card.mean,
                    "std": card.std,
                    "interpolation": card.interpolation,
                    "crop_pct": 1.0,
                    "crop_mode": "squash",
                },
            )
        else:
            with quiet():
                _save_transformers(plain, folder, card)


def _save_transformers(model: Any, folder: Path, card: ModelCard) -> None:
    import transformers

    names = dict(enumerate(card.class_names))
    if isinstance(model, TowerClassifier):
        model.tower.save_pretrained(folder)
        save_file({name: one.contiguous() for name, one in model.classifier.state_dict().items()}, folder / HEAD_FILE)
    else:
        model.config.id2label = names
        model.config.label2id = {name: number for number, name in names.items()}
        model.save_pretrained(folder)
    said: dict[str, Any] = {
        "image_mean": list(card.mean),
        "image_std": list(card.std),
        "resample": int(Image.Resampling[card.interpolation.upper()]),
    }
    config = vision_config(model.config)
    if config.model_type.startswith("siglip2"):
        said |= {"patch_size": config.patch_size, "max_num_patches": (card.image_size // config.patch_size) ** 2}
        processor: Any = transformers.Siglip2ImageProcessor(**said)
    else:
        processor = transformers.ViTImageProcessor(size={"height": card.image_size, "width": card.image_size}, **said)
    processor.save_pretrained(folder)


def load_pretrained(folder: Path, card: ModelCard) -> nn.Module:
    """Return what timm or transformers makes of a folder that `save_pretrained` has written: images to logits."""
    if card.library == "timm":
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return model.eval()
    import transformers

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (folder / HEAD_FILE).is_file():
            tower = transformers.AutoModel.from_pretrained(folder)
            whole = TowerClassifier(tower, len(card.class_names))
            whole.classifier.load_state_dict(load_file(folder / HEAD_FILE))
            return whole.eval()
        return _Logits(transformers.AutoModelForImageClassification.from_pretrained(folder)).eval()


class _Logits(nn.Module):
    """A model of transformers as it is loaded there, that maps images to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> torch.Tensor:
        return self.model(**inputs(self.model, images)).logits
