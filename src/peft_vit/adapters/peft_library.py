"""Adapters of the PEFT library inside a timm model: references that stand beside our own in a study.

PEFT puts its layers in the place of timm's Linear layers, so the model stays a VisionTransformer, and whatever works
on parameters (the loop, counts, files) works on it. Its update of a module is

    LoRA:     dW = alpha / r * B A                            arXiv 2106.09685, eq. 3
    AdaLoRA:  dW = alpha / (r0 + 1e-5) * B diag(E) A          arXiv 2303.10512, eq. 3; r0 the initial rank

PEFT's AdaLoRA does not divide alpha by the rank when it sets the scale but in its forward pass, always by the initial
rank, since masking leaves ``ranknum`` as it was (tuners/adalora/layer.py). Here ``alpha = scale * r`` or
``scale * r0``: both have the scale that the configuration states, AdaLoRA's within 1e-5 / r0 of it.

timm's fused query, key and value are one module with one rank. PEFT is an optional dependency, imported only here and
only when it is asked for.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_vit.adapters.injection import freeze_backbone
from peft_vit.backbones import find_sites, fused_sites
from peft_vit.config import ExperimentConfig, Matrix, PeftAdaLoraConfig, PeftLoraConfig
from peft_vit.errors import UserError
from peft_vit.seeding import torch_generator

ADAPTER = "default"  # PEFT's name for a model's first adapter


def require_peft() -> None:
    """Refuse a method that needs the PEFT library where it is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "peft_lora and peft_adalora need the PEFT library; run: pip install 'peft-vit[peft]'", field="method"
        )


def load_peft(experiment: ExperimentConfig) -> None:
    """Import the PEFT library if an experiment needs it: with transformers, some 90 MB that stay in the process."""
    if experiment.peft_lora is not None or experiment.peft_adalora is not None:
        require_peft()
        import peft  # noqa: F401


def attach_peft_lora(model: nn.Module, config: PeftLoraConfig, *, seed: int) -> None:
    """Freeze the backbone and let PEFT put LoRA on the wanted modules; outputs do not change."""
    require_peft()
    import peft

    alpha: Any = config.scale * config.rank  # PEFT says int and takes any number
    _attach(
        model, seed, peft.LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=_modules(model, config.targets))
    )


def attach_peft_adalora(
    model: nn.Module, config: PeftAdaLoraConfig, *, final_steps: int, total_steps: int, seed: int
) -> Any:
    """Freeze the backbone and let PEFT put AdaLoRA on the wanted modules; outputs do not change.

    Returns:
        PEFT's AdaLoraModel around the same model: its `update_and_allocate` has to be called once a step.
    """
    require_peft()
    import peft

    alpha: Any = config.scale * config.initial_rank
    return _attach(
        model,
        seed,
        peft.AdaLoraConfig(
            init_r=config.initial_rank,
            target_r=config.target_rank,
            lora_alpha=alpha,
            tinit=config.warmup_steps,
            tfinal=final_steps,
            deltaT=config.update_frequency,
            total_step=total_steps,
            beta1=config.beta1,
            beta2=config.beta2,
            orth_reg_weight=config.orthogonality_weight,
            target_modules=_modules(model, config.targets),
        ),
    )


def _modules(model: nn.Module, targets: Sequence[Matrix]) -> list[str]:
    """Return full names: the suffix `proj` would hit patch_embed.proj too."""
    return list(fused_sites(find_sites(model, targets)))


def _attach(model: nn.Module, seed: int, config: Any) -> Any:
    import peft

    freeze_backbone(model)
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
        torch.default_generator.manual_seed(torch_generator(seed, "adapter_init").initial_seed())
        tuner = peft.get_peft_model(model, config).base_model
    # The head is trained as it is: under modules_to_save PEFT would train a copy and keep the original as well.
    for parameter in model.get_classifier().parameters():  # type: ignore[operator]
        parameter.requires_grad_(True)
    return tuner


def peft_layers(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's LoRA and AdaLoRA layers by the name of the module that they took the place of."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def peft_layers_by_site(model: nn.Module) -> dict[str, Any]:
    """Return the same layers by the name of the site, `blocks.3.attn.qkv`."""
    layers = peft_layers(model)
    sites = fused_sites(find_sites(model)) if layers else {}
    return {sites[name].name: layer for name, layer in layers.items()}


def peft_ranks(model: nn.Module) -> dict[str, int]:
    """Return the rank of each site that PEFT adapts, `blocks.3.attn.qkv`: what its last mask left, or what it made."""
    layers = peft_layers(model)
    if not layers:
        return {}
    pattern = getattr(model.peft_config[ADAPTER], "rank_pattern", None) or {}  # type: ignore[index]
    sites = fused_sites(find_sites(model))
    # LoRA's pattern holds ranks that its layers have already; AdaLoRA's holds masks.
    masks = {name.partition(".lora_E")[0]: mask for name, mask in pattern.items() if not isinstance(mask, int)}
    return {sites[n].name: sum(masks[n]) if n in masks else layer.r[ADAPTER] for n, layer in layers.items()}


def check_plain(name: str, layer: Any) -> None:
    """Refuse a layer whose update is not scale * B A of one adapter.

    Raises:
        UserError: naming the module.
    """
    kinds = ("Linear", "SVDLinear")
    more = layer.lora_variant or layer.merged or any(layer.lora_bias.values()) or list(layer.lora_A) != [ADAPTER]
    if type(layer).__name__ not in kinds or more:
        raise UserError(
            f"PEFT computes more there than one plain LoRA or AdaLoRA named '{ADAPTER}'; use PEFT's own "
            "save_pretrained or merge_and_unload",
            field=name,
        )


@torch.no_grad()
def peft_factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    """Return A (r, in), B (out, r) and the scale of a layer, so that dW = scale * B A; masked triplets are left out."""
    if hasattr(layer, "lora_E"):
        diagonal = layer.lora_E[ADAPTER].flatten()  # (r0,); a mask sets its triplets' to exactly 0
        kept = diagonal != 0
        left = (layer.lora_B[ADAPTER] * diagonal)[:, kept]
        return layer.lora_A[ADAPTER][kept], left, layer.scaling[ADAPTER] / (float(layer.ranknum[ADAPTER]) + 1e-5)
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]
