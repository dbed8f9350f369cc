"""Methods for trainings of twelve steps, each as a function that prepares a plain model and returns its hooks."""

from collections.abc import Callable
from typing import Any

from qa_lora_settings import config as qa_lora
from torch import nn

from peft_vit import AdaLoraConfig, AdaLoRAController, QALoRATrainer
from peft_vit.core.adapters import attach_adapters, freeze_backbone
from peft_vit.core.backbones import find_sites
from peft_vit.core.config import PeftAdaLoraConfig, PeftLoraConfig
from peft_vit.core.training import AllocationHook, Hook, PeftAdaLoraHook

STEPS = 12
Prepare = Callable[[nn.Module], list[Hook]]


class DeployableFrom(Hook):
    """A hook that only forbids early states."""

    name = "late"

    def __init__(self, step: int) -> None:
        self.step = step

    def deployable(self, step: int) -> bool:
        """Say whether the step has come."""
        return step >= self.step


def linear(model: nn.Module) -> list[Hook]:
    """Train the head alone."""
    freeze_backbone(model)
    return []


def full(model: nn.Module) -> list[Hook]:
    """Train everything."""
    return []


def lora(model: nn.Module) -> list[Hook]:
    """Attach LoRA of rank 2."""
    attach_adapters(model, find_sites(model), 2, scale=2.0, seed=0)
    return []


def adalora(pool: int = 1, **settings: Any) -> Prepare:
    """Let a controller share ranks."""

    def prepare(model: nn.Module) -> list[Hook]:
        default = {
            "total_rank_budget": 18,
            "allocation_strategy": "proportional",
            "importance_metric": "sensitivity",
            "update_frequency": 2,
            "warmup_steps": 3,
            "final_steps": 3,
        }
        made = AdaLoraConfig(**{**default, **settings})
        return [AllocationHook(AdaLoRAController(model, made, STEPS, seed=3, pool=pool))]

    return prepare


def quantized(**settings: Any) -> Prepare:
    """Quantize under LoRA of rank 2."""
    return lambda model: [QALoRATrainer(model, qa_lora(rank=2, **settings), STEPS, seed=3)]


def both(model: nn.Module) -> list[Hook]:
    """Quantize under adapters whose ranks move."""
    settings = qa_lora(quantization_schedule="cosine", targets=("out", "fc2"))
    ranks = adalora(settings.pool, total_rank_budget=10, scale=settings.scale, targets=settings.targets)
    (allocation,) = ranks(model)
    return [allocation, QALoRATrainer(model, settings, STEPS, seed=3)]


def peft_lora(model: nn.Module) -> list[Hook]:
    """Let PEFT attach LoRA of rank 2."""
    from peft_vit.core.adapters.peft_tuner import attach_peft_lora

    attach_peft_lora(model, PeftLoraConfig(rank=2), seed=3)
    return []


def peft_adalora(model: nn.Module) -> list[Hook]:
    """Let PEFT attach AdaLoRA."""
    settings = PeftAdaLoraConfig(initial_rank=4, target_rank=2, warmup_steps=2, update_frequency=2, final_steps=3)
    return [PeftAdaLoraHook(model, settings, STEPS, seed=3)]


# 12 sites share 18 ranks: sites without rank, probes, growth
GROWING: dict[str, Any] = {"budget_schedule": "constant", "parametrization": "product", "importance_metric": "fisher"}
METHODS: dict[str, Prepare] = {
    "linear": linear,
    "full": full,
    "lora": lora,
    "peft_lora": peft_lora,
    "peft_adalora": peft_adalora,
    "adalora": adalora(parametrization="svd", initial_budget=30),
    "growing": adalora(**GROWING),
    "orthonormal": adalora(parametrization="svd", factor_start="orthonormal"),
    "global": adalora(parametrization="svd", allocation_strategy="global"),
    "random": adalora(importance_metric="random", allocation_strategy="threshold", threshold_tau=1.5),
    "with_penalty": adalora(parametrization="svd", importance_gradient="task_and_penalty"),
    "qa_lora": quantized(quantization_schedule="linear", quantization_warmup_steps=2),
    "managed_pace": quantized(
        quantization_schedule="cosine", balance_target=0.5, balance_by="schedule_pace", quantization_end_step=12
    ),
    "managed_scale": quantized(gradient_scaling="adaptive", balance_target=2.0),
    "qa_adalora": both,
}
