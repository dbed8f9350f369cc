"""Activations kept for the backward pass in 8 bits; forward passes stay exact.

A group of 64 neighbours x has one scale s = max |x| / 127 in bfloat16, rounded up, and codes round(x / s) in int8: 8.25
bits a value. What is read again is off by at most s / 2, so gradients are approximate, by the noise of the activations
that they are multiplied with. Keeping activations in few bits by group is ActNN's idea (arXiv 2104.14129); its rounding
is random and its codes are 2 bits, so that the noise has to be unbiased. At 8 bits the nearest code is near enough.

Kept so are the inputs and outputs of attention, and what a layer under an adapter keeps where an activation function or
attention comes before it. Inputs of norms stay as they are: the residual stream has values of very different size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_GROUP = 64
_LARGEST_CODE = 127
_VALUES_AT_ONCE = 1 << 17  # so that what is computed on the way stays in a core's cache


@dataclass(frozen=True, eq=False)
class EightBits:
    """A tensor in codes.

    Attributes:
        codes: int8, (values,), rounded up to whole groups.
        scales: bfloat16, (groups,).
        shape: of the tensor.
        dtype: of the tensor.
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    @torch.no_grad()
    def of(cls, values: Tensor) -> EightBits:
        """Return a tensor in codes."""
        active = _ACTIVE.get()
        if active is not None:
            active.stored += values.numel()
        flat = values.detach().reshape(-1)
        groups = -(-len(flat) // _GROUP)
        if groups * _GROUP > len(flat):
            flat = F.pad(flat, (0, groups * _GROUP - len(flat)))
        grouped = flat.view(groups, _GROUP)
        codes = torch.empty(groups, _GROUP, dtype=torch.int8, device=flat.device)
        scales = torch.empty(groups, dtype=torch.bfloat16, device=flat.device)
        for rows in _pieces(groups):
            some = grouped[rows].float()  # (n, 64)
            largest = torch.linalg.vector_norm(some, torch.inf, dim=1)
            largest *= (1 + 2**-7) / _LARGEST_CODE  # bfloat16 may round down by 2^-8
            scales[rows] = largest.clamp_min_(torch.finfo(torch.bfloat16).tiny)
            codes[rows] = (some / scales[rows].float().unsqueeze(1)).round_()
        return cls(codes.view(-1), scales, values.shape, values.dtype)

    @torch.no_grad()
    def restored(self) -> Tensor:
        """Return the tensor, contiguous."""
        grouped = self.codes.view(-1, _GROUP)
        values = torch.empty(grouped.shape, dtype=self.dtype, device=grouped.device)
        for rows in _pieces(len(grouped)):
            values[rows] = grouped[rows].float().mul_(self.scales[rows].float().unsqueeze(1))
        return values.view(-1)[: self.shape.numel()].view(self.shape)

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        """Return columns of a matrix (N, width)."""
        rows, columns = index
        assert rows == slice(None)
        count, width = self.shape
        start, stop, _ = columns.indices(width)
        if width % _GROUP or start % _GROUP or stop % _GROUP or stop - start == width:
            return self.restored()[:, columns]
        groups = slice(start // _GROUP, stop // _GROUP)
        codes = self.codes.view(count, -1, _GROUP)[:, groups].reshape(-1)
        scales = self.scales.view(count, -1)[:, groups].reshape(-1)
        return EightBits(codes, scales, torch.Size((count, stop - start)), self.dtype).restored()


def _pieces(groups: int) -> Iterator[slice]:
    step = _VALUES_AT_ONCE // _GROUP
    for start in range(0, groups, step):
        yield slice(start, start + step)


class _Storage(TorchFunctionMode):
    """Attention's functions keep what they keep in 8 bits; `stored` counts the values of all that is kept so."""

    stored = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _OF_ATTENTION or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        if given[0].dim() < 3:  # attention has images and tokens at least; these are weights
            return func(*args, **kwargs)
        constant = {one.data_ptr() for one in given if not one.requires_grad}  # a mask, a bias of positions
        least = given[0].numel() // 2  # less is no activation, but what softmax keeps of each row

        def pack(tensor: Tensor) -> Tensor | EightBits:
            if not tensor.is_floating_point() or tensor.data_ptr() in constant or tensor.numel() < least:
                return tensor
            return EightBits.of(tensor)

        with saved_tensors_hooks(pack, _unpack):
            return func(*args, **kwargs)


def _unpack(kept: Tensor | EightBits) -> Tensor:
    return kept.restored() if isinstance(kept, EightBits) else kept


_OF_ATTENTION = {
    F.scaled_dot_product_attention,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.softmax,
    torch.softmax,
    F.softmax,
}
_ACTIVE: ContextVar[_Storage | None] = ContextVar("activation_storage", default=None)


def in_eight_bits() -> bool:
    """Return whether activations are to be kept in 8 bits now."""
    return not torch.compiler.is_compiling() and _ACTIVE.get() is not None  # compilers can't read context variables


@contextmanager
def stored_in_eight_bits() -> Iterator[Callable[[], int]]:
    """Keep activations of a forward pass within in 8 bits; yield what tells how many values were kept so."""
    storage = _Storage()
    token = _ACTIVE.set(storage)
    try:
        with storage:
            yield lambda: storage.stored
    finally:
        _ACTIVE.reset(token)
