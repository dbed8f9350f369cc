"""Gradients of layers' outputs, and what layers see, on a batch of training images; the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peft_vit.backbones import evaluating

BACKWARD_IMAGES = 8  # gradients of a layer's outputs exist for as many images at once


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without trainable parameters for a while."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def layer_gradients(
    model: nn.Module,
    modules: Sequence[str],
    images: Tensor,
    logits: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor, slice], Tensor],
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (module, gradient by its outputs (B, ..., out), its inputs (B, ..., in)) of each batch of B images.

    Args:
        model: frozen; only activations have gradients, so that no gradient of all weights is formed.
        modules: linear layers.
        images: (N, C, S, S).
        logits: of a batch of images, by the model.
        loss: of a batch's logits and its place among the images.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            x = given[0].detach()
            output.register_hook(lambda gradient: seen.update({name: (gradient, x)}))

        return forward

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in modules]
    try:
        for start in range(0, len(images), BACKWARD_IMAGES):
            part = slice(start, start + BACKWARD_IMAGES)
            loss(logits(images[part].clone().requires_grad_()), part).backward()
            for name in modules:
                yield name, *seen.pop(name)
    finally:
        for handle in handles:
            handle.remove()


def squared_singular_values(matrix: Tensor) -> Tensor:
    """Return the squared singular values of a matrix, (smaller side,) float64 on the CPU, the largest first.

    They are the eigenvalues of the smaller product of the matrix with its transpose: several times as fast as the
    singular values.
    """
    matrix = matrix.double().cpu()
    squares = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix  # of the smaller side
    return torch.linalg.eigvalsh(squares).flip(0).clamp(min=0)
