"""Vision models of transformers: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, SigLIP 2, BEiT, Swin and more.

Their configuration and weights come from the hub or a folder of `save_pretrained`. Their layers are found by a forward
pass, see `by_tokens`; query, key and value are layers of their own. Here the models map images to logits, as timm's do,
and are otherwise transformers': names, state dicts and configurations stay.

What a model is built from is kept as JSON, `{"config": ..., "images": ...}`: its config.json, and the mean, standard
deviation, size and resampling of its image processor. Models stay at their own image size; where images have another,
transformers resamples the position embedding in the forward pass, without antialiasing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_vit.base.errors import UserError, foreign_fault
from peft_vit.base.extras import require_extra
from peft_vit.base.files import read_bytes, sha256_of
from peft_vit.base.packages import HUB_TIMEOUT_S, ask_hub
from peft_vit.core.backbones.families.by_tokens import BY_TOKENS
from peft_vit.core.backbones.families.family import Architecture, Family
from peft_vit.core.config import BackboneConfig

CONFIG_FILE, IMAGES_FILE = "config.json", "preprocessor_config.json"
_WEIGHTS = {"model.safetensors"}
# Towers without a class for classification; they get a head of ours on their pooled output.
TOWERS = ("dinov3_vit", "clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_MOST_LAYERS = 1000  # a line of JSON can ask for any number, each of which takes memory
_FIELD = "backbone.model"
_NOT_OF_THE_MODEL = ("id2label", "label2id", "transformers_version", "_name_or_path", "dtype", "torch_dtype")


# --- models that map images to logits ---


class TransformersModel(nn.Module):
    """Mixin before a class of transformers whose outputs hold logits of a layer named `classifier`."""

    config: Any
    pretrained_cfg: dict[str, Any]  # as timm has it: input_size, mean, std, interpolation

    def get_classifier(self) -> nn.Module:
        """Return the head, as timm's models do."""
        return self.get_submodule("classifier")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of normalised images (B, 3, S, S)."""
        outputs: Any = super().forward(**inputs(self, images))
        return outputs.logits


class TowerClassifier(TransformersModel):
    """A vision tower of transformers, which has no head, with a linear layer on its pooled output.

    Args:
        tower: returns a `pooler_output` (B, width).
        num_classes: outputs of the head.
    """

    base_model_prefix = "tower"  # transformers' word, which PEFT asks for

    def __init__(self, tower: Any, num_classes: int) -> None:
        super().__init__()
        self.tower = tower
        self.config = tower.config
        self.classifier = nn.Linear(tower.config.hidden_size, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of normalised images (B, 3, S, S)."""
        pooled: Tensor = self.tower(**inputs(self, images)).pooler_output  # (B, width)
        return self.classifier(pooled)


def vision_config(config: Any) -> Any:
    """Return the configuration of a model's vision part."""
    return getattr(config, "vision_config", config)


def inputs(model: Any, images: Tensor) -> dict[str, Any]:
    """Return what a model of transformers takes for square images (B, 3, S, S), resampling positions if it has to."""
    config = vision_config(model.config)
    if config.model_type.startswith("siglip2"):  # takes patches of images of any shape, with their grid
        patch, (count, channels, side) = config.patch_size, images.shape[:3]
        grid = side // patch
        patches = images.reshape(count, channels, grid, patch, grid, patch).permute(0, 2, 4, 3, 5, 1)
        shapes = torch.full((count, 2), grid, device="cpu")  # whose values are looked at
        return {
            "pixel_values": patches.reshape(count, grid * grid, -1),  # (B, T, P * P * 3)
            "pixel_attention_mask": None,  # all count
            "spatial_shapes": shapes,
        }
    resampled = {} if images.shape[-1] == side_of(config) else {"interpolate_pos_encoding": True}
    return {"pixel_values": images, **resampled}


def side_of(config: Any) -> int:
    """Return the side of the images that a vision part has a position embedding for, in pixels."""
    if hasattr(config, "num_patches"):  # of SigLIP 2, which names the places of its grid
        return int(config.num_patches**0.5) * int(config.patch_size)
    size = getattr(config, "image_size", 224)
    return int(size if isinstance(size, int) else size[0])


def _size_step(model: Any) -> int:
    """Return the side of a patch; with stages of what becomes one token of the last one."""
    config = vision_config(model.config)
    patch = getattr(config, "patch_size", 1)
    patch = patch if isinstance(patch, int) else patch[0]
    return int(patch * 2 ** (len(getattr(config, "depths", [1])) - 1))


# --- what a model is built from ---


def require_transformers() -> Any:
    """Return the library.

    Raises:
        UserError: if it is not installed.
    """
    require_extra("transformers", field="backbone.library")
    import transformers

    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing progress, and reports that a head does not fit, which is always left aside."""
    log = require_transformers().utils.logging
    level, shown = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if shown:
            log.enable_progress_bar()


def read_config(backbone: BackboneConfig) -> tuple[str, str | None]:
    """Return what a model is built from, and the SHA-256 of its two files of JSON; None: a type of models has no files.

    Files of the hub are downloaded if they are not cached.

    Raises:
        UserError: if they can't be loaded, or the model is none that classifies images.
    """
    transformers = require_transformers()
    folder = _folder(backbone, weights=False)
    images: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}  # of random weights
    files = []
    if folder is None:  # a type of models, at transformers' default size
        config = transformers.AutoConfig.for_model(backbone.model)
    else:
        files = [file for name in (CONFIG_FILE, IMAGES_FILE) if (file := folder / name).is_file()]
        if not (folder / CONFIG_FILE).is_file():
            raise _bad(f"holds no {CONFIG_FILE}; name a folder that save_pretrained wrote", folder)
        with foreign_fault("is not the configuration of a model", folder / CONFIG_FILE, field=_FIELD):
            refuse_own_code(folder / CONFIG_FILE)
            config = transformers.AutoConfig.from_pretrained(folder / CONFIG_FILE, trust_remote_code=False)
        if (folder / IMAGES_FILE).is_file():
            with foreign_fault("is not an image processor with mean and std", folder / IMAGES_FILE, field=_FIELD):
                refuse_own_code(folder / IMAGES_FILE)
                # The file, not its folder: others there would go before it, and no hash covers them.
                processor = transformers.AutoImageProcessor.from_pretrained(
                    folder / IMAGES_FILE, config=config, trust_remote_code=False
                )
                images = _images_of(processor.to_dict())
        elif backbone.weights != "random":
            message = f"holds no {IMAGES_FILE}, which says mean and std of images; save the image processor there"
            raise _bad(message, folder)
    _class_of(config)
    if (channels := getattr(vision_config(config), "num_channels", 3)) != 3:
        raise _bad(f"takes images of {channels} channels; expected a model of the three of RGB")
    plain = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    text = json.dumps({"config": plain, "images": images}, sort_keys=True, default=str)
    return text, _sha256_of_all(files) if files else None


def refuse_own_code(file: Path) -> None:
    """Refuse a file of JSON that names Python code for its model; raises what goes wrong where it can't be read."""
    if "auto_map" in json.loads(read_bytes(file)):
        raise _bad("names Python code of its own (auto_map), which is never run; choose a model of transformers", file)


def _images_of(processor: dict[str, Any]) -> dict[str, Any]:
    size = processor.get("crop_size") or processor.get("size") or {}
    side = size.get("height") or size.get("shortest_edge")
    return {
        "mean": [float(value) for value in processor["image_mean"]],
        "std": [float(value) for value in processor["image_std"]],
        "interpolation": _RESAMPLING.get(int(processor.get("resample", 3)), "bicubic"),
        **({} if side is None else {"side": int(side)}),
    }


def _class_of(config: Any) -> Any:
    """Return transformers' class for a configuration, a tower or one that classifies."""
    transformers = require_transformers()
    if config.model_type in TOWERS:
        return transformers.AutoModel._model_mapping[type(config)]
    known = transformers.AutoModelForImageClassification._model_mapping
    if type(config) not in known:
        raise _bad(
            f"{config.model_type} is not a Vision Transformer: transformers has no class of it that classifies images"
        )
    kind = known[type(config)]
    return kind[0] if isinstance(kind, tuple) else kind


@functools.cache
def _returning_logits(kind: type[nn.Module]) -> Any:
    """Return a class of transformers whose forward pass maps images to logits; it keeps its name."""
    return type(kind.__name__, (TransformersModel, kind), {"__module__": kind.__module__})


def build(architecture: Architecture, image_size: int, num_classes: int) -> nn.Module:
    """Build a model with a fresh head, as transformers initialises it.

    Args:
        architecture: of transformers.
        image_size: side of the square input, in pixels; the model keeps its own position embedding.
        num_classes: outputs of the head.
    """
    config, images = _parsed(architecture)
    vision = vision_config(config)
    config.num_labels = num_classes
    # Else values would be drawn from the global generator in training, and no two runs were the same.
    for part in (config, vision):
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
            elif name in ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"):  # DINOv3's positions
                setattr(part, name, None)
    kind = _class_of(config)
    model: Any
    if config.model_type in TOWERS:
        model = TowerClassifier(kind._from_config(config), num_classes)
    else:
        model = _returning_logits(kind)._from_config(config)
    native = images.get("side") or side_of(vision_config(model.config))
    cfg = {"mean": tuple(images["mean"]), "std": tuple(images["std"]), "interpolation": images["interpolation"]}
    model.default_cfg = {**cfg, "input_size": (3, native, native)}  # others than RGB are refused
    model.pretrained_cfg = {**cfg, "input_size": (3, image_size, image_size)}
    return model


def native_size(architecture: Architecture) -> int:
    """Return the side of the images that a model was made for, in pixels: its image processor's, or its own."""
    with foreign_fault(f"this version of transformers can't build {architecture.name}", field=_FIELD):
        with torch.device("meta"):
            model: Any = build(architecture, 0, 1)
        return int(model.default_cfg["input_size"][1])


def _parsed(architecture: Architecture) -> tuple[Any, dict[str, Any]]:
    # What another version of transformers has written, say.
    with foreign_fault(f"this version of transformers can't build {architecture.name}", field=_FIELD):
        content = json.loads(architecture.config or "{}")
        plain = dict(content["config"])
        config = require_transformers().AutoConfig.for_model(plain.pop("model_type"), **plain)
        vision = vision_config(config)
        if sum(getattr(vision, "depths", ())) + getattr(vision, "num_hidden_layers", 0) > _MOST_LAYERS:
            raise _bad(f"{architecture.name} has more than {_MOST_LAYERS} layers; choose a model of fewer")
        config._attn_implementation = None  # transformers' own; of a name on the hub code would be fetched and run
        return config, content["images"]


# --- weights ---


def read_weights(backbone: BackboneConfig) -> tuple[str, str, dict[str, torch.Tensor]]:
    """Return what the weights are called, their SHA-256, and all tensors but the head's under the model's own names.

    transformers reads the files, and renames what older versions of it have written. What a checkpoint has besides, a
    head or a text tower, is left aside.

    Raises:
        UserError: as `weight_files`, and if the file can't be read or lacks a tensor.
    """
    files, sha256 = weight_files(backbone)
    folder = files[0].parent
    source = f"hub {backbone.model}" if backbone.weights == "hub" else f"folder {folder.name}"
    architecture = Architecture("transformers", backbone.model, *read_config(backbone))
    with foreign_fault(f"can't be read as weights of {backbone.model}", folder, field=_FIELD):
        whole = [file for file in files if file.name in _WEIGHTS]  # others beside it are the same in lower precision
        stored = {name: tensor for file in whole or files for name, tensor in load_file(file).items()}
        tensors, lacking = named_as_built(architecture, stored, num_classes=1)
    if wrong := sorted(name for name in lacking if not name.startswith("classifier")):
        raise _bad(f"lacks tensors that the model needs, or in this shape: {', '.join(wrong[:3])}", folder)
    return source, sha256, {name: value for name, value in tensors.items() if not name.startswith("classifier")}


def named_as_built(
    architecture: Architecture, tensors: dict[str, Tensor], num_classes: int
) -> tuple[dict[str, Tensor], set[str]]:
    """Return what files hold under the names of the model that `build` returns, and which of these they lack.

    transformers renames what older versions of it have written. It gets tensors, since in their folder it would read
    more than them: adapters, and whatever files config.json names.
    """
    config, _ = _parsed(architecture)
    config.num_labels = num_classes
    with quiet():
        model, loading = _class_of(config).from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, ignore_mismatched_sizes=True,
            output_loading_info=True,
        )  # fmt: skip
    prefix = "tower." if config.model_type in TOWERS else ""
    lacking = (*loading["missing_keys"], *loading["mismatched_keys"])
    names = {f"{prefix}{name if isinstance(name, str) else name[0]}" for name in lacking}
    return {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}, names


def weight_files(backbone: BackboneConfig) -> tuple[list[Path], str]:
    """Return the files of the weights and their SHA-256; downloads them if they are not cached.

    Raises:
        UserError: if they can't be loaded, or have another hash than the configuration says.
    """
    folder = _folder(backbone, weights=True)
    if folder is None:
        raise _bad(f"{backbone.model} is a type of models, which has random weights alone; use weights: random")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise _bad("holds no model.safetensors; save the model with save_pretrained", folder)
    sha256 = _sha256_of_all(files)
    check_hash(backbone, folder, sha256)
    return files, sha256


def check_hash(backbone: BackboneConfig, file: Path, sha256: str) -> None:
    """Raise UserError if weights have another hash than the configuration says."""
    if backbone.sha256 not in (None, sha256):
        raise UserError(
            f"the weights have SHA-256 {sha256}, the configuration expects {backbone.sha256}; get the right ones or "
            "correct the hash",
            file=file,
            field="backbone.sha256",
        )


def _sha256_of_all(files: list[Path]) -> str:
    """Return the SHA-256 of a file; of several that of their SHA-256 one after the other."""
    hashes = [sha256_of(file) for file in files]
    return hashes[0] if len(files) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _folder(backbone: BackboneConfig, *, weights: bool) -> Path | None:
    """Return the folder with a model's files, in the hub's cache or as named; None: the name is a type of models."""
    folder = Path(os.path.expanduser(backbone.model))
    if os.path.isdir(folder):
        if backbone.weights == "hub":
            raise _bad("is a folder; its weights come from its file, not from the hub", folder)
        return folder
    if backbone.weights == "random" and backbone.model in require_transformers().CONFIG_MAPPING:
        return None
    if backbone.weights == "file" or backbone.model.startswith(("/", "~", "./", "../")):
        raise _bad("is not a folder; name one that save_pretrained wrote, or a name on the hub", folder)
    return _from_hub(backbone.model, weights=weights)


def _from_hub(repository: str, *, weights: bool) -> Path:
    """Return the cached folder of a repository, downloading what it lacks; the hub is asked once before that."""
    patterns = ["*.json", *(["model*.safetensors"] if weights else [])]
    get = functools.partial(huggingface_hub.snapshot_download, repository, allow_patterns=patterns)
    try:
        cached = Path(get(local_files_only=True))
        needed = {CONFIG_FILE, IMAGES_FILE}  # others may have put a part of it there, or broken off
        if weights:
            index = cached / "model.safetensors.index.json"  # of weights in several files
            needed |= set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else _WEIGHTS
        if all((cached / name).is_file() for name in needed):
            return cached
    except Exception:
        pass
    with foreign_fault(
        f"could not get {repository} from the hub",
        remedy="check name and network, or name a folder that save_pretrained wrote",
        field=_FIELD,
    ):
        ask_hub(huggingface_hub.hf_hub_url(repository, CONFIG_FILE))
        return Path(get(etag_timeout=HUB_TIMEOUT_S))


def _bad(reason: str, file: Path | None = None) -> UserError:
    return UserError(reason, file=file, field=_FIELD)


TRANSFORMERS_VISION = Family(
    TransformersModel, fit_weights=lambda tensors, _: tensors, size_step=_size_step, **BY_TOKENS
)
