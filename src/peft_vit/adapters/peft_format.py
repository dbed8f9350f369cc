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

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from peft_vit.adapters.adapted_linear import AdaptedLinear
from peft_vit.adapters.adapted_model import adapted_modules, site_adapters
from peft_vit.adapters.adapter_file import trained_tensors
from peft_vit.adapters.attach import attach_adapters
from peft_vit.adapters.peft_files import BASE_FILE, CONFIG_FILE, PREFIX, TENSORS_FILE, read_peft
from peft_vit.adapters.peft_layers import check_plain, is_plain, peft_factors, peft_layers, tuner_layers
from peft_vit.adapters.peft_tuner import tuner_export
from peft_vit.backbones import Backbone, find_sites, fused_sites
from peft_vit.errors import SilentNoEffectWarning, UserError
from peft_vit.records import write_atomically

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
    head = _head_parameters(model)
    if Backbone(model).prepare():
        _warn(
            "timm adds this model's bias of query, key and value past PEFT's layers: set qkv_bias_separate = True on "
            "each block's attn before PEFT loads the adapter, or it has no effect there"
        )
    if any(not is_plain(layer) for layer in tuner_layers(model).values()):
        config, tensors = tuner_export(model)
    else:
        _check_exportable(model)
        config, tensors = _as_lora(model)
    config["modules_to_save"] = list(Backbone(model).heads)
    tensors |= {f"{PREFIX}{name}": parameter for name, parameter in head.items()}
    _write(folder, base, config, tensors)


def _write(folder: Path, base: Mapping[str, Any], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    plain = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError("holds files already; choose another folder", file=folder)
        write_atomically(folder / BASE_FILE, _json_bytes(base))
        write_atomically(folder / TENSORS_FILE, save(plain, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG_FILE, _json_bytes(config))  # last: without it PEFT sees no adapter
    except OSError as error:
        raise UserError(f"can't be written to ({error.strerror}); choose another folder", file=folder) from None


def _as_lora(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the content of adapter_config.json, and the tensors of the adapters by PEFT's names."""
    updates = {name: _fused_factors(module) for name, module in adapted_modules(model)}
    updates |= {name: peft_factors(layer) for name, layer in peft_layers(model).items()}
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


def _check_exportable(model: nn.Module) -> None:
    adapted, heads = dict(adapted_modules(model)), Backbone(model).heads
    for name, module in adapted.items():
        if module.quantized is not None or any(adapter.pool != 1 for _, adapter in module.adapters()):
            raise UserError(
                f"the adapter of {name} belongs to a quantized weight and PEFT would add it to the float one, "
                "which is another model; merged_state_dict(model) gives its weights"
            )
    for name, layer in peft_layers(model).items():
        check_plain(name, layer)
    for name in trained_tensors(model):
        if not name.startswith(tuple(f"{module}." for module in (*heads, *adapted, *peft_layers(model)))):
            raise UserError(
                f"{name} was trained too, and a PEFT adapter holds only adapters and head; save the weights"
            )


@torch.no_grad()
def _fused_factors(module: AdaptedLinear) -> tuple[Tensor, Tensor, float]:
    """Return A (r, in), block-diagonal B (out, r) and the scale of one module."""
    adapters = module.adapters()
    scale = adapters[0][1].scale
    lora_A = torch.cat([adapter.lora_A for _, adapter in adapters])  # (r, in)
    lora_B = lora_A.new_zeros(module.out_features, len(lora_A))  # (out, r)
    start = 0
    for site, adapter in adapters:
        lora_B[site.span, start : start + adapter.rank] = adapter.left() * (adapter.scale / scale)
        start += adapter.rank
    return lora_A, lora_B, scale


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


# --- import ---------------------------------------------------------------------------------------------------------


def import_peft(model: nn.Module, folder: Path, *, seed: int = 0, fresh_head: bool = False) -> None:
    """Attach a PEFT LoRA adapter to a Vision Transformer of timm, so that outputs are PEFT's and training can go on.

    Each adapted module carries one adapter on all its rows, at PEFT's rank and scale: `attn.qkv` as the one site
    `blocks.i.attn.qkv`, the others as `out`, `fc1`, `fc2`. All else is frozen but the head, which is loaded if the
    adapter brings one. PEFT's files do not say which weights an adapter was trained on: give the model the right ones.

    Args:
        model: without adapters; changed in place, or left as it was on an error.
        folder: holds adapter_config.json and adapter_model.safetensors.
        seed: of the triplets that an adapter gets should it grow later.
        fresh_head: keep the model's own head where the adapter's is of another size, and say so. By default such a
            head is an error.

    Raises:
        UserError: if a file can't be read or does not fit the model, or asks for anything but plain LoRA.

    Warns:
        SilentNoEffectWarning: if the adapter was trained with dropout, which training goes on without; with
            `fresh_head`, if it brings no head that fits.
    """
    if site_adapters(model):
        raise UserError("the model already carries adapters; import into a plain one", field="model")
    head = _head_parameters(model)
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
        theirs = f"a head of {_classes(adapter.head)} classes" if adapter.head else "no head"
        _warn(f"the adapter of {folder} brings {theirs} and these images have {_classes(head)}: the head is fresh")
    scales = {sites[module].name: scale for module, (_, _, scale) in adapter.updates.items()}
    attach_adapters(model, [sites[module] for module in adapter.updates], 0, scale=scales, seed=seed)
    by_site = site_adapters(model)
    for module, (lora_A, lora_B, _) in adapter.updates.items():
        one = by_site[sites[module].name]
        device = one.lora_A.device
        one.lora_A, one.lora_B = nn.Parameter(lora_A.to(device)), nn.Parameter(lora_B.to(device))


def _warn(text: str) -> None:
    warnings.warn(SilentNoEffectWarning(text), stacklevel=3)


def attach_fused(model: nn.Module, scales: Mapping[str, float], *, seed: int = 0) -> None:
    """Freeze the backbone and put an adapter of rank 0 on whole modules, as `import_peft` does, for `load_trained`."""
    sites = {site.name: site for site in fused_sites(find_sites(model)).values()}
    attach_adapters(model, [sites[name] for name in scales], 0, scale=scales, seed=seed)


def _head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return weight and bias of the head, or of each of several, by their names in the model.

    Raises:
        UserError: if the model has none.
    """
    heads = Backbone(model).heads
    if not heads:
        problem = "the model has no linear classification head; create it with num_classes"
        raise UserError(problem, field="num_classes")
    return {f"{name}.{leaf}": one for name, layer in heads.items() for leaf, one in layer.named_parameters()}


def _classes(head: Mapping[str, Tensor]) -> int:
    """Return how many classes a head tells apart."""
    return len(next(iter(head.values())))
