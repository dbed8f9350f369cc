"""Trainings of twenty steps by each method, by one process or by several that have met, and what they leave."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import prepared_methods
import torch
import torch.distributed as dist
from timm.models import VisionTransformer
from torch import nn

from peft_vit.core.adapters import current_ranks, integer_product, trained_tensors, use_int8_matmul
from peft_vit.core.config import TrainingConfig
from peft_vit.core.quantization.integers import EXPORTED_MATMUL
from peft_vit.core.training import (
    AllocationHook,
    CheckpointKeeper,
    Checkpoints,
    Hook,
    PeftAdaLoraHook,
    QALoRATrainer,
    RuntimeConfig,
    State,
    processes,
    train,
)
from peft_vit.core.training.checkpoint import tensors_sha256
from peft_vit.core.training.images import Data, HoldoutImages, LabelledImages
from peft_vit.core.training.processes import Member

PATIENCE_S = 900  # for what takes seconds on an idle machine
STEPS = 20
BATCH = 32


class FirstGradients(Hook):
    """Keeps the gradients of the first step, as hooks get them, and those of the loss before they are clipped."""

    name = "first_gradients"

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Copy them."""
        if step == 1:
            named = model.named_parameters()
            self.gradients = {name: own.grad.clone() for name, own in named if own.grad is not None}


def model_of(double: bool) -> nn.Module:
    """Return a random VisionTransformer of two blocks for 32 px."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "num_classes": 5}
        model = VisionTransformer(img_size=32, patch_size=8, **sizes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double() if double else model


def images_of(train_images: int, validation: int = 21) -> Data:
    """Return images of 5 classes whose grey level tells the class."""
    rng = np.random.default_rng(0)

    def split(count: int) -> LabelledImages:
        labels = np.arange(count) % 6 % 5
        levels = 40 * labels[:, None, None, None] + rng.integers(0, 60, (count, 32, 32, 3))
        return LabelledImages(levels.astype(np.uint8), labels.astype(np.int64))

    names, test = tuple(f"class {k}" for k in range(5)), split(5)
    holdout = HoldoutImages(test, np.bincount(test.labels, minlength=5))
    groups = np.arange(train_images + validation + 5)
    return Data(names, split(train_images), split(validation), holdout, "d" * 64, "s" * 64, groups)


@contextmanager
def rounded_rows() -> Iterator[list[torch.Tensor]]:
    """Yield the codes of all activations that are rounded to 8 bits meanwhile, (rows, width) of a product each."""
    codes: list[torch.Tensor] = []
    usual = integer_product._quantize_in_parts

    def noted(*given: Any, **named: Any) -> Any:
        result = usual(*given, **named)
        codes.append(result[0].clone())
        return result

    integer_product._quantize_in_parts = noted
    try:
        yield codes
    finally:
        integer_product._quantize_in_parts = usual


def trained(
    method: str,
    settings: Mapping[str, Any],
    *,
    images: int = 69,
    double: bool = True,
    resume: State | None = None,
    between_steps: Callable[[int, Callable[[], State]], None] | None = None,
) -> dict[str, Any]:
    """Train by a method with settings of `training`, and return what is left of it; here or in one of several.

    69 images make batches of 32, 32 and 5.
    """
    model = model_of(double=False)
    with patch.object(prepared_methods, "STEPS", STEPS):
        hooks: list[Any] = [FirstGradients(), *prepared_methods.METHODS[method](model)]
    if double:
        model.double()
        model.register_forward_pre_hook(lambda _, given: (given[0].double(),))
    given: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "learning_rate": 3e-3, "augmentation": ("flip",)}
    given |= settings
    given["augmentation"] = tuple(given["augmentation"])
    config = TrainingConfig(**given)
    if config.compute == "int8":
        use_int8_matmul(model, EXPORTED_MATMUL)  # exact on any processor, and chosen by no clock
    runtime = RuntimeConfig(torch.device("cpu"), "fp32", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    named: dict[str, Any] = {"hooks": hooks, "resume": resume, "between_steps": between_steps}
    result = train(model, images_of(images), config, runtime, seed=4, **named)
    tensors = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    return {
        "gradients": hooks[0].gradients,
        "tensors": tensors,
        "ranks": current_ranks(model),
        "sha256": tensors_sha256(tensors),
        "optimizer_sha256": result.optimizer_sha256,
        "steps": [row.model_dump(exclude={"seconds"}) for row in result.steps],
        "evaluations": [evaluation.model_dump() for evaluation in result.evaluations],
        "chosen_step": result.chosen_step,
        "history": [own for hook in hooks if (own := history_of(hook)) is not None],
        "bits": [hook.bits_history for hook in hooks if isinstance(hook, QALoRATrainer)],
    }


def history_of(hook: Hook) -> Any:
    """Return the ranks by step of a hook that decides about them."""
    if isinstance(hook, AllocationHook):
        return hook.controller.rank_history
    return hook.rank_history if isinstance(hook, PeftAdaLoraHook) else None


def trained_each(cases: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return what several trainings leave, by name."""
    return {name: trained(method, settings, **named) for name, (method, settings, named) in cases.items()}


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A training was stopped on purpose."""


def first_codes() -> list[torch.Tensor]:
    """Return the codes of the activations of the first step, (rows, width) of a product each."""

    def stop(step: int, _: Any) -> None:
        if step == 1:
            raise Stopped

    with rounded_rows() as codes, suppress(Stopped):
        trained("lora", {"compute": "int8"}, double=False, between_steps=stop)
    return codes


def resumed(folder: Path, stop_at: int | None) -> dict[str, Any] | None:
    """Train ranks that grow from the newest checkpoint in a folder on; write one after a step, and stop there."""
    first = processes.rank() == 0
    keeper = CheckpointKeeper(Checkpoints(folder))

    def stop(step: int, state: Callable[[], State]) -> None:
        if step == stop_at:
            if first:
                keeper.keep(step, state)
            raise Stopped

    with suppress(Stopped):
        return trained("growing", {}, resume=keeper.newest() if first else None, between_steps=stop)
    return None


def together(
    work: Callable[..., Any],
    count: int,
    folder: Path,
    *arguments: Any,
    survivors: int | None = None,
    limit_s: float = PATIENCE_S,
) -> list[Any]:
    """Return what a function of a module returns in each of several processes that have met, of the first survivors."""
    survivors = count if survivors is None else survivors
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    files = [folder / f"{rank}.pt" for rank in range(count)]
    members = [Member(rank, count, rank, count, "127.0.0.1", store.port, "run", limit_s) for rank in range(count)]
    started = [
        context.Process(target=_work, args=(member, file, work, arguments), daemon=True)
        for member, file in zip(members, files, strict=True)
    ]
    for process in started:
        process.start()
    for process in started[:survivors]:
        process.join(PATIENCE_S)
    for process in started[survivors:]:
        process.kill()
    assert [process.exitcode for process in started[:survivors]] == [0] * survivors
    return [torch.load(file, weights_only=False) for file in files[:survivors]]


def _work(member: Member, file: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    with member.joined():
        torch.save(work(*arguments), file)
