"""What a quantized weight is made of: the code's type, the groups, the numbers kept per group."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from peft_vit.base.errors import UnderflowWarning, UserError
from peft_vit.core.config import NUMBER_FORMATS, QuantizationType
from peft_vit.core.quantization.packing import row_bytes

SCALE_DTYPES = (torch.float32, torch.float16)
LARGEST_LOSS = 0.01  # ten times what rounding a normal float16 number may lose
SPACING = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps  # 2^-24


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that files have for a dtype, "float16"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class QuantizationFormat:
    """How a weight matrix of shape (out, in) is stored.

    With c its stored code, 0 <= c < 2^bits, and the scale and offset of its row and group, a weight is:

    ========  ==============================  =============================================
    type      ``offset=False``                ``offset=True``
    ========  ==============================  =============================================
    codebook  scale * value[c]                scale * value[c] + offset, offset initially 0
    integers  scale * (c - 2^(bits - 1)),     scale * c + offset, offset initially the
              c = 0 is never used             group's minimum
    ========  ==============================  =============================================

    Attributes:
        type: the code's type.
        group_size: adjacent inputs that share a scale (and an offset); None for one scale per output row.
        offset: whether groups have an offset; a merged update always becomes one.
        scale_dtype: float32 or float16, for scales, and for offsets as they are quantized.

    Raises:
        UserError: if a field has a value that no format has.
    """

    type: QuantizationType
    group_size: int | None
    offset: bool
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.type not in NUMBER_FORMATS:
            raise UserError(f"expected one of {', '.join(NUMBER_FORMATS)}, got {self.type!r}", field="type")
        if self.group_size is not None and self.group_size < 1:
            raise UserError(f"expected at least 1 or none at all, got {self.group_size}", field="group_size")

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Return the format that `as_json` has written; older files have the dtype as "torch.float16".

        Raises:
            UserError, KeyError, TypeError, AttributeError: if no format has these fields or values.
        """
        dtypes = {dtype_name(dtype): dtype for dtype in SCALE_DTYPES}
        return cls(**{**fields, "scale_dtype": dtypes[fields["scale_dtype"].removeprefix("torch.")]})

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them, the dtype by its name."""
        return {**asdict(self), "scale_dtype": dtype_name(self.scale_dtype)}

    @property
    def bits(self) -> int:
        """Bits of one code, without what scales and offsets add."""
        return NUMBER_FORMATS[self.type].bits

    @property
    def has_codebook(self) -> bool:
        """Whether codes index a table of values rather than being integers themselves."""
        return NUMBER_FORMATS[self.type].values is not None

    @property
    def zero(self) -> int:
        """The code of integers that stands for 0 before an offset; 0 with offset, and of a codebook."""
        return 0 if self.offset or self.has_codebook else 2 ** (self.bits - 1)

    @property
    def steps(self) -> int:
        """By how many scales the largest weight of a group may lie from 0, or from its offset."""
        return 1 if self.has_codebook else 2**self.bits - 1 - self.zero

    def values(self) -> Tensor:
        """Return what each code stands for before scale and offset, float32 of shape (2^bits,), in the codes' order."""
        if self.has_codebook:
            return code_values(self.type)
        return torch.arange(2**self.bits, dtype=torch.float32) - self.zero

    def groups(self, columns: int) -> int:
        """Return the number of groups in a row of so many inputs.

        Raises:
            UserError: if the group size does not divide them.
        """
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            raise UserError(
                f"{self.group_size} does not divide the matrix's {columns} inputs; "
                "choose a divisor, or one scale per output row",
                field="group_size",
            )
        return columns // self.group_size

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of a matrix in this format, from its shape: those that `QuantizedTensor.nbytes` counts.

        Raises:
            UserError: if the group size does not divide the columns.
        """
        scales = rows * self.groups(columns) * self.scale_dtype.itemsize
        return rows * row_bytes(columns, self.bits) + scales * (2 if self.offset else 1)


def code_values(type: QuantizationType) -> Tensor:
    """Return the value of each code of a codebook, float32 of shape (2^bits,), in [-1, 1]; not sorted for fp4."""
    return torch.tensor(NUMBER_FORMATS[type].values, dtype=torch.float32)


@cache
def pair_table(type: QuantizationType, device: torch.device) -> Tensor:
    """Return the two float32 values of each pair of a codebook's 4-bit codes, earlier + 16 later, of shape (256,).

    Both are in one int64, to be read and written at once: several times as fast as looking up single codes.
    """
    values = code_values(type)
    pairs = torch.cartesian_prod(values, values).flip(1)  # (256, 2): the earlier code changes fastest
    return pairs.contiguous().view(torch.int64).flatten().to(device)  # (256, 1) -> (256,)


def warn_of_scales(largest: Tensor, format: QuantizationFormat, name: str) -> None:
    """Warn if float16 may widen the step between codes by more than LARGEST_LOSS in any group that is not zero.

    Below 2^-14 the values of float16 lie 2^-24 = 6e-8 apart, and a scale that is rounded up widens the step between
    codes by up to that: weights of 1e-8 all become zeros. What counts is the loss beside the group's own weights: a
    scale of 4e-5, as some of int8 in ViT-S/14, loses next to nothing. With M a group's largest magnitude, in `largest`
    (out, groups), and L the format's steps, the step is about M / L, and 2^-24 more than LARGEST_LOSS of that if
    M < 2^-24 L / LARGEST_LOSS. A minimum rounded down to be the offset adds no more to it.
    """
    if format.scale_dtype is not torch.float16:
        return
    limit = SPACING * format.steps / LARGEST_LOSS
    _warn(f"{name}: float16 is too coarse for the {format.type} scales of", (largest > 0) & (largest < limit), 5)


def warn_of_offsets(exact: Tensor, stored: Tensor, scales: Tensor, format: QuantizationFormat, name: str) -> None:
    """Warn if storing offsets moved the weights of a group by more than LARGEST_LOSS of the largest they may have.

    All are (out, groups): the offsets in float32 and as they are stored, and the scales.
    """
    largest = scales.float() * format.steps + exact.abs()
    lost = (stored.float() - exact).abs() > LARGEST_LOSS * largest
    _warn(f"{name}: float16 is too coarse for the offsets of", lost, 4)


def _warn(text: str, lost: Tensor, stacklevel: int) -> None:
    if count := int(lost.sum()):
        warnings.warn(
            f"{text} {count} of {lost.numel()} groups, whose weights are too small for it; use scale_precision: fp32",
            UnderflowWarning,
            stacklevel=stacklevel,  # who called `quantize`, behind torch's decorator, or `with_offset_added`
        )
