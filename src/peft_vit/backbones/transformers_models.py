"""Models of the transformers library: their configuration and weights, from the hub or a folder of `save_pretrained`.

What a model is built from is kept as JSON, `{"config": ..., "images": ...}`: its config.json, and the mean, standard
deviation, size and resampling of its image processor. Models stay at their own image size; where images have another,
transformers resamples the position embedding in the forward pass, without antialiasing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import nn

from peft_vit.backbones.architecture import Architecture
from peft_vit.backbones.families.transformers_vision import TowerClassifier, TransformersModel, side_of, vision_config
from peft_vit.config import BackboneConfig
from peft_vit.errors import UserError, first_line
from peft_vit.extras import require_extra
from peft_vit.packages import HUB_TIMEOUT_S, ask_hub
from peft_vit.safe_io import sha256_of

CONFIG_FILE, IMAGES_FILE = "config.json", "preprocessor_config.json"
# Towers without a class for classification; they get a head of ours on their pooled output.
TOWERS = ("dinov3_vit", "clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_PLAIN_IMAGES = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}  # of random weights
_NOT_OF_THE_MODEL = ("id2label", "label2id", "transformers_version", "_name_or_path", "dtype", "torch_dtype")


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
    said = require_transformers().utils.logging
    level, shown = said.get_verbosity(), said.is_progress_bar_enabled()
    said.set_verbosity_error()
    said.disable_progress_bar()
    try:
        yield
    finally:
        said.set_verbosity(level)
        if shown:
            said.enable_progress_bar()


def read_config(backbone: BackboneConfig) -> tuple[str, str | None]:
    """Return what a model is built from, and the SHA-256 of its two files of JSON; None: a type of models has no files.

    Files of the hub are downloaded if they are not cached.

    Raises:
        UserError: if they can't be had, or the model is none that classifies images.
    """
    transformers = require_transformers()
    folder = _folder(backbone, weights=False)
    if folder is None:  # a type of models, at transformers' default size
        return _as_json(transformers.AutoConfig.for_model(backbone.model), dict(_PLAIN_IMAGES)), None
    if not (folder / CONFIG_FILE).is_file():
        raise _bad(f"holds no {CONFIG_FILE}; name a folder that save_pretrained has written", folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # a foreign file can fail in any way; the user needs one line
        raise _bad(f"is no configuration of a model ({first_line(error)})", folder / CONFIG_FILE) from None
    if (folder / IMAGES_FILE).is_file():
        images = _read_images(folder)
    elif backbone.weights == "random":
        images = dict(_PLAIN_IMAGES)
    else:
        raise _bad(f"holds no {IMAGES_FILE}, which says mean and std of images; save the image processor there", folder)
    files = [file for name in (CONFIG_FILE, IMAGES_FILE) if (file := folder / name).is_file()]
    return _as_json(config, images), _sha256_of_all(files)


def _read_images(folder: Path) -> dict[str, Any]:
    try:
        processor = require_transformers().AutoImageProcessor.from_pretrained(folder).to_dict()
        size = processor.get("crop_size") or processor.get("size") or {}
        side = size.get("height") or size.get("shortest_edge")
        return {
            "mean": [float(value) for value in processor["image_mean"]],
            "std": [float(value) for value in processor["image_std"]],
            "interpolation": _RESAMPLING.get(int(processor.get("resample", 3)), "bicubic"),
            **({} if side is None else {"side": int(side)}),
        }
    except Exception as error:  # as above
        raise _bad(f"is no image processor with mean and std ({first_line(error)})", folder / IMAGES_FILE) from None


def _as_json(config: Any, images: dict[str, Any]) -> str:
    _class_of(config)
    channels = getattr(vision_config(config), "num_channels", 3)
    if channels != 3:
        raise _bad(f"takes images of {channels} channels; expected a model of the three of RGB")
    plain = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    return json.dumps({"config": plain, "images": images}, sort_keys=True, default=str)


def _class_of(config: Any) -> Any:
    """Return transformers' class for a configuration, a tower or one that classifies."""
    transformers = require_transformers()
    if config.model_type in TOWERS:
        return transformers.AutoModel._model_mapping[type(config)]
    known = transformers.AutoModelForImageClassification._model_mapping
    if type(config) not in known:
        raise UserError(
            f"{config.model_type} is no Vision Transformer: transformers has no class of it that classifies images",
            field="backbone.model",
        )
    found = known[type(config)]
    return found[0] if isinstance(found, tuple) else found


@functools.cache
def _returning_logits(kind: type[nn.Module]) -> Any:
    """Return a class of transformers whose forward pass maps images to logits; it keeps its name."""
    return type(kind.__name__, (TransformersModel, kind), {"__module__": kind.__module__})


def build(architecture: Architecture, image_size: int, num_classes: int, *, shallow: bool = False) -> nn.Module:
    """Build a model with a fresh head, as transformers initialises it.

    Args:
        architecture: of transformers.
        image_size: side of the square input, in pixels; the model keeps its own position embedding.
        num_classes: outputs of the head.
        shallow: with two layers a stage.
    """
    config, images = _parsed(architecture)
    vision = vision_config(config)
    config.num_labels = num_classes
    for part in (
        config,
        vision,
    ):  # what would be drawn from the global generator in training: no two runs were the same
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
            elif name in ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"):  # DINOv3's positions
                setattr(part, name, None)
    if shallow and hasattr(vision, "depths"):
        vision.depths = [2] * len(vision.depths)
    elif shallow:
        vision.num_hidden_layers = 2
    kind = _class_of(config)
    model: Any
    if config.model_type in TOWERS:
        model = TowerClassifier(kind._from_config(config), num_classes)
    else:
        model = _returning_logits(kind)._from_config(config)
    vision = vision_config(model.config)
    native = images.get("side") or side_of(vision)
    cfg = {"mean": tuple(images["mean"]), "std": tuple(images["std"]), "interpolation": images["interpolation"]}
    channels = getattr(vision, "num_channels", 3)
    model.default_cfg = {**cfg, "input_size": (channels, native, native)}
    model.pretrained_cfg = {**cfg, "input_size": (channels, image_size, image_size)}
    return model


def native_size(architecture: Architecture) -> int:
    """Return the side of the images that a model was made for, in pixels: its image processor's, or its own."""
    with torch.device("meta"):
        model: Any = build(architecture, 0, 1)
    return int(model.default_cfg["input_size"][1])


def _parsed(architecture: Architecture) -> tuple[Any, dict[str, Any]]:
    said = json.loads(architecture.config or "{}")
    try:
        plain = dict(said["config"])
        return require_transformers().AutoConfig.for_model(plain.pop("model_type"), **plain), said["images"]
    except Exception as error:  # written by another version of transformers, say
        raise UserError(
            f"this version of transformers can't build {architecture.name} ({first_line(error)})",
            field="backbone.model",
        ) from None


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
    config, _ = _parsed(architecture)
    kind = _class_of(config)
    try:
        with quiet():
            model, found = kind.from_pretrained(
                folder, config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # a foreign file can fail in any way; the user needs one line
        raise _bad(f"can't be read as weights of {backbone.model} ({first_line(error)})", folder) from None
    prefix = "tower." if config.model_type in TOWERS else ""
    wrong = {name if isinstance(name, str) else name[0] for name in (*found["missing_keys"], *found["mismatched_keys"])}
    wrong = {name for name in wrong if prefix or not name.startswith("classifier")}
    if wrong:
        some = ", ".join(sorted(wrong)[:3])
        raise _bad(f"lacks tensors that the model needs, or in this shape: {some}", folder)
    tensors = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    return source, sha256, {name: one for name, one in tensors.items() if not name.startswith("classifier")}


def weight_files(backbone: BackboneConfig) -> tuple[list[Path], str]:
    """Return the files of the weights and their SHA-256; downloads them if they are not cached.

    Raises:
        UserError: if they can't be had, or have another hash than the configuration says.
    """
    folder = _folder(backbone, weights=True)
    if folder is None:
        raise _bad(f"{backbone.model} is a type of models and has no weights; use weights: random")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise _bad("holds no model.safetensors; save the model with save_pretrained", folder)
    sha256 = _sha256_of_all(files)
    if backbone.sha256 not in (None, sha256):
        raise UserError(
            f"the weights have SHA-256 {sha256}, the configuration expects {backbone.sha256}; get the right ones or "
            "correct the hash",
            file=folder,
            field="backbone.sha256",
        )
    return files, sha256


def _sha256_of_all(files: Sequence[Path]) -> str:
    """Return the SHA-256 of a file; of several that of their SHA-256 one after the other."""
    hashes = [sha256_of(file) for file in files]
    return hashes[0] if len(files) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _folder(backbone: BackboneConfig, *, weights: bool) -> Path | None:
    """Return the folder with a model's files, in the hub's cache or as named; None: the name is a type of models."""
    folder = Path(os.path.expanduser(backbone.model))
    if os.path.isdir(folder):
        if backbone.weights == "hub":
            raise _bad("is a folder; its weights are weights: file", folder)
        return folder
    if backbone.weights == "file":
        raise _bad("is no folder; name one that save_pretrained has written, or use weights: hub", folder)
    if backbone.weights == "random" and backbone.model in require_transformers().CONFIG_MAPPING:
        return None
    if backbone.model.startswith(("/", "~", "./", "../")):
        raise _bad("is no folder; name one that save_pretrained has written, or a name on the hub", folder)
    return _from_hub(backbone.model, weights=weights)


def _from_hub(repository: str, *, weights: bool) -> Path:
    """Return the cached folder of a repository, downloading what it lacks; the hub is asked once before that."""
    patterns = ["*.json", *(["model*.safetensors"] if weights else [])]
    try:
        cached = Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
    except Exception:
        cached = None  # nothing of it is there
    if cached is not None and _is_whole(cached, weights=weights):
        return cached
    try:
        url = huggingface_hub.hf_hub_url(repository, CONFIG_FILE)
        ask_hub(url)
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, etag_timeout=HUB_TIMEOUT_S))
    except Exception as error:  # the client's errors differ by version; each means that there are no files
        raise _bad(
            f"could not get {repository} from the hub ({first_line(error)}); check name and network, or name a folder "
            "of save_pretrained and use weights: file"
        ) from None


def _is_whole(folder: Path, *, weights: bool) -> bool:
    """Tell whether a cached folder has all that is read; others may have put a part of it there, or broken off."""
    needed = {CONFIG_FILE, IMAGES_FILE}
    if weights:
        index = folder / "model.safetensors.index.json"  # of weights in several files
        parts = json.loads(index.read_bytes())["weight_map"].values() if index.is_file() else ["model.safetensors"]
        needed.update(parts)
    return all((folder / name).is_file() for name in needed)


def _bad(problem: str, file: Path | None = None) -> UserError:
    return UserError(problem, file=file, field="backbone.model")
