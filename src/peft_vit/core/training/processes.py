"""Several processes that train one model: each has its images of every batch, and gradients are summed.

A process with the default group of torch.distributed is one of several, one without is alone, and all here then returns
what it gets. Adapters are a few megabytes, so that one buffer a step holds all gradients and the loss. torch's
DistributedDataParallel would sum them during the backward pass, which hides no time worth having at that size, and
knows nothing of micro-batches, of gradients that a method looks at before its penalty, or of ranks that change.

What is decided (ranks, clipping, the end) follows from sums, and is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from peft_vit.base.errors import UserError
from peft_vit.base.place import ProcessPlace
from peft_vit.core.adapters.resizing import resizing_together

LIMIT_S = 600.0  # of waiting for the others in a step
_LONG_S = 86_400.0  # of waiting for the first process, which alone fits heads and reads checkpoints
_Of = TypeVar("_Of")


class Helped(Exception):  # noqa: N818 - nothing went wrong
    """The first process has what a run came to; this one has done its part."""


class LostProcessError(RuntimeError):
    """Another process of the training has ended, or does not answer within the time limit."""


@dataclass(frozen=True)
class Member(ProcessPlace):
    """A process's place among those of a run.

    Attributes:
        name: of the run in torch's store.
        limit_s: seconds that a step waits for the others.
    """

    name: str
    limit_s: float = LIMIT_S

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Be one of them: gloo between CPUs, nccl between GPUs.

        Raises:
            LostProcessError: if the others do not come.
        """
        on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= self.local_count
        if on_gpus:
            torch.cuda.set_device(self.local_rank)
        limit = timedelta(seconds=self.limit_s)
        with _answered():
            store = dist.TCPStore(self.host, self.port, is_master=False, timeout=limit)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
                store=dist.PrefixStore(self.name, store),
                rank=self.rank,
                world_size=self.count,
                timeout=limit,
            )
        try:
            with patiently(self.local_count):
                yield
        finally:
            dist.destroy_process_group()


@dataclass
class _Meeting:
    """What of processes that have met is not in torch's default group."""

    patient: Any = None  # a group of all of them with another time limit
    local_count: int = 1


_meeting = _Meeting()


@contextmanager
def patiently(local_count: int = 1) -> Iterator[None]:
    """Let processes that have met wait longer for the first one, where it alone has something to do.

    Args:
        local_count: of them on this machine, which share its threads.
    """
    with _answered():
        _meeting.patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=_LONG_S))
    _meeting.local_count = local_count
    try:
        with resizing_together():
            yield
    finally:
        _meeting.patient, _meeting.local_count = None, 1


def local_count() -> int:
    """Return how many processes train the model on this machine and share its threads."""
    return _meeting.local_count


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Return how many processes train the model."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rows(number: int, *, mirrored: bool = False) -> NDArray[np.int64]:
    """Return which of so many rows are this process's, rising; each is of one process.

    Args:
        number: of rows; of fewer than processes some get none.
        mirrored: a row and the one that stands as far from the other end go together, as `mixed` mixes them.
    """
    if not mirrored:
        return np.array_split(np.arange(number), count())[rank()]
    half = np.array_split(np.arange((number + 1) // 2), count())[rank()]
    return np.unique(np.concatenate([half, number - 1 - half]))


def sum_gradients(leaves: Iterable[Tensor], loss: float) -> float:
    """Sum the gradients of parameters and the like over all processes, in place; return the sum of their losses."""
    if count() == 1:
        return loss
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    if not gradients:
        return loss
    last = torch.tensor([loss], dtype=gradients[0].dtype, device=gradients[0].device)
    flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), last])  # (values + 1,)
    with _answered():
        dist.all_reduce(flat)
    *sums, last = flat.split([*(gradient.numel() for gradient in gradients), 1])
    for gradient, total in zip(gradients, sums, strict=True):
        gradient.copy_(total.view_as(gradient))
    return float(last)


def any_of(flag: bool) -> bool:
    """Return whether a flag is set in any process."""
    if count() == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.uint8)
    with _answered():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def gathered(value: _Of) -> list[_Of]:
    """Return what each process gives, in their order; plain values and arrays."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    with _answered():
        dist.all_gather_object(values, value, _meeting.patient)
    return values


def of_first(value: _Of | None) -> _Of:
    """Return what the first process gives; waits as long as that takes."""
    values = [value]
    if count() > 1:
        with _answered():
            dist.broadcast_object_list(values, group=_meeting.patient)
    (given,) = values
    assert given is not None
    return given


def of_all(rows: NDArray[Any] | None) -> NDArray[Any]:
    """Return the rows of all processes together, one's after the other's; None: it has none."""
    return np.concatenate([part for part in gathered(rows) if part is not None])


def in_each(work: Callable[[], _Of]) -> _Of:
    """Return what a function returns here, once it has returned in every process: nobody waits for one that failed.

    Raises:
        UserError: with what the first process that failed says, if it has not failed here.
    """
    failed: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failed = error
    reasons = gathered(None if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    for number, reason in enumerate(reasons):
        if reason is not None:
            raise UserError(f"process {number} of {count()} can't begin ({reason})", field="--devices")
    return result


@contextmanager
def _answered() -> Iterator[None]:
    """Say in one line that another process is gone; torch's backends raise nothing more exact than RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            f"another process of the run has ended, or has not answered in time ({str(error).splitlines()[0][:200]})"
        ) from error
