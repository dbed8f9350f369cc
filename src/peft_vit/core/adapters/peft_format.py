"""To and from the PEFT library's LoRA files, for models of timm.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``; PEFT's update of a module is
``alpha / r * B A`` (arXiv 2106.09685, eq. 3; ``alpha / sqrt(r)`` with ``use_rslora``, arXiv 2312.03732).

Export. timm holds query, key and value in one matrix of 3 D rows, PEFT has one LoRA per module. Adapters on slices of
the rows become one of rank r = r_q + r_k + r_v, whose A is their A stacked and whose B is block-diagonal::

    A = [A_q; A_k; A_v]  (r, D)        B = diag(B_q, B_k, B_v)  (3 D, r)

``alpha = scale * r`` is written per module, so the scale is ours whatever the ranks. The svd form's lambda goes into B.
Layers that PEFT itself has put into the model are written the same way, its AdaLoRA as LoRA: E goes into B, and masked
triplets are left out.

Import. PEFT's LoRA on the fused matrix becomes one adapter on all its rows, a site of the name ``blocks.3.attn.qkv``.
Three sites would need three copies of A, which training would pull apart: another model than the one imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from safetensors.torch import save
from torch import Tensor, nn

from peft_vit.base.errors import SilentNoEffectWarning, UserError, os_fault
from peft_vit.base.files import into_empty, read_bytes, write_atomically
from peft_vit.core.adapters.adapted_model import AdaptedLinear, adapted_modules, site_adapters
from peft_vit.core.adapters.adapter_file import read_adapter_file, read_safetensors, trained_tensors
from peft_vit.core.adapters.attach import attach_adapters
from peft_vit.core.adapters.peft_layers import PREFIX, check_plain, is_plain, peft_factors, peft_layers, tuner_layers
from peft_vit.core.adapters.peft_tuner import tuner_export
from peft_vit.core.backbones import Backbone, Site, find_sites, fused_sites
from peft_vit.core.backbones.head_blocks import reads_last_blocks
from peft_vit.core.config import CARD_FILE, PEFT_FILE

CONFIG_FILE = PEFT_FILE
TENSORS_FILE = "adapter_model.safetensors"
BASE_FILE = CARD_FILE  # beside PEFT's two, which it ignores: what the adapter belongs to
_NO_MODULE = "dummy-target-modules"  # PEFT's name for "adapt nothing"


# --- export ---------------------------------------------------------------------------------------------------------


def export_peft(model: nn.Module, folder: Path, base: Mapping[str, Any]) -> None:
    """Write a model's adapters and head so that `PeftModel.from_pretrained(plain timm model, folder)` loads them.

    Args:
        model: carries adapters over float weights, or only a trained head.
        folder: created; must be empty.
        base: what the adapter belongs to, written to peft_vit.json. PEFT loads an adapter over any weights of the
            same shape without a word, so name the right ones here, with their hash.

    Raises:
        UserError: if the model was trained in a way that PEFT's LoRA can't express, or the folder holds files.

    Warns:
        SilentNoEffectWarning: if PEFT's layers have no effect in such a model as timm builds it.
    """
    if reads_last_blocks(model):
        raise UserError(
            "PEFT can't load a head that reads several blocks (backbone.head_blocks); use --format safetensors, onnx "
            "or openvino"
        )
    head = named_head_parameters(model)
    if Backbone(model).prepare():
        _warn(
            "timm adds this model's bias of query, key and value past PEFT's layers: set qkv_bias_separate = True on "
            "each block's attn before PEFT loads the adapter, or it has no effect there"
        )
    plain = all(is_plain(layer) for layer in tuner_layers(model).values())
    config, tensors = _as_lora(model) if plain else tuner_export(model)
    config["modules_to_save"] = list(Backbone(model).heads)
    tensors |= {f"{PREFIX}{name}": parameter for name, parameter in head.items()}
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    with into_empty(folder):
        write_atomically(folder / BASE_FILE, (json.dumps(base, indent=2) + "\n").encode())
        write_atomically(folder / TENSORS_FILE, save(tensors, metadata={"format": "pt"}))
        # Last: without it PEFT sees no adapter.
        write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def _as_lora(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the content of adapter_config.json, and the tensors of the adapters by PEFT's names."""
    adapted, by_peft = dict(adapted_modules(model)), peft_layers(model)
    for name, module in adapted.items():
        if module.quantized is not None or module.pool != 1:
            raise UserError(
                f"the adapter of {name} belongs to a quantized weight and PEFT would add it to the float one, "
                "which is another model; merged_state_dict(model) gives its weights"
            )
    for name, layer in by_peft.items():
        check_plain(name, layer)
    saved = tuple(f"{module}." for module in (*Backbone(model).heads, *adapted, *by_peft))
    if others := [name for name in trained_tensors(model) if not name.startswith(saved)]:
        message = f"{others[0]} was trained too, and a PEFT adapter holds only adapters and head; save the weights"
        raise UserError(message)
    updates = {name: _fused_factors(module) for name, module in adapted.items()}
    updates |= {name: peft_factors(layer) for name, layer in by_peft.items()}
    updates = {name: update for name, update in updates.items() if len(update[0])}  # PEFT knows no rank 0
    tensors: dict[str, Tensor] = {}
    for name, (lora_A, lora_B, _) in updates.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": lora_A, f"{PREFIX}{name}.lora_B.weight": lora_B}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": list(updates) or _NO_MODULE,  # full names: the suffix `proj` would hit patch_embed.proj too
        "r": 1,
        "lora_alpha": 1,
        "rank_pattern": {name: len(lora_A) for name, (lora_A, _, _) in updates.items()},
        "alpha_pattern": {name: scale * len(lora_A) for name, (lora_A, _, scale) in updates.items()},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    return config, tensors


@torch.no_grad()
def _fused_factors(module: AdaptedLinear) -> tuple[Tensor, Tensor, float]:
    """Return A (r, in), block-diagonal B (out, r) and the scale of one module."""
    adapters = module.adapters()
    scale = adapters[0][1].scale
    factors = [(site, *adapter.factors()) for site, adapter in adapters]
    lora_A = torch.cat([right for _, _, right in factors])  # (r, in)
    lora_B = lora_A.new_zeros(module.out_features, len(lora_A))  # (out, r)
    start = 0
    for site, left, right in factors:
        lora_B[site.span, start : start + len(right)] = left / scale  # (out_s, r_s)
        start += len(right)
    return lora_A, lora_B, scale


# --- import ---------------------------------------------------------------------------------------------------------


def import_peft(model: nn.Module, folder: Path, *, seed: int = 0, fresh_head: bool = False) -> None:
    """Attach a PEFT LoRA adapter to a Vision Transformer of timm, so that outputs are PEFT's and training can continue.

    Each adapted module carries one adapter on all its rows, at PEFT's rank and scale: `attn.qkv` as the one target
    module `blocks.i.attn.qkv`, the others as `out`, `fc1`, `fc2`. All else is frozen but the head, which is loaded if
    the adapter brings one. PEFT's files do not say which weights an adapter was trained on: give the model the right
    ones.

    Args:
        model: without adapters; changed in place, or left as it was on an error.
        folder: holds adapter_config.json and adapter_model.safetensors.
        seed: of the triplets that an adapter gets should it grow later.
        fresh_head: keep the model's own head where the adapter's is of another size, and say so. By default such a
            head is an error.

    Raises:
        UserError: if a file can't be read or does not fit the model, or asks for anything but plain LoRA.

    Warns:
        SilentNoEffectWarning: if the adapter was trained with dropout, which training continues without; with
            `fresh_head`, if it brings no head that fits.
    """
    if site_adapters(model):
        raise UserError("the model already carries adapters; import into a plain one", field="model")
    head = named_head_parameters(model)
    sites = fused_sites(find_sites(model))
    for name in sites:
        if not isinstance(model.get_submodule(name), nn.Linear):
            raise UserError(f"{name} is not a torch.nn.Linear; import into a plain timm model", field="model")
    own = {name: tuple(parameter.shape) for name, parameter in head.items()}
    adapter = read_peft(folder, sites, own, any_head=fresh_head)
    if adapter.dropout:
        _warn(f"lora_dropout {adapter.dropout} is not applied here")
    if {name: tuple(tensor.shape) for name, tensor in adapter.head.items()} == own:
        with torch.no_grad():
            for name, tensor in adapter.head.items():
                head[name].copy_(tensor)
    elif fresh_head:
        brought = f"a head of {_classes(adapter.head)} classes" if adapter.head else "no head"
        _warn(
            f"the adapter of {folder} brings {brought} and these images have {_classes(head)}, so a new head is trained"
        )
    scales = {sites[module].name: scale for module, (_, _, scale) in adapter.updates.items()}
    attach_adapters(model, [sites[module] for module in adapter.updates], 0, scale=scales, seed=seed)
    by_site = site_adapters(model)
    for module, (lora_A, lora_B, _) in adapter.updates.items():
        attached = by_site[sites[module].name]
        device = attached.lora_A.device
        attached.lora_A, attached.lora_B = nn.Parameter(lora_A.to(device)), nn.Parameter(lora_B.to(device))


def _warn(text: str) -> None:
    warnings.warn(SilentNoEffectWarning(text), stacklevel=3)


def attach_named(model: nn.Module, scales: Mapping[str, float], *, seed: int = 0) -> None:
    """Freeze the backbone and put an adapter of rank 0 on sites or whole modules, by name, for `load_trained`."""
    plain = find_sites(model)
    sites = {site.name: site for site in (*plain, *fused_sites(plain).values())}
    attach_adapters(model, [sites[name] for name in scales], 0, scale=scales, seed=seed)


def named_head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return weight and bias of the head, or of each of several, by their names in the model."""
    backbone = Backbone(model)
    _ = backbone.head  # there is one
    return {f"{name}.{leaf}": p for name, layer in backbone.heads.items() for leaf, p in layer.named_parameters()}


def _classes(head: Mapping[str, Tensor]) -> int:
    """Return how many classes a head tells apart."""
    return len(next(iter(head.values())))


# --- reading --------------------------------------------------------------------------------------------------------


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
    """
    if not os.path.isdir(folder):  # unlike Path.is_dir, also False for an impossible name
        raise UserError("is not a folder; give the one that PEFT's save_pretrained wrote", file=folder)
    config_file, file = folder / CONFIG_FILE, folder / TENSORS_FILE
    config = _read_config(config_file)
    _read_base(folder / BASE_FILE)
    if not os.path.isfile(file):
        message = "does not exist; a .bin file is not read, since it may run code: save with safe_serialization=True"
        raise UserError(message, file=file)
    _, tensors = read_safetensors(file)
    heads = sorted({parameter.rpartition(".")[0] for parameter in head})
    for name in config.modules_to_save or ():
        if name not in heads:
            message = f"{short(name)} is not a head of this model, which has {' and '.join(heads)}"
            raise UserError(f"{message}; leave it out", file=config_file, field="modules_to_save")
    of_head = {f"{PREFIX}{name}": shape for name, shape in head.items()} if config.modules_to_save else {}
    if any_head:
        of_head |= {name: tuple(tensors[name].shape) for name in of_head.keys() & tensors.keys()}
    expected = dict(of_head)  # shape by PEFT's name of the tensor
    modules = [name for name in sites if any(f"{PREFIX}{name}.lora_{factor}.weight" in tensors for factor in "AB")]
    for name in modules:
        expected[f"{PREFIX}{name}.lora_A.weight"] = (config.rank(name), sites[name].in_features)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (sites[name].out_features, config.rank(name))
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise UserError(
            f"this tensor has no place here by {CONFIG_FILE}; only LoRA on a block's qkv, proj, fc1, fc2 and a head "
            "that modules_to_save names can be imported",
            file=file,
            field=repr(unknown[0][:200]),
        )
    for name, shape in expected.items():
        if name not in tensors:
            message = f"is missing, which {CONFIG_FILE} asks for; save the adapter with PEFT's save_pretrained"
            raise UserError(message, file=file, field=name)
        tensor = tensors[name] = tensors[name].float() if tensors[name].is_floating_point() else tensors[name]
        if tuple(tensor.shape) != shape:
            hint = (
                "call model.reset_classifier" if name in of_head else f"is it of this model, and of this {CONFIG_FILE}?"
            )
            raise UserError(f"expected shape {shape}, got {tuple(tensor.shape)}; {hint}", file=file, field=name)
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(
                "holds values that are not finite or not floating-point; save the adapter again", file=file, field=name
            )
    targets = config.target_modules
    for name in modules if isinstance(targets, list) else ():  # of a pattern PEFT has saved what it hit
        if not any(name == target or name.endswith(f".{target}") for target in targets):
            # PEFT would drop them without a word.
            message = f"does not name {name}, which has tensors; add it"
            raise UserError(message, file=config_file, field="target_modules")
    updates = {
        name: (tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"], config.scale(name))
        for name in modules
    }
    return PeftAdapter(updates, {name.removeprefix(PREFIX): tensors[name] for name in of_head}, config.lora_dropout)


def start_sha256(start: Path) -> str:
    """Return the SHA-256 of an adapter file, or over PEFT's adapter_config.json and adapter_model.safetensors."""
    digest = hashlib.sha256()
    for file in [start] if start.is_file() else [start / CONFIG_FILE, start / TENSORS_FILE]:
        with os_fault("can't be read", file, remedy="name a folder that PEFT has saved, or `export`"):
            digest.update(read_bytes(file, None))
    return digest.hexdigest()


def base_mismatches(
    folder: Path, model: str, weights_name: str, weights_sha256: str | None, class_names: Sequence[str]
) -> list[str]:
    """Return sentences on what an adapter was trained on and a run is not, as far as its files tell.

    PEFT's files hold no hash of the base's weights; ours beside them, if this package wrote the adapter, do.
    """
    doubts = []
    if folder.is_file():  # of a run, whose head is taken over by the names of classes
        base, named = {**read_adapter_file(folder).metadata, "class_names": None}, None
    else:
        base, named = _read_base(folder / BASE_FILE), _read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    if named and _architecture(str(named)) != _architecture(model):
        doubts.append(
            f"the adapter of {folder} names the base model {short(named)} and this run adapts {model}; PEFT's "
            "files do not say whether the weights agree, and with other weights the adapter is useless"
        )
    if "weights_sha256" in base and base["weights_sha256"] != weights_sha256:
        doubts.append(
            f"the adapter of {folder} was trained on {short(base.get('weights_name'))} (SHA-256 "
            f"{base['weights_sha256']}) and this run adapts {weights_name} (SHA-256 {weights_sha256}); with other "
            "weights the adapter is useless"
        )
    if base.get("class_names") not in (None, list(class_names)):
        doubts.append(
            f"the adapter of {folder} was trained on the classes {short(base['class_names'])} and this run has "
            f"{short(list(class_names))}; its head starts from those of the adapter"
        )
    return doubts


def _read_base(file: Path) -> dict[str, Any]:
    """Return what `export_peft` has written of the base; nothing where PEFT has written the adapter."""
    base = _read_json(file) if os.path.lexists(file) else {}
    if not isinstance(base, dict):
        raise UserError("is not what `peft-vit export` writes; remove it", file=file)
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
_HARMLESS = (
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
)
_OFF: tuple[Any, ...] = (None, False, "none", [], {})


def _read_config(file: Path) -> _LoraFile:
    try:
        config = _LoraFile.model_validate(_read_json(file))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = f"{first['msg']}, got {short(first['input'])}; only plain LoRA can be imported"
        raise UserError(message, file=file, field=str(first["loc"][0]) if first["loc"] else None) from None
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
