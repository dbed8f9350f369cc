"""A batch in two halves, each on a thread of its own with half of PyTorch's threads.

Between two operations a CPU waits for Python and for its threads to meet. Two halves fill each other's gaps, and what
an operation leaves in a core's cache is there for the next one. Gradients are the sum of the halves', whichever comes
first: adding two numbers does not depend on their order, so steps repeat to the bit.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


def takes_halves(model: nn.Module, device: torch.device) -> bool:
    """Return whether halves are computed as the whole: on a CPU with two threads, where nothing is drawn at random."""
    return device.type == "cpu" and torch.get_num_threads() > 1 and not any(map(_draws, model.modules()))


def in_halves(function: Callable[[_Part], _Result], parts: list[_Part]) -> list[_Result]:
    """Return the results of a function on two parts, computed in parallel."""
    return list(_pool(os.getpid(), torch.get_num_threads()).map(function, parts))


def forward_in_halves(function: Callable[[Tensor], Tensor], images: Tensor, device: torch.device) -> Tensor:
    """Return the result of a forward pass without a graph on images (B, ...), in halves on a CPU with two threads."""

    def forward(part: Tensor) -> Tensor:
        with torch.inference_mode():  # which each thread has for itself
            return function(part)

    if device.type != "cpu" or torch.get_num_threads() < 2 or len(images) < 2:
        return forward(images)
    return torch.cat(in_halves(forward, list(images.tensor_split(2))))


def loss_in_halves(loss_of: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a batch, whose backward pass goes through both halves at a time.

    Args:
        loss_of: images and labels of some of the batch -> what they have in its loss, a scalar with its graph.
        images: (B, ...), of two or more.
        labels: (B, ...).
    """
    halves = list(zip(images.tensor_split(2), labels.tensor_split(2), strict=True))
    return _Halves.apply(torch.zeros((), requires_grad=True), loss_of, halves)


class _Halves(torch.autograd.Function):
    """The sum of two losses; the backward pass adds to the gradients of all that they depend on."""

    @staticmethod
    def forward(
        ctx: Any, _: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor], halves: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        def forward(half: tuple[Tensor, Tensor]) -> Tensor:
            with torch.enable_grad():  # which each thread has for itself
                return loss_of(*half)

        ctx.losses = in_halves(forward, halves)
        first, second = ctx.losses
        return first.detach() + second.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        losses, ctx.losses = ctx.losses, None  # nothing of the graph is held longer than its backward pass
        in_halves(lambda loss: loss.backward(gradients[0]), losses)
        return None, None, None


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return two threads that compute with half of PyTorch's threads each; a process that was forked makes its own."""
    both = Barrier(3)

    def start() -> None:
        torch.get_num_threads()  # a thread's first question of PyTorch sets it to the default, whatever it was
        torch.set_num_threads(threads // 2)
        both.wait()

    pool = ThreadPoolExecutor(2, thread_name_prefix=f"half of {process}")
    for _ in range(2):
        pool.submit(start)
    both.wait()
    torch.set_num_threads(threads)  # theirs is the default of threads to come, otherwise
    return pool


def _draws(module: nn.Module) -> bool:
    """Return whether a module drops something at random in training."""
    rates = (getattr(module, name, 0) for name in ("p", "prob", "drop_prob"))
    return "drop" in type(module).__name__.lower() and any(isinstance(rate, float | int) and rate > 0 for rate in rates)
