"""Tells whether the machine was busy with something else while a time was measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

_DURATION_S = 0.1
_SIDE = 256  # of the matrices: a product takes a fraction of a millisecond
_DISAGREE = 0.20  # of the faster speed: clocks that rise and fall with heat change less
_NOT_OURS = 0.15  # of a core's time


@dataclass(frozen=True)
class Speed:
    """How fast the machine is just now: products a second on one core, and the share of that core's time it took."""

    products_per_s: float
    cpu_share: float


def machine_speed() -> Speed:
    """Multiply matrices on one core for a tenth of a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix = torch.full((_SIDE, _SIDE), 1 / _SIDE)
    count = 0
    started, cpu_started = time.perf_counter(), time.thread_time()
    while (seconds := time.perf_counter() - started) < _DURATION_S:
        matrix = matrix @ matrix
        count += 1
    cpu_s = time.thread_time() - cpu_started
    torch.set_num_threads(threads)
    return Speed(count / seconds, cpu_s / seconds)


def disturbance(before: Speed, after: Speed) -> str | None:
    """Return why a time that was measured in between is not worth keeping, None if it is.

    Args:
        before: speed of the machine right before.
        after: speed right after.
    """
    slower, faster = sorted((before.products_per_s, after.products_per_s))
    if slower < (1 - _DISAGREE) * faster:
        return f"its speed before and after differs by {1 - slower / faster:.0%}, more than {_DISAGREE:.0%}"
    share = min(before.cpu_share, after.cpu_share)
    if share < 1 - _NOT_OURS:
        return f"other programs took {1 - share:.0%} of a core, more than {_NOT_OURS:.0%}"
    return None
