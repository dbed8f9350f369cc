"""Predictions: how long they take, and what each update is worth to them.

Leaving the update of a site out and looking at the loss is the ablation that importance scores claim to predict
(Molchanov et al. 2019, arXiv 1906.10771, sec. 3.1, where the squared rise of the loss defines importance).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_vit.core.adapters import adapted_sites, update_ranks, without_updates
from peft_vit.core.backbones import Backbone, Site, evaluating, visit_blocks
from peft_vit.core.backbones.passes import class_token_alone
from peft_vit.core.config import Precision
from peft_vit.core.records import AdapterRemoval, Role
from peft_vit.core.tasks import CLASSIFICATION, Task
from peft_vit.core.training.halves import forward_in_halves

WARMUP_PASSES = 5
TIMED_PASSES = 20
GROUPS: dict[str, tuple[Role, ...]] = {
    "attention": ("attention",),
    "mlp": ("mlp",),
    "all": ("attention", "mlp", "other"),
}
Batches: TypeAlias = Iterable[tuple[Tensor, Tensor]]  # images (B, 3, S, S) and labels (B,)
LogitsAndLabels: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]  # (N, classes) and (N,)
_LeftOut = frozenset[str]  # names of sites
_WITH_ALL: _LeftOut = frozenset()


# --- forward passes ---------------------------------------------------------------------------------------------------


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's parameters are."""
    return next(model.parameters()).device


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return torch's autocast to bfloat16, which does nothing where the precision is float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def predict(model: nn.Module, batches: Batches, *, precision: Precision) -> LogitsAndLabels:
    """Return logits (N, classes) and labels (N,) over all batches, in their order."""
    return _pass(model, model, batches, precision)


def predict_with_middle(
    model: nn.Module, batches: Batches, *, precision: Precision
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Return logits and labels as `predict`, to the bit, and (N, D) of `Backbone.logits_and_middle`."""
    backbone = Backbone(model)

    def forward(images: Tensor) -> Tensor:
        return torch.cat([part.float() for part in backbone.logits_and_middle(images)], dim=-1)

    rows, labels = _pass(model, forward, batches, precision)
    logits, middle = np.split(rows, [backbone.head.out_features], axis=1)
    return logits, labels, middle


@torch.inference_mode()
def _pass(
    model: nn.Module, output_of: Callable[[Tensor], Tensor], batches: Batches, precision: Precision
) -> LogitsAndLabels:
    rows, labels, device = [], [], device_of(model)

    def forward(images: Tensor) -> Tensor:
        with autocast(device, precision):
            return output_of(images.to(device))  # (B, 3, S, S) -> (B, columns)

    with evaluating(model), class_token_alone(model):
        for images, targets in batches:
            rows.append(forward_in_halves(forward, images, device).float().cpu().numpy())
            labels.append(targets.numpy())
    return np.concatenate(rows), np.concatenate(labels)  # (N, columns), (N,)


@torch.inference_mode()
def forward_s(model: nn.Module, images: Tensor, *, precision: Precision) -> float:
    """Return the median seconds of a forward pass over 20, after 5 that only warm up.

    A pass goes from images on the model's device to logits there, in evaluation mode, under autocast if the precision
    says so; reading, decoding, normalising and moving images is left out. Other work on the machine counts in.

    Args:
        model: left as it was.
        images: a batch (B, 3, S, S), normalised, where the model is.
        precision: of the forward pass.
    """
    seconds = []
    with evaluating(model):
        for _ in range(WARMUP_PASSES + TIMED_PASSES):
            started = time.perf_counter()
            with autocast(images.device, precision):
                model(images)
            if images.device.type != "cpu":  # it works on its own: a call returns before its result is there
                torch.accelerator.synchronize(images.device)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARMUP_PASSES:])


# --- without single updates -------------------------------------------------------------------------------------------


def measure_ablation(
    model: nn.Module, batches: Batches, *, precision: Precision, task: Task = CLASSIFICATION
) -> AdapterRemoval:
    """Measure loss and accuracy with every update, then without each one, and without those of each group.

    Blocks before the first one that lacks an update compute what they computed with it, so they are passed once. With
    6 sites in each of L blocks it takes about 3 L + 7 full passes instead of 6 L + 4.

    Args:
        model: a Vision Transformer of timm with adapters of this package or of the PEFT library; left as it was.
        batches: images and labels, as for `predict`; at least one.
        precision: of the forward pass.
        task: that the model learned.
    """
    ranks, device = update_ranks(model), device_of(model)
    sites = {name: site for name, site in adapted_sites(model).items() if ranks.get(name)}
    members = {
        group: frozenset(name for name, site in sites.items() if site.role in roles) for group, roles in GROUPS.items()
    }
    groups = {group: names for group, names in members.items() if names}
    cases = dict.fromkeys([*(frozenset([name]) for name in sites), *groups.values()])  # some groups may be equal
    outputs: dict[_LeftOut, list[NDArray[np.float32]]] = {case: [] for case in (_WITH_ALL, *cases)}
    labels: list[NDArray[np.int64]] = []
    with evaluating(model), torch.inference_mode():
        for images, targets in batches:
            with autocast(device, precision):
                for case, logits in _logits(model, images.to(device), sites, cases):
                    outputs[case].append(logits.float().cpu().numpy())
            labels.append(targets.numpy())
    truth = np.concatenate(labels)  # (N,)
    metrics = {case: task.measure(np.concatenate(logits), truth) for case, logits in outputs.items()}
    loss = metrics[_WITH_ALL].nll
    return AdapterRemoval(
        images=len(truth),
        loss=loss,
        accuracy=metrics[_WITH_ALL].accuracy,
        site_loss_rise={name: metrics[frozenset([name])].nll - loss for name in sites},
        group_loss_rise={group: metrics[names].nll - loss for group, names in groups.items()},
        group_accuracy={group: metrics[names].accuracy for group, names in groups.items()},
    )


def _logits(
    model: nn.Module, images: Tensor, sites: Mapping[str, Site], cases: Iterable[_LeftOut]
) -> list[tuple[_LeftOut, Tensor]]:
    """Return the logits (B, classes) of each case, and those with every update; one block's input is held at a time."""
    by_block: dict[int, list[_LeftOut]] = {}
    for case in cases:
        by_block.setdefault(min(sites[name].layer for name in case), []).append(case)
    logits: list[tuple[_LeftOut, Tensor]] = []

    def visit(block: int, rest: Callable[[], Tensor]) -> None:
        for case in by_block.get(block, []):
            with without_updates(model, case):
                logits.append((case, rest()))

    backbone = Backbone.within(model)
    with_all = visit_blocks(backbone, lambda: backbone.model(images), visit)
    return [*logits, (_WITH_ALL, with_all)]
