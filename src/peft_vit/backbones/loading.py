"""Load a backbone: every weight from its source, a fresh head from the run's seed, nothing silent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_vit.backbones.architecture import Architecture
from peft_vit.backbones.backbone import Backbone, find_sites
from peft_vit.backbones.catalog import architecture_of, create_model, create_skeleton
from peft_vit.backbones.weights import Weights, read_weights
from peft_vit.config import BackboneConfig
from peft_vit.errors import UserError
from peft_vit.records import RunSpec
from peft_vit.seeding import torch_generator

_HEAD_INIT_STD = 0.02
_PATCH_WEIGHT = "patch_embed.proj.weight"
_RANDOM_BACKBONE_SEED = 0


@dataclass(frozen=True)
class LoadedBackbone:
    """A model ready to be adapted, and what a record must say of its weights."""

    backbone: Backbone  # its model on the CPU, float32, in training mode
    architecture: Architecture
    weights_name: str
    weights_sha256: str | None  # None: random weights
    random_weights: bool

    @property
    def model(self) -> nn.Module:
        """Return the model."""
        return self.backbone.model

    @property
    def mean(self) -> tuple[float, float, float]:
        """Return the RGB mean of the model's pretraining, for inputs in [0, 1]."""
        return self._pretrained("mean")

    @property
    def std(self) -> tuple[float, float, float]:
        """Return the RGB standard deviation likewise."""
        return self._pretrained("std")

    def _pretrained(self, field: str) -> tuple[float, float, float]:
        model: Any = self.model
        red, green, blue = model.pretrained_cfg[field]
        return red, green, blue


def load_backbone(
    config: BackboneConfig,
    *,
    image_size: int,
    num_classes: int,
    seed: int,
    smoke: bool = False,
    read: Callable[[BackboneConfig], Weights] = read_weights,
    architecture: Architecture | None = None,
    mapped: Sequence[str] | None = None,
) -> LoadedBackbone:
    """Build a Vision Transformer, load its weights and draw its head.

    The head is the library's own: a linear layer on the model's default pooling (the class token for most), with
    timm's initialisation: weights from N(0, 0.02^2), bias 0. It is drawn from the run's stream `head_init`,
    so all methods of one seed start from the same head.

    Random backbone weights are the library's initialisation under one fixed seed: they stand in for a pretrained
    backbone, which would not change with the run's seed either. The global generators are left as they were.

    timm's position embedding is resampled to the image size as timm does it (bicubic, antialiased). transformers
    resamples in the forward pass, without antialiasing, so its features of the same weights differ below the native
    size.

    Args:
        config: model and weights source.
        image_size: side of the square input, in pixels.
        num_classes: outputs of the head.
        seed: the run's seed; decides the head only.
        smoke: take random weights whatever the configuration says; nothing is downloaded or read.
        read: gets the weights of a configuration that names a source, say from where they were kept.
        architecture: what the model is built from, if that is known; by default what the configuration names.
        mapped: targets as `find_sites` takes them, whose weights are quantized next. Float32 ones out of a safetensors
            file stay there, mapped into memory: each takes memory from when it is first read until it is freed, as
            `QALoRATrainer` does layer by layer. None: all weights are copied, one at a time.

    Raises:
        UserError: if the model or image size does not suit, the weights can't be had, or any backbone tensor
            is missing, left over, of another shape or not finite.
    """
    architecture = architecture or architecture_of(config)
    random_weights = smoke or config.weights == "random"
    weights = None if random_weights else read(config)
    if weights is None:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            # Not torch.manual_seed: it would set the GPUs' generators as well.
            torch.default_generator.manual_seed(_RANDOM_BACKBONE_SEED)
            backbone = Backbone(create_model(architecture, image_size, num_classes))
    else:
        backbone = Backbone(create_skeleton(architecture, image_size, num_classes))
        in_file: set[str] = set()
        if mapped is not None:
            backbone.find_sites(None)  # counts tokens while a forward pass reads no weight
            in_file = {f"{site.module}.weight" for site in find_sites(backbone.model, mapped)}
        _load_strictly(backbone, weights, in_file)
    generator = torch_generator(seed, "head_init")
    for layer in backbone.heads.values():
        nn.init.trunc_normal_(layer.weight, std=_HEAD_INIT_STD, generator=generator)
        nn.init.zeros_(layer.bias)
    return LoadedBackbone(
        backbone=backbone,
        architecture=architecture,
        weights_name=weights.name if weights else f"random ({'smoke run' if smoke else 'as configured'})",
        weights_sha256=weights.sha256 if weights else None,
        random_weights=random_weights,
    )


def load_run_backbone(
    spec: RunSpec,
    num_classes: int,
    read: Callable[[BackboneConfig], Weights] = read_weights,
    *,
    mapped: Sequence[str] | None = None,
) -> LoadedBackbone:
    """Do as `load_backbone`, with what the model is and its seed out of a run's specification."""
    return load_backbone(
        spec.backbone,
        image_size=spec.data.image_size,
        num_classes=num_classes,
        seed=spec.seed,
        smoke=spec.smoke,
        read=read,
        mapped=mapped,
    )


def _load_strictly(backbone: Backbone, weights: Weights, mapped: Collection[str]) -> None:
    """Give a skeleton every backbone tensor and an empty head; the source's head, if it has one, is left aside."""
    model = backbone.model
    like = model.state_dict()
    own = [name for name in like if not backbone.is_of_head(name)]
    fitted = _fitted(backbone, weights)
    _refuse("lacks tensors that the model needs", set(own) - fitted.keys(), weights)
    _refuse("holds tensors that the model does not have", fitted.keys() - set(own), weights)
    _refuse("holds tensors of another shape", (n for n in own if like[n].shape != fitted[n].shape), weights)
    state = {name: torch.empty_like(like[name], device="cpu") for name in like if name not in mapped}
    not_finite = []
    for name in own:
        tensor = fitted.pop(name)  # its memory may be freed before the next one is read
        if not tensor.isfinite().all():
            not_finite.append(name)
        elif name not in mapped:
            state[name].copy_(tensor)
    _refuse("holds values that are not finite", not_finite, weights)
    if mapped:  # mapped anew, since the check has read them
        state |= {
            name: tensor.to(torch.float32).contiguous()
            for name, tensor in _fitted(backbone, weights).items()
            if name in mapped
        }
    model.load_state_dict(state, assign=True)


def _fitted(backbone: Backbone, weights: Weights) -> dict[str, Tensor]:
    """Return the source's tensors but the head's under the model's names, in the shapes for its image size."""
    model = backbone.model
    patches = weights.tensors.get(_PATCH_WEIGHT)
    if patches is not None and patches.shape != model.get_parameter(_PATCH_WEIGHT).shape:
        _refuse("holds tensors of another shape", [_PATCH_WEIGHT], weights)  # timm would resample it silently
    tensors = dict(weights.tensors)
    try:  # timm's filter renames other projects' tensors and resamples the position embedding
        fitted = backbone.family.fit_weights(tensors, model)
    except Exception as error:  # what a foreign file holds can fail in any way; the user needs one line
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(
            f"does not fit the model ({reason}); are these weights of this model?",
            file=weights.name,
            field="backbone.model",
        ) from None
    return {name: tensor for name, tensor in fitted.items() if not backbone.is_of_head(name)}


def _refuse(fault: str, names: Iterable[str], weights: Weights) -> None:
    """Raise if there are any names."""
    wrong = sorted(names)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{fault}: {', '.join(wrong[:3])}{more}; are these weights of this model?",
            file=weights.name,
            field="backbone.model",
        )
