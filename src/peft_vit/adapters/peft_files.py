"""Read and check the two files of a PEFT LoRA adapter; they may come from anybody.

What decides the outputs is taken, what has no influence on them is passed over, and anything else is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from torch import Tensor

from peft_vit.adapters.adapter_file import read_safetensors
from peft_vit.backbones import Site
from peft_vit.errors import UserError
from peft_vit.safe_io import read_bytes

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_FILE = "peft_vit.json"  # beside PEFT's two, which it ignores: what the adapter belongs to


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter whose tensors fit a model's modules."""

    updates: dict[str, tuple[Tensor, Tensor, float]]  # module -> A (r, in), B (out, r), scale: dW = scale * B A
    head: dict[str, Tensor]  # by the names of the model's parameters, head.weight; empty if the adapter brings none
    dropout: float  # that it was trained with


def read_peft(
    folder: Path, sites: Mapping[str, Site], head: Mapping[str, tuple[int, ...]], *, any_head: bool = False
) -> PeftAdapter:
    """Read an adapter and check it against a model's shapes.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        sites: of the model, by module, from `backbones.fused_sites`.
        head: shapes of the parameters of the model's head by their names, `head.weight`.
        any_head: take a head of any size.

    Raises:
        UserError: if a file can't be read or does not fit the model, or asks for anything but plain LoRA.
    """
    if not os.path.isdir(folder):  # unlike Path.is_dir, also False for an impossible name
        raise UserError("is no folder; give the one that PEFT's save_pretrained has written", file=folder)
    config = _read_config(folder / CONFIG_FILE)
    _read_base(folder / BASE_FILE)
    tensors = _read_tensors(folder / TENSORS_FILE)
    modules = [name for name in sites if any(f"{PREFIX}{name}.lora_{factor}.weight" in tensors for factor in "AB")]
    expected: dict[str, tuple[int, ...]] = {}
    saved = {f"{PREFIX}{name}": shape for name, shape in head.items()}
    if config.modules_to_save:
        _check_saved(config.modules_to_save, head, folder / CONFIG_FILE)
        own = {name: tuple(tensors[name].shape) for name in saved if name in tensors} if any_head else {}
        expected = {**saved, **own}
    for name in modules:
        expected[f"{PREFIX}{name}.lora_A.weight"] = (config.rank(name), sites[name].in_features)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (sites[name].out_features, config.rank(name))
    _check_tensors(tensors, expected, saved.keys(), folder / TENSORS_FILE)
    _check_targets(config, modules, folder / CONFIG_FILE)
    updates = {
        name: (tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"], config.scale(name))
        for name in modules
    }
    brought = {name.removeprefix(PREFIX): tensors[name] for name in saved if name in expected}
    return PeftAdapter(updates, brought, config.lora_dropout)


def peft_sha256(folder: Path) -> str:
    """Return the SHA-256 over adapter_config.json and adapter_model.safetensors, one after the other."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, TENSORS_FILE):
        try:
            digest.update(read_bytes(folder / name, None))
        except OSError as error:
            raise UserError(f"can't be read ({error.strerror})", file=folder / name) from None
    return digest.hexdigest()


def doubts_about(
    folder: Path, model: str, weights_name: str, weights_sha256: str | None, class_names: Sequence[str]
) -> list[str]:
    """Return sentences on what an adapter was trained on and a run is not, as far as its files tell.

    PEFT's files hold no hash of the base's weights; ours beside them, if this package wrote the adapter, do.
    """
    doubts = []
    named = _read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    if named and _architecture(str(named)) != _architecture(model):
        doubts.append(
            f"the adapter of {folder} names the base model {short(named)} and this run adapts {model}; PEFT's files "
            "can't tell whether the weights agree, and over others the adapter is worth nothing"
        )
    base = _read_base(folder / BASE_FILE)
    if "weights_sha256" in base and base["weights_sha256"] != weights_sha256:
        doubts.append(
            f"the adapter of {folder} was trained on {short(base.get('weights_name'))} "
            f"(SHA-256 {base['weights_sha256']}) and this run adapts {weights_name} (SHA-256 {weights_sha256}); "
            "over other weights the adapter is worth nothing"
        )
    if base.get("class_names") not in (None, list(class_names)):
        doubts.append(
            f"the adapter of {folder} was trained on the classes {short(base['class_names'])} and this run has "
            f"{short(list(class_names))}; its head starts from the others"
        )
    return doubts


def _read_base(file: Path) -> dict[str, Any]:
    """Return what `export_peft` has written of the base; nothing where PEFT has written the adapter."""
    base = _read_json(file) if os.path.lexists(file) else {}
    if not isinstance(base, dict):
        raise UserError("is not what `peft-vit export` writes; take it away", file=file)
    return base


def _architecture(name: str) -> str:
    """Return vit_small_patch14_dinov2 of timm/vit_small_patch14_dinov2.lvd142m."""
    return name.rstrip("/").rpartition("/")[2].partition(".")[0]


_ModuleName = Annotated[str, StringConstraints(pattern=r"^\^?[A-Za-z0-9_.]+$")]
_Positive = Annotated[float, Field(gt=0)]


class _LoraFile(BaseModel):
    """What of adapter_config.json decides the outputs; other fields are kept as extras, to be checked one by one.

    PEFT's patterns are regular expressions. Only names are taken: a foreign expression may take hours to match.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    target_modules: list[str] | str
    r: int = Field(ge=1)
    lora_alpha: _Positive
    rank_pattern: dict[_ModuleName, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[_ModuleName, _Positive] | None = None
    use_rslora: bool = False
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    modules_to_save: list[str] | None = None
    # Other starts of training also changed the base's weights, which are not in the file.
    init_lora_weights: Literal["gaussian", "orthogonal"] | bool | None = True

    def rank(self, module: str) -> int:
        """Return r of a module."""
        return int(_of_module(self.rank_pattern or {}, module, self.r))

    def scale(self, module: str) -> float:
        """Return the factor on B A: alpha / r, or alpha / sqrt(r) with rank-stabilized LoRA."""
        rank = self.rank(module)
        return _of_module(self.alpha_pattern or {}, module, self.lora_alpha) / (rank**0.5 if self.use_rslora else rank)


# Fields without influence on the outputs of a trained adapter: where it comes from, how its modules were found (the
# tensors say which they are), and settings of switches that are off.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
_OFF: tuple[Any, ...] = (None, False, "none", [], {})


def _read_config(file: Path) -> _LoraFile:
    try:
        config = _LoraFile.model_validate(_read_json(file))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = f"{first['msg']}, got {short(first['input'])}; only plain LoRA can be imported"
        raise UserError(problem, file=file, field=str(first["loc"][0]) if first["loc"] else None) from None
    for field, value in sorted((config.model_extra or {}).items()):
        if field not in _HARMLESS and value not in _OFF:
            raise UserError(
                f"{short(value)} changes what the adapter computes and is not supported; only plain LoRA is",
                file=file,
                field=short(field)[1:-1],
            )
    return config


def _read_json(file: Path) -> Any:
    try:
        return json.loads(read_bytes(file).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"is not a readable JSON file ({error}); expected PEFT's", file=file) from None


def _of_module(pattern: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first name that is the module's or, without ^, its end after a dot, as PEFT does."""
    for name, value in pattern.items():
        if module == name.removeprefix("^") or module.endswith(f".{name}"):
            return value
    return default


def _check_saved(modules: Sequence[str], head: Iterable[str], file: Path) -> None:
    """Refuse modules that were trained whole and are no head of the model."""
    known = {parameter.rpartition(".")[0] for parameter in head}
    for name in modules:
        if name not in known:
            problem = f"{short(name)} is no head of this model, which has {' and '.join(sorted(known))}"
            raise UserError(f"{problem}; only plain LoRA can be imported", file=file, field="modules_to_save")


def _check_targets(config: _LoraFile, modules: Sequence[str], file: Path) -> None:
    """Refuse a list of targets that leaves out a module with tensors: PEFT would drop them without a word."""
    if isinstance(config.target_modules, str):
        return  # a pattern; PEFT has saved what it hit
    for name in modules:
        if not any(name == target or name.endswith(f".{target}") for target in config.target_modules):
            raise UserError(f"does not name {name}, which has tensors; add it", file=file, field="target_modules")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not os.path.isfile(file):
        raise UserError(
            "does not exist; a .bin file is not read, since it may run code: save with safe_serialization=True",
            file=file,
        )
    return read_safetensors(file)[1]


def _check_tensors(
    tensors: dict[str, Tensor], expected: Mapping[str, tuple[int, ...]], head: Container[str], file: Path
) -> None:
    """Refuse tensors that are missing, left over, of another shape or no finite numbers; make the others float32."""
    for name in sorted(tensors.keys() - expected.keys()):
        raise UserError(
            f"this tensor has no place here by {CONFIG_FILE}; only LoRA on a block's qkv, proj, fc1, fc2 and a head "
            "that modules_to_save names can be imported",
            file=file,
            field=repr(name[:200]),
        )
    for name, shape in expected.items():
        if name not in tensors:
            problem = f"is missing, which {CONFIG_FILE} asks for; save the adapter with PEFT's save_pretrained"
            raise UserError(problem, file=file, field=name)
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            hint = "call model.reset_classifier" if name in head else f"is it of this model, and of this {CONFIG_FILE}?"
            problem = f"expected shape {shape}, got {tuple(tensor.shape)}; {hint}"
            raise UserError(problem, file=file, field=name)
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise UserError("holds values that are no finite numbers; save the adapter again", file=file, field=name)
        tensors[name] = tensor.float()
