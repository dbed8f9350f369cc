"""What each update is worth: the loss without it, on images that had no part in training.

Leaving the update of a site out and looking at the loss is the ablation that importance scores claim to predict
(Molchanov et al. 2019, arXiv 1906.10771, sec. 3.1, where the squared rise of the loss defines importance).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_vit.adapters import adapted_sites, update_ranks, without_updates
from peft_vit.backbones import Backbone, Site, evaluating, visit_blocks
from peft_vit.config import Precision
from peft_vit.evaluation.metrics import log_softmax
from peft_vit.records import AdapterRemoval, Role

GROUPS: dict[str, tuple[Role, ...]] = {
    "attention": ("attention",),
    "mlp": ("mlp",),
    "all": ("attention", "mlp", "other"),
}
_LeftOut = frozenset[str]  # names of sites
_WITH_ALL: _LeftOut = frozenset()


def measure_ablation(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device, precision: Precision
) -> AdapterRemoval:
    """Measure loss and accuracy with every update, then without each one, and without those of each group.

    Blocks before the first one that lacks an update compute what they computed with it, so they are passed once. With
    6 sites in each of L blocks it takes about 3 L + 7 full passes in place of 6 L + 4.

    Args:
        model: a Vision Transformer of timm with adapters of this package or of the PEFT library; left as it was.
        batches: images and labels, as for `predict`; at least one.
        device: where the model is.
        precision: of the forward pass.
    """
    ranks = update_ranks(model)
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
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                for case, logits in _logits(model, images.to(device), sites, cases):
                    outputs[case].append(logits.float().cpu().numpy())
            labels.append(targets.numpy())
    truth = np.concatenate(labels)
    found = {case: _loss_and_accuracy(np.concatenate(logits), truth) for case, logits in outputs.items()}
    loss, accuracy = found[_WITH_ALL]
    return AdapterRemoval(
        images=len(truth),
        loss=loss,
        accuracy=accuracy,
        site_loss_rise={name: found[frozenset([name])][0] - loss for name in sites},
        group_loss_rise={group: found[names][0] - loss for group, names in groups.items()},
        group_accuracy={group: found[names][1] for group, names in groups.items()},
    )


def _logits(
    model: nn.Module, images: Tensor, sites: Mapping[str, Site], cases: Iterable[_LeftOut]
) -> list[tuple[_LeftOut, Tensor]]:
    """Return the logits (B, classes) of each case, and those with every update; one block's input is held at a time."""
    by_block: dict[int, list[_LeftOut]] = {}
    for case in cases:
        by_block.setdefault(min(sites[name].layer for name in case), []).append(case)
    found: list[tuple[_LeftOut, Tensor]] = []

    def visit(block: int, rest: Callable[[], Tensor]) -> None:
        for case in by_block.get(block, []):
            with without_updates(model, case):
                found.append((case, rest()))

    backbone = Backbone.within(model)
    with_all = visit_blocks(backbone, lambda: backbone.model(images), visit)
    return [*found, (_WITH_ALL, with_all)]


def _loss_and_accuracy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[float, float]:
    """Return mean cross-entropy in nats, and the share of right predictions."""
    log_probability = log_softmax(logits.astype(np.float64))
    loss = float(-log_probability[np.arange(len(labels)), labels].mean())
    return loss, float((log_probability.argmax(1) == labels).mean())
