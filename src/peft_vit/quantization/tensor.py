"""A weight matrix in packed codes: how it becomes float again, and how an update is merged into it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor

from peft_vit.errors import UserError
from peft_vit.quantization.codebooks import Codebook, byte_table
from peft_vit.quantization.formats import SCALE_DTYPES, QuantizationFormat
from peft_vit.quantization.packing import unpack_codes
from peft_vit.quantization.underflow import warn_of_offsets

_AT_ONCE = 1 << 16  # weights


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized weight matrix; `QuantizationFormat` states what its numbers mean.

    Made by `quantize` or, from stored tensors, by `from_tensors`; the bare constructor checks nothing.

    Attributes:
        codes: packed, uint8, (out, ceil(in * bits / 8)); layout as in `pack_codes`.
        scales: not negative, (out, groups), of the format's scale_dtype. Where one is 0, the group is constant
            and its codes mean nothing.
        offsets: (out, groups), float32 or float16; as quantized of the format's scale_dtype, merged ones may
            be of the other. None if the format has none.
        shape: (out, in).
        format: how the numbers are to be read.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    shape: tuple[int, int]
    format: QuantizationFormat

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets together."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, scales and offsets, over the number of weights."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32, *, added: Tensor | None = None) -> Tensor:
        """Return the weights that the codes stand for, of shape (out, in); no gradient passes.

        Args:
            dtype: of the result; weights are computed in float32 and rounded once to a narrower one.
            added: (out, groups), added to every weight of the group, in float32 with the offsets: what an update
                makes of the weights before it is merged.

        Raises:
            ValueError: if `added` has another shape.
        """
        rows, columns = self.shape
        stored_columns = self.codes.shape[1] * self.format.codes_per_byte
        values = torch.empty(rows, stored_columns, dtype=torch.float32, device=self.codes.device)
        self._decode(values)
        weights = values[:, :columns]
        grouped = weights.unflatten(1, (self.scales.shape[1], -1))  # (out, groups, group size)
        grouped.mul_(self.scales.float().unsqueeze(-1))
        constant = None if self.offsets is None else self.offsets.float()
        if added is not None:
            if added.shape != self.scales.shape:
                raise ValueError(f"expected an update of shape {tuple(self.scales.shape)}, got {tuple(added.shape)}")
            constant = added.float() if constant is None else constant + added.float()
        if constant is not None:
            grouped.add_(constant.unsqueeze(-1))  # (out, groups, 1)
        if stored_columns != columns:  # rows end within a byte
            values = weights.contiguous()
        return values.to(dtype)

    def columns(self, columns: slice) -> QuantizedTensor:
        """Return the weights of some inputs, (out, c).

        Raises:
            ValueError: if they are no whole groups or bytes.
        """
        rows, width = self.shape
        groups, per_byte = self.scales.shape[1], self.format.codes_per_byte
        size = width // groups
        if groups > 1 and (columns.start % size or columns.stop % size):
            raise ValueError(f"columns {columns.start} to {columns.stop} are no whole groups of {size}")
        if columns.start % per_byte or columns.stop % per_byte:
            raise ValueError(f"columns {columns.start} to {columns.stop} are no whole bytes of {per_byte} codes")
        some = slice(columns.start // size, columns.stop // size) if groups > 1 else slice(None)
        return replace(
            self,
            codes=self.codes[:, columns.start // per_byte : columns.stop // per_byte].contiguous(),
            scales=self.scales[:, some],
            offsets=None if self.offsets is None else self.offsets[:, some],
            shape=(rows, columns.stop - columns.start),
        )

    def _decode(self, values: Tensor) -> None:
        """Write the codes' values, before scale and offset, into contiguous float32 rows of whole bytes."""
        if self.format.has_codebook:
            table = byte_table(cast(Codebook, self.format.type), values.device)
            words = values.view(-1).view(torch.int64)  # (out * bytes,): a pair of float32 each
            torch.index_select(table, 0, self.codes.view(-1).int(), out=words)
            return
        codes = unpack_codes(self.codes, self.format.bits, values.shape[1])
        if not self.format.offset:
            # Below zero uint8 wraps around, to the bits that int8 reads as the negative number.
            codes = (codes - 2 ** (self.format.bits - 1)).view(torch.int8)
        values.copy_(codes)

    def with_offset_added(
        self, delta: Tensor, dtype: torch.dtype | None = None, *, name: str = "the weight"
    ) -> QuantizedTensor:
        """Return the weights plus an update that is constant on each group.

        This is QA-LoRA's merge (arXiv 2309.14717) for offsets that are added after scaling. Nothing is
        quantized anew: codes and scales are shared with this tensor, and with float32 offsets nothing but
        float rounding is lost. A format without offsets becomes the same one with offsets: those of a codebook
        are 0, and scale * (c - 2^(b-1)) of symmetric integers is scale * c + offset with -scale * 2^(b-1).

        Args:
            delta: (out, groups), added to every weight of the group.
            dtype: of the new offsets, float32 or float16; None: that of the old ones, or else of the scales.
            name: of the layer, in the `UnderflowWarning` that says where float16 offsets are too coarse.

        Raises:
            UserError: if the dtype is another one, or a sum leaves its range.
            ValueError: if delta has another shape.
        """
        if delta.shape != self.scales.shape:
            raise ValueError(f"expected an update of shape {tuple(self.scales.shape)}, got {tuple(delta.shape)}")
        if dtype is None:
            dtype = self.scales.dtype if self.offsets is None else self.offsets.dtype
        if dtype not in SCALE_DTYPES:
            raise UserError(f"expected torch.float32 or torch.float16, got {dtype}", field="offset_dtype")
        exact = self._constant_part() + delta.detach()
        offsets = exact.to(dtype)
        if not bool(offsets.isfinite().all()):
            raise UserError(
                f"offset plus update is not finite in {dtype}; use torch.float32 offsets, "
                "and check the update for infinities and NaN",
                field="offset_dtype",
            )
        warn_of_offsets(exact, offsets, self.scales, self.format, name)
        return replace(self, offsets=offsets, format=replace(self.format, offset=True))

    def _constant_part(self) -> Tensor:
        """Return what each group adds to scale * value[c], or to scale * c, float32 of shape (out, groups)."""
        if self.offsets is not None:
            return self.offsets.float()
        zero = 0 if self.format.has_codebook else 2 ** (self.format.bits - 1)
        return self.scales.float() * -zero

    def rows(self, rows: slice) -> QuantizedTensor:
        """Return some rows, on the same memory."""
        codes, scales = self.codes[rows], self.scales[rows]
        offsets = None if self.offsets is None else self.offsets[rows]
        return QuantizedTensor(codes, scales, offsets, (len(codes), self.shape[1]), self.format)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Return the same weights on another device."""
        return QuantizedTensor(
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            offsets=None if self.offsets is None else self.offsets.to(device),
            shape=self.shape,
            format=self.format,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return what has to be stored: "codes", "scales" and, if there are any, "offsets"."""
        tensors = {"codes": self.codes, "scales": self.scales}
        return tensors if self.offsets is None else {**tensors, "offsets": self.offsets}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], format: QuantizationFormat) -> Self:
        """Return the quantized weights that `tensors` stored.

        Args:
            tensors: "codes", "scales" and, exactly if the format has offsets, "offsets".
            shape: (out, in) of the weight matrix.
            format: the format it was quantized to.

        Raises:
            UserError: if a tensor is missing or unexpected, has another dtype or shape, or holds what no
                weights of this format have: codes out of range, negative or infinite scales, infinite
                offsets.
        """
        rows, columns = shape
        per_group = (rows, format.groups(columns))
        expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, int]]] = {
            "codes": ((torch.uint8,), (rows, -(-columns // format.codes_per_byte))),
            "scales": ((format.scale_dtype,), per_group),
        }
        if format.offset:
            expected["offsets"] = (SCALE_DTYPES, per_group)
        if tensors.keys() != expected.keys():
            raise UserError(
                f"expected the tensors {', '.join(expected)}, got {', '.join(sorted(tensors)) or 'none'}; "
                "was the file written with another format?"
            )
        for name, (dtypes, tensor_shape) in expected.items():
            _check_tensor(name, tensors[name], dtypes, tensor_shape)
        _check_codes(tensors["codes"], columns, format)
        _check(bool((tensors["scales"] >= 0).all()), "scales", "expected no negative scale")
        return cls(
            codes=tensors["codes"].contiguous(),
            scales=tensors["scales"].contiguous(),
            offsets=tensors["offsets"].contiguous() if format.offset else None,
            shape=(rows, columns),
            format=format,
        )


def rows_at_once(weight: Tensor) -> int:
    """Return how many rows of a matrix pass at a time, so that what is computed with them takes few megabytes."""
    return max(1, _AT_ONCE // weight.shape[1])


def relative_error(weight: Tensor, quantized: QuantizedTensor) -> float:
    """Return ||W - Wq||_F / ||W||_F of float weights (out, in); 0 if the two are equal, infinity if only W is zero."""
    errors, norms = [], []
    for start in range(0, len(weight), rows_at_once(weight)):
        rows = slice(start, start + rows_at_once(weight))
        part = weight[rows].detach().cpu().double()
        errors.append(float(torch.linalg.vector_norm(part - quantized.rows(rows).dequantize().cpu().double())))
        norms.append(float(torch.linalg.vector_norm(part)))
    error, norm = math.hypot(*errors), math.hypot(*norms)
    if error == 0:
        return 0.0
    return error / norm if norm > 0 else math.inf


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int]) -> None:
    as_expected = tensor.dtype in dtypes and tensor.shape == shape
    got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
    _check(as_expected, name, f"expected {' or '.join(map(str, dtypes))} of shape {shape}, got {got}")
    if tensor.is_floating_point():
        _check(bool(tensor.isfinite().all()), name, "expected finite numbers, got infinities or NaN")


def _check_codes(packed: Tensor, columns: int, format: QuantizationFormat) -> None:
    codes = unpack_codes(packed, format.bits, packed.shape[1] * format.codes_per_byte)
    _check(not bool(codes[:, columns:].any()), "codes", "expected zero bits after the last code of a row")
    if not format.has_codebook and not format.offset:
        in_range = bool((codes[:, :columns] > 0).all())
        _check(in_range, "codes", "expected no code 0, which symmetric integers never use")


def _check(holds: bool, name: str, expectation: str) -> None:
    if not holds:
        raise UserError(f"{expectation}; the file is damaged or of another format, write it anew", field=name)
