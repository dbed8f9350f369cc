"""What a quantized weight is made of: the code's type, the groups, the numbers kept per group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from peft_vit.config import BITS_OF_TYPE, QuantizationType
from peft_vit.errors import UserError
from peft_vit.quantization.packing import row_bytes
from peft_vit.quantization.scales import scales_bytes

SCALE_DTYPES = (torch.float32, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that files have for a dtype, "float16"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class QuantizationFormat:
    """How a weight matrix of shape (out, in) is stored.

    With c its stored code, 0 <= c < 2^bits, and the scale and offset of its row and group, a weight is:

    ==========  ==============================  =============================================
    type        ``offset=False``                ``offset=True``
    ==========  ==============================  =============================================
    nf3/4, fp4  scale * value[c]                scale * value[c] + offset, offset initially 0
    int2/3/4/8  scale * (c - 2^(bits - 1)),     scale * c + offset, offset initially the
                c = 0 is never used             group's minimum
    ==========  ==============================  =============================================

    With `double_quant` the scales themselves are kept in 8 bits, see `scales`; the scale above is the one that they
    stand for, rounded to scale_dtype.

    Attributes:
        type: the code's type.
        group_size: adjacent inputs that share a scale (and an offset); None for one scale per output row.
        offset: whether groups have an offset; a merged update always becomes one.
        scale_dtype: float32 or float16, for scales, and for offsets as they are quantized.
        double_quant: whether scales are kept in 8 bits.

    Raises:
        UserError: if a field has a value that no format has.
    """

    type: QuantizationType
    group_size: int | None
    offset: bool
    scale_dtype: torch.dtype = torch.float32
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.type not in BITS_OF_TYPE:
            raise UserError(f"expected one of {', '.join(BITS_OF_TYPE)}, got {self.type!r}", field="type")
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise UserError(f"expected at least 1 or none at all, got {self.group_size}", field="group_size")
        for field in ("offset", "double_quant"):
            if not isinstance(value := getattr(self, field), bool):
                raise UserError(f"expected true or false, got {value!r}", field=field)
        if self.scale_dtype not in SCALE_DTYPES:
            raise UserError(f"expected torch.float32 or torch.float16, got {self.scale_dtype}", field="scale_dtype")

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Return the format that `as_json` has written; older files have the dtype as "torch.float16".

        Raises:
            UserError, KeyError, TypeError, AttributeError: if no format has these fields or values.
        """
        dtypes = {dtype_name(dtype): dtype for dtype in SCALE_DTYPES}
        return cls(**{**fields, "scale_dtype": dtypes[fields["scale_dtype"].removeprefix("torch.")]})

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them, the dtype by its name; double_quant where it is true, as older files."""
        fields = {**asdict(self), "scale_dtype": dtype_name(self.scale_dtype)}
        return fields if self.double_quant else {name: fields[name] for name in fields if name != "double_quant"}

    @property
    def bits(self) -> int:
        """Bits of one code, without what scales and offsets add."""
        return BITS_OF_TYPE[self.type]

    @property
    def has_codebook(self) -> bool:
        """Whether codes index a table of values (nf4, nf3, fp4) rather than being integers themselves."""
        return self.type in ("nf4", "nf3", "fp4")

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
        groups = rows * self.groups(columns)
        scales = scales_bytes(groups) if self.double_quant else groups * self.scale_dtype.itemsize
        offsets = groups * self.scale_dtype.itemsize if self.offset else 0
        return rows * row_bytes(columns, self.bits) + scales + offsets
