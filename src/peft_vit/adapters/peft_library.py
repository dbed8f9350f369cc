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
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peft_vit.adapters.injection import freeze_backbone
from peft_vit.backbones import Backbone, find_sites, whole_modules
from peft_vit.config import PeftAdaLoraConfig, PeftLoraConfig
from peft_vit.errors import UserError
from peft_vit.seeding import torch_generator


def require_peft() -> None:
    """Refuse a method that needs the PEFT library where it is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "peft_lora and peft_adalora need the PEFT library; run: pip install 'peft-vit[peft]'", field="method"
        )


def load_peft() -> None:
    """Import the PEFT library: with transformers, some 90 MB that stay in the process."""
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


def _modules(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return full names: the suffix `proj` would hit patch_embed.proj too."""
    return list(whole_modules(find_sites(model), targets))


def _attach(model: nn.Module, seed: int, config: Any) -> Any:
    import peft

    freeze_backbone(model)
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
        torch.default_generator.manual_seed(torch_generator(seed, "adapter_init").initial_seed())
        tuner = peft.get_peft_model(model, config).base_model
    # The head is trained as it is: under modules_to_save PEFT would train a copy and keep the original as well.
    for parameter in Backbone(model).head.parameters():
        parameter.requires_grad_(True)
    return tuner
