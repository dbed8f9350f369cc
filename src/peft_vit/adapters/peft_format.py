"""To and from the PEFT library's LoRA files, for plain timm VisionTransformer models.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``; PEFT's update of a module is
``alpha / r * B A`` (arXiv 2106.09685, eq. 3; ``alpha / sqrt(r)`` with ``use_rslora``, arXiv 2312.03732).

Export. timm holds query, key and value in one matrix of 3 D rows, PEFT has one LoRA per module. Adapters on slices of
the rows become one of rank r = r_q + r_k + r_v, whose A is their A stacked and whose B is block-diagonal::

    A = [A_q; A_k; A_v]  (r, D)        B = diag(B_q, B_k, B_v)  (3 D, r)

``alpha = scale * r`` is written per module, so the scale is ours whatever the ranks. The svd form's lambda goes into B.

Import. PEFT's LoRA on the fused matrix becomes one adapter on all its rows, a site of the name ``blocks.3.attn.qkv``.
Three sites would need three copies of A, which training would pull apart: another model than the one imported.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from peft_vit.adapters.adapted_linear import AdaptedLinear
from peft_vit.adapters.injection import adapted_modules, freeze_backbone, site_adapters
from peft_vit.adapters.low_rank import SiteAdapter
from peft_vit.adapters.merging import trained_tensors
from peft_vit.backbones import find_sites
from peft_vit.errors import SilentNoEffectWarning, UserError
from peft_vit.records import write_atomically
from peft_vit.seeding import torch_generator

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
BASE_FILE = "peft_vit.json"  # beside PEFT's two, which it ignores: what the adapter belongs to
_PREFIX = "base_model.model."
_HEAD = "head"
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
    """
    _check_exportable(model)
    config, tensors = _config_of(model), _tensors_of(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError("holds files already; choose another folder", file=folder)
        write_atomically(folder / BASE_FILE, _json_bytes(base))
        write_atomically(folder / TENSORS_FILE, save(tensors, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG_FILE, _json_bytes(config))  # last: without it PEFT sees no adapter
    except OSError as error:
        raise UserError(f"can't be written to ({error.strerror}); choose another folder", file=folder) from None


def _config_of(model: nn.Module) -> dict[str, Any]:
    """Return the content of adapter_config.json; modules whose adapters all have rank 0 are left out."""
    ranks = {name: sum(adapter.rank for _, adapter in module.adapters()) for name, module in adapted_modules(model)}
    ranks = {name: rank for name, rank in ranks.items() if rank}
    scales = {name: _scale(module) for name, module in adapted_modules(model)}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": list(ranks) or _NO_MODULE,  # full names: the suffix `proj` would hit patch_embed.proj too
        "r": 1,
        "lora_alpha": 1,
        "rank_pattern": ranks,
        "alpha_pattern": {name: scales[name] * rank for name, rank in ranks.items()},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": [_HEAD],
    }


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the content of adapter_model.safetensors, float32 on the CPU."""
    tensors = {}
    for name, module in adapted_modules(model):
        lora_A, lora_B = _fused_factors(module)
        if len(lora_A):
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = lora_A
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = lora_B
    tensors |= _head_parameters(model)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _check_exportable(model: nn.Module) -> None:
    _head_parameters(model)
    adapted = dict(adapted_modules(model))
    for name, module in adapted.items():
        if module.quantized is not None or any(adapter.pool != 1 for _, adapter in module.adapters()):
            raise UserError(
                f"the adapter of {name} belongs to a quantized weight and PEFT would add it to the float one, "
                "which is another model; merged_state_dict(model) gives its weights",
            )
    for name in trained_tensors(model):
        if not name.startswith((f"{_HEAD}.", *(f"{module}." for module in adapted))):
            raise UserError(
                f"{name} was trained too, and a PEFT adapter holds only adapters and head; save the weights"
            )


def _scale(module: AdaptedLinear) -> float:
    return module.adapters()[0][1].scale


@torch.no_grad()
def _fused_factors(module: AdaptedLinear) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and block-diagonal B (out, r) of one module, to be multiplied by the module's scale."""
    adapters = module.adapters()
    lora_A = torch.cat([adapter.lora_A for _, adapter in adapters])  # (r, in)
    lora_B = lora_A.new_zeros(module.out_features, len(lora_A))  # (out, r)
    start = 0
    for matrix, adapter in adapters:
        left = adapter.lora_B if adapter.lora_lambda is None else adapter.lora_B * adapter.lora_lambda
        lora_B[module.rows[matrix], start : start + adapter.rank] = left * (adapter.scale / _scale(module))
        start += adapter.rank
    return lora_A, lora_B


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


# --- import ---------------------------------------------------------------------------------------------------------


def import_peft(model: nn.Module, folder: Path, *, seed: int = 0) -> None:
    """Attach a PEFT LoRA adapter to a timm VisionTransformer, so that outputs are PEFT's and training can go on.

    Each adapted module carries one adapter on all its rows, at PEFT's rank and scale: `attn.qkv` as the one site
    `blocks.i.attn.qkv`, the others as `out`, `fc1`, `fc2`. All else is frozen but the head, which is loaded if the
    adapter brings one. PEFT's files do not say which weights an adapter was trained on: give the model the right ones.

    Args:
        model: without adapters, its head of the adapter's size; changed in place, or left as it was on an error.
        folder: holds adapter_config.json and adapter_model.safetensors.
        seed: of the triplets that an adapter gets should it grow later.

    Raises:
        UserError: if a file can't be read or does not fit the model, or asks for anything but plain LoRA.

    Warns:
        SilentNoEffectWarning: if the adapter was trained with dropout, which training goes on without.
    """
    if site_adapters(model):
        raise UserError("the model already carries adapters; import into a plain one", field="model")
    head = _head_parameters(model)
    shapes = _module_shapes(model)
    config = _read_config(folder / CONFIG_FILE)
    tensors = _read_tensors(folder / TENSORS_FILE)
    modules = [name for name in shapes if any(f"{_PREFIX}{name}.lora_{factor}.weight" in tensors for factor in "AB")]
    expected = {name: tuple(parameter.shape) for name, parameter in head.items()} if config.modules_to_save else {}
    for name in modules:
        (out_features, in_features), rank = shapes[name], config.rank(name)
        expected[f"{_PREFIX}{name}.lora_A.weight"] = (rank, in_features)
        expected[f"{_PREFIX}{name}.lora_B.weight"] = (out_features, rank)
    _check_tensors(tensors, expected, folder / TENSORS_FILE)
    _check_targets(config, modules, folder / CONFIG_FILE)
    if config.lora_dropout:
        warnings.warn(SilentNoEffectWarning(f"lora_dropout {config.lora_dropout} is not applied here"), stacklevel=2)
    freeze_backbone(model)
    with torch.no_grad():
        for name in head.keys() & expected.keys():
            head[name].copy_(tensors[name])
    for index, name in enumerate(modules):
        generator = torch_generator(seed, "adapter_init", index)
        _attach(model, name, tensors, scale=config.scale(name), generator=generator)


def _module_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every module that may carry an adapter, in the model's order."""
    shapes = {site.module: (site.rows[1], site.in_features) for site in find_sites(model)}  # the last rows' end
    for name in shapes:
        if not isinstance(model.get_submodule(name), nn.Linear):
            raise UserError(f"{name} is not a torch.nn.Linear; import into a plain timm model", field="model")
    return shapes


def _attach(
    model: nn.Module, name: str, tensors: Mapping[str, Tensor], *, scale: float, generator: torch.Generator
) -> None:
    base = model.get_submodule(name)
    assert isinstance(base, nn.Linear)
    adapter = SiteAdapter(base.in_features, base.out_features, 0, scale=scale, generator=generator)
    adapter.lora_A = nn.Parameter(tensors[f"{_PREFIX}{name}.lora_A.weight"])
    adapter.lora_B = nn.Parameter(tensors[f"{_PREFIX}{name}.lora_B.weight"])
    parent, _, child = name.rpartition(".")
    module = AdaptedLinear(base)
    module.add_site("out" if child == "proj" else child, (0, base.out_features), adapter.to(base.weight.device))
    setattr(model.get_submodule(parent), child, module)


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
    modules_to_save: list[Literal["head"]] | None = None
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
        "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "megatron_core", "peft_version",
        "qalora_group_size", "revision", "runtime_config", "task_type",
    }
)  # fmt: skip
_OFF: tuple[Any, ...] = (None, False, "none", [], {})


def _read_config(file: Path) -> _LoraFile:
    try:
        config = _LoraFile.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = f"{first['msg']}, got {short(first['input'])}; only plain LoRA can be imported"
        raise UserError(problem, file=file, field=str(first["loc"][0]) if first["loc"] else None) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"is not a readable JSON file ({error}); expected PEFT's", file=file) from None
    for field, value in sorted((config.model_extra or {}).items()):
        if field not in _HARMLESS and value not in _OFF:
            raise UserError(
                f"{short(value)} changes what the adapter computes and is not supported; only plain LoRA is",
                file=file, field=short(field)[1:-1],
            )  # fmt: skip
    return config


def _of_module(pattern: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first name that is the module's or, without ^, its end after a dot, as PEFT does."""
    for name, value in pattern.items():
        if module == name.removeprefix("^") or module.endswith(f".{name}"):
            return value
    return default


def _check_targets(config: _LoraFile, modules: Sequence[str], file: Path) -> None:
    """Refuse a list of targets that leaves out a module with tensors: PEFT would drop them without a word."""
    if isinstance(config.target_modules, str):
        return  # a pattern; PEFT has saved what it hit
    for name in modules:
        if not any(name == target or name.endswith(f".{target}") for target in config.target_modules):
            raise UserError(f"does not name {name}, which has tensors; add it", file=file, field="target_modules")


def _head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the head's parameters by PEFT's names."""
    head = getattr(model, _HEAD, None)
    if not isinstance(head, nn.Linear):
        raise UserError("the model has no linear classification head; create it with num_classes", field="num_classes")
    return {f"{_PREFIX}{_HEAD}.{name}": parameter for name, parameter in head.named_parameters()}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(
            "does not exist; a .bin file is not read, since it may run code: save with safe_serialization=True",
            file=file,
        )
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except Exception as error:  # a foreign file can fail in any way; the user needs one line
        raise UserError(f"is not a readable safetensors file ({error})", file=file) from None


def _check_tensors(tensors: dict[str, Tensor], expected: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Refuse tensors that are missing, left over, of another shape or no finite numbers; make the others float32."""
    for name in sorted(tensors.keys() - expected.keys()):
        raise UserError(
            "this tensor has no place here; only LoRA on a block's qkv, proj, fc1, fc2 and a head that modules_to_save "
            "names can be imported", file=file, field=repr(name[:200]),
        )  # fmt: skip
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError("is missing; save the adapter with PEFT's save_pretrained", file=file, field=name)
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            hint = "call model.reset_classifier" if f".{_HEAD}." in name else "is it an adapter of this model?"
            raise UserError(f"expected shape {shape}, got {tuple(tensor.shape)}; {hint}", file=file, field=name)
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise UserError("holds values that are no finite numbers; save the adapter again", file=file, field=name)
        tensors[name] = tensor.float()
