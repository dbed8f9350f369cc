"""QALoRATrainer: trains adapters on weights that are, or become, low-bit (QA-LoRA, arXiv 2309.14717).

In anybody's own loop::

    trainer = QALoRATrainer(model, config, total_steps=600)               # quantizes, attaches the adapters
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(1, 601):                                            # steps count from 1
        loss = cross_entropy(model(images), labels)
        trainer.training_step(model, optimizer, loss, step)               # backward, scaling, clipping, step, zero_grad

or, where something else does the step, `before_step` before it and `after_step` after it.

The quantized weight replaces the float one step by step, from a share of 0 to exactly 1. With t the part of the way
from `quantization_warmup_steps` to the end step, the share is 1 (constant), t (linear) or (1 - cos(pi t)) / 2 (cosine).
This fading is this project's addition to QA-LoRA.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_vit.base.errors import SilentNoEffectWarning, UserError
from peft_vit.core.adapters import check_gradients
from peft_vit.core.adapters.footprint import model_size
from peft_vit.core.adapters.resizing import unwrap_optimizer
from peft_vit.core.config import QaLoraConfig
from peft_vit.core.records import BitsEntry, QuantizationSummary
from peft_vit.core.training.checkpoint import tensors_sha256
from peft_vit.core.training.hooks import Hook, HookContext
from peft_vit.core.training.optimization import blocks_of, optimization_step, recomputed
from peft_vit.core.training.quantized_layers import (
    MEASURE_EVERY_STEPS,
    Formats,
    PackedTensors,
    adapter_to_error_ratio,
    attach_layers,
    error_removed,
    float_weights,
    formats_of,
    managed_pace,
    managed_scale,
    packed_weights,
    quantized_layers,
    saved_weights,
)

_FLOAT_BITS = 32.0
_BALANCE_IMAGES = 32  # of the calibration batch on which outputs are compared
# What a resumed run needs beside model and optimiser.
_STATE = ("_part", "_pace", "_scale", "share_history", "bits_history", "balance_history")


class QALoRATrainer(Hook):
    """Quantization-aware LoRA on a Vision Transformer of timm.

    With groups, the adapter's input is summed over the quantizer's groups, so that the trained update can be moved
    into the offsets. Without groups, it is a plain LoRA adapter over a quantized weight (QLoRA, arXiv 2305.14314).

    Args:
        model: a Vision Transformer of timm; adapters are attached and its target modules' weights are quantized. If it
            carries adapters already (an AdaLoRAController's, imported ones, or LoRA by `peft.get_peft_model`), these
            are taken as they are, and the weights under them are quantized.
        config: the settings, see `config.QaLoraConfig`.
        total_steps: optimiser steps of the whole run; the schedule depends on it.
        seed: of the adapters' start.
        clip_norm: largest gradient norm in `training_step`; None: no clipping.
        formats: by module, `blocks.3.attn.qkv`, instead of what the settings say.
        ranks: by target module, `blocks.3.attn.query`, instead of the settings' rank.
        images: calibration images (N, C, H, W), normalised, for `rounding: gptq` alone.
        packed: tensors of saved weights by module, instead of rounding again, see `adapters.read_adapter_file`.

    Raises:
        UserError: if the model is of another class, a group does not divide a target module's inputs, the rank lies
            above the number of groups, the schedule does not fit the steps, adapters that are there don't fit the
            settings, or one has no effect; if calibration images are missing or have no effect.
    """

    name = "quantization"

    def __init__(
        self,
        model: nn.Module,
        config: QaLoraConfig,
        total_steps: int,
        *,
        seed: int = 0,
        clip_norm: float | None = 1.0,
        formats: Formats | None = None,
        ranks: Mapping[str, int] | None = None,
        images: Tensor | None = None,
        packed: PackedTensors | None = None,
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self.clip_norm = clip_norm
        self.last_step = end_step(config, total_steps)
        attach_layers(model, config, ranks, seed=seed)
        layers = quantized_layers(model)
        self.formats = formats_of(layers, config, formats)
        self.relative_error: dict[str, float] = {}
        self._error_norm: dict[str, float] = {}
        self._codes: dict[str, dict[str, Tensor]] = {}  # packed weights that a checkpoint has to hold, by module
        share = quantized_share(config, total_steps, 0)
        for name, quantized in packed_weights(model, layers, self.formats, config.rounding, images, packed):
            module = layers[name].module
            assert module.weight is not None
            norm = float(module.weight.norm())
            self.relative_error[name] = module.set_quantized(quantized)
            self._error_norm[name] = self.relative_error[name] * norm if norm else 0.0
            if config.keeps_codes:
                self._codes[name] = quantized.tensors()
            module.quantized_share = 1.0  # for the inputs of the layers behind it
            if share == 1.0:
                module.drop_float()  # at once: the next layer's may only now be read
        self.share_history: list[dict[str, float]] = []
        self.bits_history: list[dict[str, Any]] = []
        self.balance_history: list[dict[str, float]] = []
        self._part, self._pace, self._scale = 0.0, 1.0, 1.0  # part: of the schedule's way, under a managed pace
        self._warned = False
        self._use_share(model, 0, share)
        with recomputed(blocks_of(model)):  # or it would take several times the packed model's memory
            check_gradients(model)

    # --- the schedule -------------------------------------------------------------------------------------------------

    @property
    def share(self) -> float:
        """Return the quantized share in use now."""
        return self.share_history[-1]["share"]

    def _use_share(self, model: nn.Module, steps_done: int, share: float) -> None:
        """Mix the weights again; at share 1 the float ones are freed."""
        was_full = bool(self.share_history) and self.share == 1.0
        self.share_history.append({"step": steps_done, "share": share})
        if was_full:
            return  # the float weights are gone already
        bits = {}
        for name, (module, _) in quantized_layers(model).items():
            assert module.quantized is not None
            module.quantized_share = share
            bits[name] = module.quantized.bits_per_weight
            if share == 1.0:
                module.drop_float()
            else:
                bits[name] += _FLOAT_BITS
        if not self.bits_history or share == 1.0:
            self.bits_history.append({"step": steps_done, "bits_per_weight": bits})

    def notes(self) -> dict[str, float]:
        """Return the quantized share in use."""
        return {"quantized_share": self.share}

    def deployable(self, step: int) -> bool:
        """Say whether only quantized weights are left."""
        return step >= self.last_step

    def start_deployable(self) -> bool:
        """Say whether only quantized weights are used from the start."""
        return self.share == 1.0

    # --- a step -------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, optimizer: Optimizer, loss: Tensor, step: int) -> dict[str, float]:
        """Do backward, gradient scaling, clipping, the optimiser's step and zero_grad; then move the schedule on.

        Args:
            model: the model given at the start.
            optimizer: holds its trainable parameters.
            loss: scalar loss with its graph.
            step: number of this step, from 1.

        Returns:
            loss, gradient_norm (after scaling, before clipping), quantized_share (in the forward pass of this step).
        """
        share = self.share
        outcome = optimization_step(model, optimizer, loss, step, hooks=[self], clip_norm=self.clip_norm)
        return {"loss": outcome.loss, "gradient_norm": outcome.gradient_norm, "quantized_share": share}

    def gradient_scales(self) -> dict[str, float]:
        """Return the factor on the gradients of each layer's adapters.

        `gradient_scaling_factor`; under `gradient_scaling: adaptive` times the layer's relative quantization error
        over the mean of all; times what holds the balance, if that is managed so. Under SGD each is a factor on the
        layer's learning rate; under Adam it cancels, except through clipping, weight decay and epsilon.
        """
        factor = self.config.gradient_scaling_factor * self._scale
        mean = float(np.mean(list(self.relative_error.values())))
        if self.config.gradient_scaling == "constant" or mean == 0:
            return dict.fromkeys(self.relative_error, factor)
        return {name: factor * error / mean for name, error in self.relative_error.items()}

    def before_step(self, model: nn.Module, step: int) -> None:
        """Multiply the adapters' gradients, penalties included, by `gradient_scales`; the head's stay."""
        scales = self.gradient_scales()
        if set(scales.values()) == {1.0}:
            return
        for name, layer in quantized_layers(model).items():
            for _, adapter in layer.updates:
                for parameter in adapter.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(scales[name])

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Move the schedule on; at its end the float weights are freed."""
        self._warn_of_adam(optimizer)
        if self._manages("schedule_pace"):
            if step > self.config.quantization_warmup_steps:
                self._part = next_part(self._part, self.last_step - step + 1, self._pace)
            share = share_at(self.config, self._part)
        else:
            share = quantized_share(self.config, self.total_steps, step)
        self._use_share(model, step, share)
        self._manage_balance(model, step)

    def _warn_of_adam(self, optimizer: Optimizer) -> None:
        """Say once which settings Adam cancels."""
        optimizer = unwrap_optimizer(optimizer)
        if self._warned or not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            return
        self._warned = True
        settings = {
            f"gradient_scaling_factor {self.config.gradient_scaling_factor}": self.config.gradient_scaling_factor != 1,
            "gradient_scaling: adaptive": self.config.gradient_scaling == "adaptive",
            "balance_by: gradient_scale": self._manages("gradient_scale"),
        }
        if cancelled := [setting for setting, acts in settings.items() if acts]:
            text = f"{' and '.join(cancelled)} nearly cancel{'s' * (len(cancelled) == 1)}"
            text += f" under {type(optimizer).__name__}; only clipping, weight decay and epsilon see it"
            warnings.warn(text, SilentNoEffectWarning, stacklevel=3)

    # --- the balance --------------------------------------------------------------------------------------------------

    def _manages(self, by: str) -> bool:
        return self.config.balance_target is not None and self.config.balance_by == by

    def _manage_balance(self, model: nn.Module, step: int) -> None:
        """Set gradient scale or pace for the next steps every MEASURE_EVERY_STEPS, and record both."""
        target = self.config.balance_target
        if target is None or step % MEASURE_EVERY_STEPS or (self._manages("schedule_pace") and self.share == 1.0):
            return
        ratio = adapter_to_error_ratio(quantized_layers(model), self._error_norm)
        row = {"step": step, "adapter_to_error_ratio": ratio, "quantized_share": self.share}
        if self.config.balance_by == "gradient_scale":
            row["gradient_scale"] = self._scale = managed_scale(ratio, target)
        else:
            row["schedule_pace"] = self._pace = managed_pace(ratio, target, self.share)
        self.balance_history.append(row)

    def validate_quantization_adaptation_balance(
        self, model: nn.Module, *, reference: Mapping[str, Tensor] | None = None, images: Tensor | None = None
    ) -> dict[str, float]:
        """Measure how the adapters compare with the error that quantization made, and keep the row.

        With E = W - Wq the error at full quantization and dW the adapters' update, each a mean over modules:

        Args:
            model: the model given at the start.
            reference: the float weights, e.g. the state dict of the plain model as it was loaded; not needed while
                the schedule still holds them.
            images: a calibration batch (B, 3, H, W) on the model's device, for the outputs; needs the float weights.

        Returns:
            relative_quantization_error: ||E||_F / ||W||_F.
            signal_to_noise_db: 20 log10(||W||_F / ||E||_F).
            adapter_to_error_ratio: ||dW||_F / ||E||_F.
            quantized_share: in use now, 0 to 1.
            error_removed_in_weights: 1 - ||E - dW||_F^2 / ||E||_F^2, given the float weights. At most 1; negative
                where the update adds more than it removes.
            error_removed_in_outputs: 1 - ||X (E - dW)^T||_F^2 / ||X E^T||_F^2 with X (N, in) the module's inputs on
                `images`, given both.

        Raises:
            UserError: if the reference is not that of this model, or images were given without float weights.
        """
        layers = quantized_layers(model)
        errors = np.array(list(self.relative_error.values()))
        row = {
            "relative_quantization_error": float(errors.mean()),
            "signal_to_noise_db": float(np.mean(-20 * np.log10(errors))) if errors.all() else math.inf,
            "adapter_to_error_ratio": adapter_to_error_ratio(layers, self._error_norm),
            "quantized_share": self.share,
        }
        if reference is None:
            weights = {f"{name}.weight": layer.module.weight for name, layer in layers.items()}
            reference = {name: weight for name, weight in weights.items() if weight is not None}
        if reference:
            row |= error_removed(model, layers, float_weights(layers, reference, self.relative_error), images)
        elif images is not None:
            raise UserError("the float weights are gone; give them to compare outputs with", field="reference")
        self.balance_history.append({"step": self.share_history[-1]["step"], **row})
        return row

    # --- what is kept -------------------------------------------------------------------------------------------------

    def export_quantization_data(self) -> dict[str, Any]:
        """Return schedule, errors, bits and balance by step, as plain values ready for JSON."""
        exported = {
            "config": self.config.model_dump(mode="json"),
            "schedule": self.share_history,
            "relative_error": self.relative_error,
            "bits": self.bits_history,
            "balance": self.balance_history,
        }
        return copy.deepcopy(exported)

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's state between two steps, beside model and optimiser.

        Plain values, and with `rounding: gptq` the packed weights' tensors, wherever they were made.
        """
        state = {
            "made_with": self._made_with(),
            **{name.removeprefix("_"): copy.deepcopy(getattr(self, name)) for name in _STATE},
        }
        return state | ({"codes": dict(self._codes)} if self.config.keeps_codes else {})

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Continue from where `state_dict` was taken; `model` is the one given at the start, with its adapters loaded.

        Raises:
            UserError: if the state belongs to another configuration, length of run, or other weights.
        """
        layers, made_with = quantized_layers(model), state["made_with"]
        if self.config.keeps_codes:
            self._codes = dict(state["codes"])
            for name, quantized in saved_weights(layers, self.formats, self._codes):
                layers[name].module.quantized = quantized
                error = made_with["relative_error"][name]
                self._error_norm[name] *= error / self.relative_error[name] if error else 0.0
                self.relative_error[name] = error
        for key, value in self._made_with().items():
            if made_with.get(key) != value:
                message = "the state was made with another one; build the trainer as it was built then"
                raise UserError(message, field=key)
        for name in _STATE:
            setattr(self, name, copy.deepcopy(state[name.removeprefix("_")]))
        for module, _ in layers.values():
            module.quantized_share = self.share
            if self.share == 1.0:
                module.drop_float()

    def _made_with(self) -> dict[str, Any]:
        config = self.config.model_dump(mode="json")
        return {"config": config, "total_steps": self.total_steps, "relative_error": dict(self.relative_error)}

    def features_depend_on(self) -> dict[str, Any]:
        """Return how the weights are packed, and those that calibration images have chosen."""
        formats = {name: format.as_json() for name, format in self.formats.items()}
        codes = {f"{name}/{key}": tensor for name, tensors in self._codes.items() for key, tensor in tensors.items()}
        digest = {"codes": tensors_sha256(codes)} if codes else {}
        return {"formats": formats, "quantized_share": self.share, **digest}

    def finish(self, model: nn.Module, context: HookContext) -> None:
        """Measure the balance of quantization and adaptation against the float weights, which are read again."""
        with context.overhead.of("balance"):
            images = context.calibration(_BALANCE_IMAGES)
            self.validate_quantization_adaptation_balance(model, reference=context.float_weights(), images=images)

    def record(self, model: nn.Module) -> dict[str, Any]:
        """Return bits by step, and size and error of the packed weights."""
        size = model_size(model)
        stored = sum(layer.stored_bytes for layer in size.layers.values())
        return {
            "bits_history": [BitsEntry(**entry) for entry in self.bits_history],
            "quantization": QuantizationSummary(
                relative_error=self.relative_error,
                balance=self.balance_history,
                size=size,
                quantized_bytes=stored,
                bits_per_weight=8 * stored / sum(layer.weights for layer in size.layers.values()),
            ),
        }


def end_step(config: QaLoraConfig, total_steps: int) -> int:
    """Return the step after which only quantized weights are left; 0 under a constant schedule."""
    if config.quantization_schedule == "constant":
        return 0
    start, end = config.quantization_warmup_steps, config.quantization_end_step
    if end is None:
        end = start + max(1, 2 * (total_steps - start) // 3)
    if end > total_steps or end <= start:
        message = f"the schedule runs from step {start} to {end} and can't finish within {total_steps} steps"
        raise UserError(f"{message}; shorten it or train longer", field="qa_lora.quantization_end_step")
    return end


def quantized_share(config: QaLoraConfig, total_steps: int, steps_done: int) -> float:
    """Return how much of the quantized weight is in use after `steps_done` steps at an even pace, 0 to exactly 1."""
    start, end = config.quantization_warmup_steps, end_step(config, total_steps)
    if steps_done >= end:
        return 1.0
    return share_at(config, max(steps_done - start, 0) / (end - start))


def share_at(config: QaLoraConfig, part: float) -> float:
    """Return the share of a linear or cosine schedule at a part of the way, 0 to 1."""
    return part if config.quantization_schedule == "linear" else (1 - math.cos(math.pi * part)) / 2


def next_part(part: float, steps_left: int, pace: float) -> float:
    """Return the part of the way after one more step of a schedule whose pace is managed.

    An even pace does 1 / steps_left of what is left; it is multiplied by `pace`. The last step does all of it, so
    the way ends at exactly 1 at the end step, and with a pace below 2 not before.

    Args:
        part: of the way done, 0 to 1.
        steps_left: to the end step, this one included.
        pace: 1 is even.
    """
    return 1.0 if steps_left <= 1 else part + pace * (1 - part) / steps_left
