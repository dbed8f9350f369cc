"""Tuners of the PEFT library inside a timm model: references that are beside our own in a study.

PEFT puts its layers in the place of timm's Linear layers, so the model keeps its class, and whatever works on
parameters (the loop, counts, files) works on it. A fused query, key and value is one module with one rank. PEFT is an
optional dependency, imported only when it is asked for. Of LoRA and AdaLoRA its update of a module is

    LoRA:     dW = alpha / r * B A                            arXiv 2106.09685, eq. 3
    AdaLoRA:  dW = alpha / (r0 + 1e-5) * B diag(E) A          arXiv 2303.10512, eq. 3; r0 the initial rank

PEFT's AdaLoRA does not divide alpha by the rank when it sets the scale but in its forward pass, always by the initial
rank, since masking leaves ``ranknum`` as it was (tuners/adalora/layer.py).

A configuration names a tuner and PEFT's settings of it: ``{type: dora, r: 8, lora_alpha: 16}``. What PEFT calls by a
setting of LoRA is a type of its own here, see `PRESETS`. EVA (arXiv 2410.07170) starts A from the inputs of each module
on training images, and moves rank to modules whose inputs vary in more directions.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_vit.base.errors import UserError, is_out_of_memory
from peft_vit.base.extras import require_extra
from peft_vit.base.seeding import torch_generator
from peft_vit.core.adapters.attach import check_gradients, freeze_backbone
from peft_vit.core.adapters.peft_layers import ADAPTER, PREFIX
from peft_vit.core.backbones import Backbone, Site, evaluating, find_sites, fused_sites, select_modules
from peft_vit.core.config import PeftAdaLoraConfig, PeftLoraConfig

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),  # arXiv 2402.09353
    "rslora": ("lora", {"use_rslora": True}),  # arXiv 2312.03732
    "eva": ("lora", {"init_lora_weights": "eva"}),  # arXiv 2410.07170
}
# Set here: the head is trained by our loop, and there is one adapter that is trained.
_OURS = {"peft_type", "task_type", "inference_mode", "modules_to_save", "auto_mapping", "base_model_name_or_path"}
_RANK_OF_FILE = ".lora_A.default.weight"


def load_peft() -> Any:
    """Return the PEFT library: with transformers, some 90 MB that stay in the process; UserError where it is not."""
    require_extra("peft", field="method")
    import peft

    return peft


def tuner_config(type: str, settings: Mapping[str, Any], sites: Sequence[Site]) -> Any:
    """Return PEFT's configuration of a tuner.

    Args:
        type: as PEFT names it, in small letters, or one of `PRESETS`.
        settings: by PEFT's names; without `target_modules` all matrices of the blocks are adapted, by `ia3` the inputs
            of the last one of each MLP and the outputs of query, key and value.
        sites: of the model.
    """
    peft = load_peft()
    known = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    # Those that put layers into a model: prompts are for language.
    types = {
        kind.value.lower(): known[kind]
        for kind in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
        if not issubclass(known[kind], peft.PromptLearningConfig)
    }
    types |= {name: types[base] for name, (base, _) in PRESETS.items()}
    if type not in types:
        raise UserError(f"PEFT has no tuner {type!r}{_nearest(type, types)}", field="peft.type")
    base, preset = PRESETS.get(type, (type, {}))
    fields = {field.name for field in dataclasses.fields(types[type])}
    for name in settings:
        if name in _OURS or name in preset:
            raise UserError("is set by type and loop here; remove it", field=f"peft.{name}")
        if name not in fields:
            kind = types[type].__name__
            raise UserError(f"is not a setting of PEFT's {kind}{_nearest(name, fields - _OURS)}", field=f"peft.{name}")
    given = copy.deepcopy(dict(settings))
    try:
        if type == "eva":
            given["eva_config"] = peft.EvaConfig(**given.get("eva_config", {}))
        return types[type](**_targets(base, given, sites), **preset, **given)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"PEFT refuses it: {error}", field="peft") from None


def _targets(base: str, given: dict[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
    """Return the modules that are adapted where the settings name none, by full name: `proj` alone would hit more."""
    if "target_modules" in given:
        return {}
    modules = fused_sites(sites)
    if base != "ia3":
        return {"target_modules": list(modules)}
    last = {site.layer: name for name, site in modules.items() if site.role == "mlp"}  # of each block
    inputs = [name for name, site in modules.items() if site.role == "attention" and site.kind not in ("out", "proj")]
    return {"target_modules": [*inputs, *last.values()], "feedforward_modules": list(last.values())}


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def attach_peft(
    model: nn.Module,
    type: str,
    settings: Mapping[str, Any],
    *,
    seed: int,
    images: Tensor | None = None,
    ranks: Mapping[str, int] | None = None,
) -> Any:
    """Freeze the backbone and let PEFT put a tuner into it.

    Args:
        model: a plain one.
        type: see `tuner_config`.
        settings: see `tuner_config`.
        seed: of the adapters' start.
        images: a calibration batch (N, C, H, W) for a start that depends on data.
        ranks: of the modules of a saved run, instead of such a start; see `saved_module_ranks`.

    Returns:
        PEFT's tuner around the same model.
    """
    config = tuner_config(type, settings, find_sites(model))
    starts_from_data = type == "eva"
    if starts_from_data and ranks is not None:
        config.init_lora_weights = True
        config.target_modules = set(ranks)
        patterns = {name: f"^{re.escape(name)}$" for name in ranks}
        config.rank_pattern = {patterns[name]: rank for name, rank in ranks.items()}
        if config.eva_config.adjust_scaling_factors:  # as PEFT did when it moved the ranks
            config.alpha_pattern = {patterns[name]: config.lora_alpha * rank / config.r for name, rank in ranks.items()}
    peft = load_peft()
    freeze_backbone(model)
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
        torch.default_generator.manual_seed(torch_generator(seed, "adapter_init").initial_seed())
        wrapped = peft.get_peft_model(model, config)
        if starts_from_data and ranks is None:
            _start_from(images, wrapped, model)
    # The head is trained as it is: under modules_to_save PEFT would train a copy and keep the original as well.
    for parameter in Backbone(model).head.parameters():
        parameter.requires_grad_(True)
    try:
        check_gradients(model)
    except RuntimeError as error:  # PEFT's OFT, say, takes tokens on a grid, (B, H, W, C), for images
        if is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
        message = f"PEFT's {type} can't compute with a layer of this model ({reason})"
        raise UserError(f"{message}; choose another, or fewer target_modules", field="peft.type") from None
    return wrapped.base_model


def attach_peft_lora(model: nn.Module, config: PeftLoraConfig, *, seed: int) -> None:
    """Attach LoRA with ``alpha = scale * r``; outputs do not change."""
    settings = {
        "r": config.rank,
        "lora_alpha": config.scale * config.rank,  # PEFT says int and takes any number
        "target_modules": list(select_modules(find_sites(model), config.targets)),
    }
    attach_peft(model, "lora", settings, seed=seed)


def attach_peft_adalora(
    model: nn.Module, config: PeftAdaLoraConfig, *, final_steps: int, total_steps: int, seed: int
) -> Any:
    """Attach AdaLoRA with ``alpha = scale * r0``; outputs do not change.

    Returns:
        PEFT's AdaLoraModel around the same model: its `update_and_allocate` has to be called once a step.
    """
    settings = {
        "init_r": config.initial_rank,
        "target_r": config.target_rank,
        "lora_alpha": config.scale * config.initial_rank,
        "tinit": config.warmup_steps,
        "tfinal": final_steps,
        "deltaT": config.update_frequency,
        "total_step": total_steps,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "orth_reg_weight": config.orthogonality_weight,
        "target_modules": list(select_modules(find_sites(model), config.targets)),
    }
    return attach_peft(model, "adalora", settings, seed=seed)


def _start_from(images: Tensor | None, wrapped: Any, model: nn.Module) -> None:
    if images is None:
        raise UserError("type eva starts from training images; none were given", field="peft.type")

    def rows(inputs: Any, *_: Any) -> Tensor:
        x: Tensor = inputs[0] if isinstance(inputs, tuple) else inputs
        return x.reshape(-1, x.shape[-1])  # (B, T, D) to (B T, D)

    with evaluating(model):
        load_peft().initialize_lora_eva_weights(
            wrapped,
            [images],
            forward_fn=lambda peft_model, batch: peft_model(batch),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=rows,
            show_progress_bar=False,
        )


def tuner_export(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's configuration of the tuner on a model, as JSON, and its tensors by PEFT's names."""
    configs: Any = model.peft_config
    config: Any = copy.deepcopy(configs[ADAPTER])
    if hasattr(config, "save_projection"):
        config.save_projection = False  # VeRA's random matrices come again from the key in its configuration
    if getattr(config, "init_lora_weights", None) == "eva":
        config.init_lora_weights = True  # it has started: what is loaded replaces the start
    configs[ADAPTER] = config
    tensors = load_peft().get_peft_model_state_dict(model, adapter_name=ADAPTER)
    content = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    content |= {"peft_type": config.peft_type.value, "inference_mode": True}
    return content, {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}


def saved_module_ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the rank of each module that PEFT's LoRA adapts, out of the tensors of an adapter file."""
    return {
        name.removesuffix(_RANK_OF_FILE): len(lora_A)  # (r, in)
        for name, lora_A in tensors.items()
        if name.endswith(_RANK_OF_FILE)
    }
