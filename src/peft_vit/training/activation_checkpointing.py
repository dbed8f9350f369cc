"""Activation checkpointing (Chen et al., arXiv 1604.06174): blocks are computed again for their gradients.

Where not all blocks are, it is the first ones. A step needs the most memory when its backward pass begins, and then
that of one block after the other falls away. What the first blocks take when they are computed again comes once the
later ones are gone; the last block's would come on top of all that the others have kept, so that computing it again
saves nothing. Where stages differ, as in Swin and Hiera, the first blocks also keep the most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_vit.adapters.adapted_product import saving_first
from peft_vit.backbones import Backbone


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of the backbone that a model is, or wraps, whatever its family."""
    backbone = Backbone.within(model)
    return [backbone.model.get_submodule(name) for name in backbone.blocks]


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let a forward pass within keep each block's inputs alone; its backward pass, wherever it is, computes the rest.

    The gradients are those without, bit for bit: the same operations on the same values, with torch's generators as
    they were, so that a dropout drops the same. Modules, their names and their hooks stay: for a while a block has a
    `forward` of its own. Calls under `no_grad` compute as always.
    """
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        vars(block)["forward"] = partial(checkpoint, partial(saving_first, block.forward), use_reentrant=False)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del vars(block)["forward"]
            else:  # another library had put one there
                vars(block)["forward"] = own
