"""QALoRATrainer: trains adapters on weights that are, or become, low-bit (QA-LoRA, arXiv 2309.14717).

In anybody's own loop::

    trainer = QALoRATrainer(model, config, total_steps=600)               # quantizes, attaches the adapters
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(1, 601):                                            # steps count from 1
        loss = cross_entropy(model(images), labels)
        trainer.training_step(model, optimizer, loss, step)               # backward, scaling, clipping, step, zero_grad
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_vit.adapters import adapted_modules, attach_adapters, site_adapters
from peft_vit.backbones import find_sites
from peft_vit.config import QaLoraConfig
from peft_vit.errors import SilentNoEffectWarning, UserError
from peft_vit.quantization import QuantizationFormat, quantize
from peft_vit.training.optimization import optimization_step

_FLOAT_BITS = 32.0


def quantized_share(config: QaLoraConfig, total_steps: int, steps_done: int) -> float:
    """Return how much of the quantized weight is in use after `steps_done` steps, 0 to exactly 1.

    With t the part of the way from `quantization_warmup_steps` to the end step: constant 1, linear t, cosine
    (1 - cos(pi t)) / 2.
    """
    if config.quantization_schedule == "constant":
        return 1.0
    start, end = config.quantization_warmup_steps, end_step(config, total_steps)
    part = min(max((steps_done - start) / (end - start), 0.0), 1.0)
    if part == 1.0 or config.quantization_schedule == "linear":
        return part
    return (1 - math.cos(math.pi * part)) / 2


def end_step(config: QaLoraConfig, total_steps: int) -> int:
    """Return the step after which only quantized weights are left.

    Raises:
        UserError: if the schedule can't finish within the run.
    """
    end = config.quantization_end_step
    if end is None:
        end = config.quantization_warmup_steps + max(1, 2 * (total_steps - config.quantization_warmup_steps) // 3)
    if end > total_steps or end <= config.quantization_warmup_steps:
        raise UserError(
            f"the schedule runs from step {config.quantization_warmup_steps} to {end} and can't finish within "
            f"{total_steps} steps; shorten it or train longer",
            field="qa_lora.quantization_end_step",
        )
    return end


def format_of(config: QaLoraConfig) -> QuantizationFormat:
    """Return the storage of the frozen weights: fp16 scales, and fp16 offsets where groups make the merge exact."""
    grouped = config.use_group_quantization
    assert config.quantization_type is not None
    return QuantizationFormat(
        type=config.quantization_type,
        group_size=config.group_size if grouped else None,
        offset=config.offset,
        scale_dtype=torch.float32 if config.scale_precision == "fp32" else torch.float16,
    )


class QALoRATrainer:
    """Quantization-aware LoRA on a timm VisionTransformer.

    With groups, the adapter's input is summed over the quantizer's groups, so that the trained update can be moved
    into the offsets. Without groups, it is a plain LoRA adapter over a quantized weight (QLoRA, arXiv 2305.14314).

    Args:
        model: a timm VisionTransformer without adapters; they are attached and its sites' weights are quantized.
        config: the settings, see `config.QaLoraConfig`.
        total_steps: optimiser steps of the whole run; the schedule depends on it.
        seed: of the adapters' start.
        clip_norm: largest gradient norm; None: no clipping.

    Raises:
        UserError: if the model is of another class, a group does not divide a site's inputs, the rank lies above the
            number of groups, or the schedule does not fit the steps.
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
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self.clip_norm = clip_norm
        self.last_step = 0 if config.quantization_schedule == "constant" else end_step(config, total_steps)
        sites = find_sites(model, config.targets)
        pool = config.group_size if config.use_group_quantization else 1
        for site in sites:
            check_rank(site.name, site.in_features, site.out_features, config.fixed_rank, pool)
        attach_adapters(
            model, sites, dict.fromkeys((site.name for site in sites), config.fixed_rank),
            scale=config.scale, seed=seed, pool=pool,
        )  # fmt: skip
        self.relative_error: dict[str, float] = {}
        self._error_norm: dict[str, float] = {}
        storage = format_of(config)
        for name, module in adapted_modules(model):
            assert module.weight is not None
            norm = float(module.weight.norm())
            self.relative_error[name] = module.set_quantized(quantize(module.weight.detach(), storage))
            self._error_norm[name] = self.relative_error[name] * norm
        self.share_history: list[dict[str, float]] = []
        self.bits_history: list[dict[str, Any]] = []
        self.balance_history: list[dict[str, float]] = []
        self._set_share(model, 0)

    def _set_share(self, model: nn.Module, steps_done: int) -> None:
        share = quantized_share(self.config, self.total_steps, steps_done)
        before = self.share_history[-1]["share"] if self.share_history else None
        self.share_history.append({"step": steps_done, "share": share})
        if before == 1.0:
            return  # the float weights are gone already
        bits = {}
        for name, module in adapted_modules(model):
            assert module.quantized is not None
            module.quantized_share = share
            packed = module.quantized.bits_per_weight
            bits[name] = packed if share == 1.0 else _FLOAT_BITS + packed
            if share == 1.0:
                module.drop_float()
        if not self.bits_history or share == 1.0:
            self.bits_history.append({"step": steps_done, "bits_per_weight": bits})

    @property
    def share(self) -> float:
        """Return the quantized share in use now."""
        return self.share_history[-1]["share"]

    def training_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, step: int
    ) -> dict[str, float]:
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

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing: the model was prepared at the start, and any optimiser will do."""

    def penalties(self, model: nn.Module) -> dict[str, Tensor]:
        """Return nothing: QA-LoRA adds no term to the loss."""
        return {}

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Multiply the adapters' gradients by `gradient_scaling_factor`; the head's stay.

        Under Adam a constant factor cancels, except through clipping, weight decay and epsilon; under SGD it acts as
        a factor on the adapters' learning rate.
        """
        if self.config.gradient_scaling_factor == 1.0:
            return
        for adapter in site_adapters(model).values():
            for parameter in adapter.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.config.gradient_scaling_factor)

    def before_step(self, model: nn.Module, step: int) -> None:
        """Do nothing: there is no penalty to wait for."""

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Move the schedule on; at its end the float weights are freed."""
        adaptive = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
        if step == 1 and adaptive and self.config.gradient_scaling_factor != 1.0:
            warnings.warn(
                f"gradient_scaling_factor {self.config.gradient_scaling_factor} nearly cancels under "
                f"{type(optimizer).__name__}; only clipping, weight decay and epsilon see it",
                SilentNoEffectWarning,
                stacklevel=2,
            )
        self._set_share(model, step)

    def notes(self) -> dict[str, float]:
        """Return the quantized share in use."""
        return {"quantized_share": self.share}

    def deployable(self, step: int) -> bool:
        """Say whether only quantized weights are left."""
        return step >= self.last_step

    def _warn_if_unused(self) -> None:
        if self.config.quantization_schedule != "constant" and len(self.share_history) == 1:
            warnings.warn(
                "no training_step was taken, so the schedule has not moved and the weights are still float",
                SilentNoEffectWarning,
                stacklevel=3,
            )

    @torch.no_grad()
    def validate_quantization_adaptation_balance(self, model: nn.Module) -> dict[str, float]:
        """Measure how the adapters compare with the error that quantization made, and keep the row.

        Returns:
            relative_quantization_error: mean over modules of ||W - Wq||_F / ||W||_F, at full quantization.
            signal_to_noise_db: mean over modules of 20 log10(||W||_F / ||W - Wq||_F).
            adapter_to_error_ratio: mean over modules of ||dW||_F / ||W - Wq||_F.
            quantized_share: in use now, 0 to 1.
        """
        self._warn_if_unused()
        ratios = []
        for name, module in adapted_modules(model):
            energy = sum(float(adapter.delta().square().sum()) for _, adapter in module.adapters() if adapter.rank)
            ratios.append(math.sqrt(energy) / self._error_norm[name] if self._error_norm[name] else math.inf)
        errors = np.array(list(self.relative_error.values()))
        row = {
            "relative_quantization_error": float(errors.mean()),
            "signal_to_noise_db": float(np.mean(-20 * np.log10(errors))) if errors.all() else math.inf,
            "adapter_to_error_ratio": float(np.mean(ratios)),
            "quantized_share": self.share,
        }
        self.balance_history.append({"step": self.share_history[-1]["step"], **row})
        return row

    def export_quantization_data(self) -> dict[str, Any]:
        """Return schedule, errors, bits and balance by step, as plain values ready for JSON."""
        self._warn_if_unused()
        return {
            "config": self.config.model_dump(mode="json"),
            "schedule": [dict(row) for row in self.share_history],
            "relative_error": dict(self.relative_error),
            "bits": [dict(row) for row in self.bits_history],
            "balance": [dict(row) for row in self.balance_history],
        }


def check_rank(site: str, in_features: int, out_features: int, rank: int, pool: int) -> None:
    """Refuse a rank or a group size that a site can't carry; `pool` is 1 without groups.

    Raises:
        UserError: naming the site and the reason.
    """
    if in_features % pool:
        raise UserError(f"{pool} does not divide the {in_features} inputs of {site}", field="qa_lora.group_size")
    largest = min(out_features, in_features // pool)
    if rank > largest:
        reason = f"{in_features} inputs in groups of {pool} allow" if pool > 1 else "its smaller side allows"
        raise UserError(f"rank {rank} is wasted on {site}: {reason} at most {largest}; lower it", field="rank")
