"""What each update is worth: the loss without it, on images that had no part in training.

Leaving the update of a site out and looking at the loss is the ablation that importance scores claim to predict
(Molchanov et al. 2019, arXiv 1906.10771, sec. 3.1, where the squared rise of the loss defines importance).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_vit.adapters import update_ranks, vision_transformer, without_updates
from peft_vit.backbones import find_sites, fused_sites
from peft_vit.config import SITE_MATRICES, Precision, SiteMatrix
from peft_vit.evaluation.metrics import log_softmax
from peft_vit.records import AdapterRemoval, SiteInfo

GROUPS: dict[str, tuple[SiteMatrix, ...]] = {
    "attention": ("qkv", "query", "key", "value", "out"),
    "mlp": ("fc1", "fc2"),
    "all": SITE_MATRICES,
}
_LeftOut = frozenset[str]  # names of sites
_WITH_ALL: _LeftOut = frozenset()


def measure_removal(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device, precision: Precision
) -> AdapterRemoval:
    """Measure loss and accuracy with every update, then without each one, and without those of each group.

    Blocks before the first one that lacks an update compute what they computed with it, so they are passed once. With
    6 sites in each of L blocks it takes about 3 L + 7 full passes in place of 6 L + 4.

    Args:
        model: a timm VisionTransformer with adapters of this package or of the PEFT library; left as it was.
        batches: images and labels, as for `predict`; at least one.
        device: where the model is.
        precision: of the forward pass.
    """
    ranks = update_ranks(model)
    sites = {name: site for name, site in _known_sites(model).items() if ranks.get(name)}
    members = {group: _members(sites, matrices) for group, matrices in GROUPS.items()}
    groups = {group: names for group, names in members.items() if names}
    cases = dict.fromkeys([*(frozenset([name]) for name in sites), *groups.values()])  # some groups may be equal
    outputs: dict[_LeftOut, list[NDArray[np.float32]]] = {case: [] for case in (_WITH_ALL, *cases)}
    labels: list[NDArray[np.int64]] = []
    with _evaluating(model):
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


def _known_sites(model: nn.Module) -> dict[str, SiteInfo]:
    """Return every site that could carry an update, block by block; PEFT's are those of fused matrices."""
    sites = find_sites(model)
    known = [*fused_sites(sites).values(), *(site.info() for site in sites)]
    return {site.name: site for site in sorted(known, key=lambda site: (site.block, SITE_MATRICES.index(site.matrix)))}


def _members(sites: Mapping[str, SiteInfo], matrices: Collection[SiteMatrix]) -> _LeftOut:
    return frozenset(name for name, site in sites.items() if site.matrix in matrices)


def _logits(
    model: nn.Module, images: Tensor, sites: Mapping[str, SiteInfo], cases: Iterable[_LeftOut]
) -> Iterator[tuple[_LeftOut, Tensor]]:
    """Yield the logits (B, classes) of each case, and those with every update; one block's input is held at a time."""
    vit: Any = vision_transformer(model)  # timm's forward(), taken apart where the blocks begin and end
    by_block: dict[int, list[_LeftOut]] = {}
    for case in cases:
        by_block.setdefault(min(sites[name].block for name in case), []).append(case)
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))  # (B, T, D)
    for block, module in enumerate(vit.blocks):
        for case in by_block.get(block, []):
            with without_updates(model, case):
                yield case, vit.forward_head(vit.norm(vit.blocks[block:](x)))
        x = module(x)
    yield _WITH_ALL, vit.forward_head(vit.norm(x))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _loss_and_accuracy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[float, float]:
    """Return mean cross-entropy in nats, and the share of right predictions."""
    log_probability = log_softmax(logits.astype(np.float64))
    loss = float(-log_probability[np.arange(len(labels)), labels].mean())
    return loss, float((log_probability.argmax(1) == labels).mean())
