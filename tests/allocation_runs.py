"""A controller in a plain loop, for several test files."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_vit import AdaLoraConfig, AdaLoRAController

STEPS = 9


config = partial(
    AdaLoraConfig,
    total_rank_budget=15,
    allocation_strategy="proportional",
    importance_metric="gradient_norm",
    update_frequency=2,
    warmup_steps=2,
    final_steps=2,
)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3)


def start(
    model: nn.Module, settings: AdaLoraConfig, steps: int = STEPS, seed: int = 0
) -> tuple[AdaLoRAController, torch.optim.Optimizer]:
    controller = AdaLoRAController(model, settings, steps, seed=seed)
    return controller, optimizer_of(model)


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    F.cross_entropy(model(batch[0]), batch[1]).backward()


def scored(
    model: nn.Module, controller: AdaLoRAController, batch: tuple[Tensor, Tensor], step: int
) -> dict[str, float]:
    backward(model, batch)
    return controller.update_importance_scores(model, step)


def train_step(
    model: nn.Module,
    controller: AdaLoRAController,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    step: int,
    scores: dict[str, float] | None = None,
) -> dict[str, int]:
    """Do a step, whose decision may see other scores than the measured ones."""
    measured = scored(model, controller, batch, step)
    optimizer.step()
    ranks = controller.reallocate_ranks(scores or measured, step)
    controller.apply_ranks(model, optimizer, ranks)
    optimizer.zero_grad()
    return ranks


def train(
    model: nn.Module,
    controller: AdaLoRAController,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    steps: Iterable[int] = range(1, STEPS + 1),
) -> None:
    for step in steps:
        train_step(model, controller, optimizer, batch, step)
