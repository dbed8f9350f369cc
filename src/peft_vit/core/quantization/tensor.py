"""A weight matrix in packed codes: how it becomes float again, and how an update is merged into it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from peft_vit.base.errors import UserError
from peft_vit.core.quantization.formats import SCALE_DTYPES, QuantizationFormat, pair_table, warn_of_offsets
from peft_vit.core.quantization.packing import row_bytes, unpack_codes

_AT_ONCE = 1 << 16  # weights


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized weight matrix; `QuantizationFormat` states what its numbers mean.

    Made by `quantize` or, from stored tensors, by `from_tensors`; the bare constructor checks nothing.

    Attributes:
        codes: packed, uint8, (out, `row_bytes(in, bits)`); layout as in `pack_codes`.
        scales: (out, groups), not negative, of the format's scale_dtype. Where a scale is 0, the group is constant and
            its codes mean nothing.
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
    def groups(self) -> int:
        """Number of groups in a row."""
        return self.format.groups(self.shape[1])

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
        """
        rows, columns = self.shape
        stored_columns = self.codes.shape[1] * 8 // self.format.bits
        values = torch.empty(rows, stored_columns, dtype=torch.float32, device=self.codes.device)  # rows of whole bytes
        self._decode(values)
        weights = values[:, :columns]  # (out, in)
        grouped = weights.unflatten(1, (self.groups, -1))  # (out, groups, group size)
        grouped.mul_(self.scales.float().unsqueeze(-1))  # (out, groups, 1)
        constant = None if self.offsets is None else self.offsets.float()
        if added is not None:
            constant = added.float() if constant is None else constant + added.float()
        if constant is not None:
            grouped.add_(constant.unsqueeze(-1))  # (out, groups, 1)
        if stored_columns != columns:  # rows end within a byte
            values = weights.contiguous()
        return values.to(dtype)

    def columns(self, columns: slice) -> QuantizedTensor:
        """Return the weights of some inputs, (out, c), which are whole groups and whole bytes."""
        start, stop, bits = columns.start, columns.stop, self.format.bits
        size = self.shape[1] // self.groups
        codes = self.codes[:, start * bits // 8 : stop * bits // 8].contiguous()  # (out, bytes of c)
        groups = slice(start // size, -(-stop // size))
        return self._part(codes, (slice(None), groups), (self.shape[0], stop - start))

    def _decode(self, values: Tensor) -> None:
        """Write the codes' values, before scale and offset, into contiguous float32 rows of whole bytes."""
        bits = self.format.bits
        if self.format.has_codebook and bits == 4:
            table, step = pair_table(self.format.type, values.device), rows_at_once(values)
            for codes, part in zip(self.codes.split(step), values.split(step), strict=True):
                pairs = codes.flatten().int()  # (some rows * stored / 2,): earlier + 16 later
                torch.index_select(table, 0, pairs, out=part.view(-1).view(torch.int64))  # a pair of float32 each
            return
        codes = unpack_codes(self.codes, bits, values.shape[1])  # (out, stored columns)
        if self.format.has_codebook:
            codes = self.format.values().to(codes.device)[codes.int()]
        elif self.format.zero:
            # Below zero uint8 wraps around, to the bits that int8 reads as the negative number.
            codes = (codes - self.format.zero).view(torch.int8)
        values.copy_(codes)

    def with_offset_added(
        self, delta: Tensor, dtype: torch.dtype | None = None, *, name: str = "the weight"
    ) -> QuantizedTensor:
        """Return the weights plus an update that is constant on each group.

        This is QA-LoRA's merge (arXiv 2309.14717) for offsets that are added after scaling. Nothing is
        quantized again: codes and scales are shared with this tensor, and with float32 offsets nothing but
        float rounding is lost. A format without offsets becomes the same one with offsets: those of a codebook
        are 0, and scale * (c - 2^(b-1)) of symmetric integers is scale * c + offset with -scale * 2^(b-1).

        Args:
            delta: (out, groups), added to every weight of the group.
            dtype: of the new offsets, float32 or float16; None: that of the old ones, or else of the scales.
            name: of the layer, in the `UnderflowWarning` that says where float16 offsets are too coarse.

        Raises:
            UserError: if the dtype is another one, or a sum leaves its range.
        """
        if dtype is None:
            dtype = self.format.scale_dtype if self.offsets is None else self.offsets.dtype
        if dtype not in SCALE_DTYPES:
            raise UserError(f"expected torch.float32 or torch.float16, got {dtype}", field="offset_dtype")
        # What each group adds to scale * value[c], or to scale * c: (out, groups).
        constant = self.scales.float() * -self.format.zero if self.offsets is None else self.offsets.float()
        exact = constant + delta.detach()
        offsets = exact.to(dtype)
        if not bool(offsets.isfinite().all()):
            raise UserError(
                f"offset plus update is not finite in {dtype}; use torch.float32 offsets, "
                "and check the update for infinities and NaN",
                field="offset_dtype",
            )
        warn_of_offsets(exact, offsets, self.scales, self.format, name)
        return replace(self, offsets=offsets, format=replace(self.format, offset=True))

    def rows(self, rows: slice) -> QuantizedTensor:
        """Return some rows, on the same memory."""
        codes = self.codes[rows]
        return self._part(codes, (rows, slice(None)), (len(codes), self.shape[1]))

    def _part(self, codes: Tensor, groups: tuple[slice, slice], shape: tuple[int, int]) -> QuantizedTensor:
        offsets = None if self.offsets is None else self.offsets[groups]
        return QuantizedTensor(codes, self.scales[groups], offsets, shape, self.format)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Return the same weights on another device."""
        stored = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, codes=stored["codes"], scales=stored["scales"], offsets=stored.get("offsets"))

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
        expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
            "codes": ((torch.uint8,), (rows, row_bytes(columns, format.bits))),
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
            tensor, stated = tensors[name], f"{' or '.join(map(str, dtypes))} of shape {tensor_shape}"
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            _check(tensor.dtype in dtypes and tensor.shape == tensor_shape, name, f"expected {stated}, got {got}")
            if tensor.is_floating_point():
                _check(bool(tensor.isfinite().all()), name, "expected finite numbers, got infinities or NaN")
        stored = {name: tensors[name].contiguous() for name in expected}
        codes = stored["codes"]
        unpacked = unpack_codes(codes, format.bits, codes.shape[1] * 8 // format.bits)  # (out, codes of whole bytes)
        _check(not bool(unpacked[:, columns:].any()), "codes", "expected zero bits after the last code of a row")
        if not format.has_codebook and not format.offset:
            used = bool((unpacked[:, :columns] > 0).all())
            _check(used, "codes", "expected no code 0, which symmetric integers never use")
        _check(bool((stored["scales"] >= 0).all()), "scales", "expected no negative scale")
        return cls(codes, stored["scales"], stored.get("offsets"), (rows, columns), format)


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


def _check(holds: bool, name: str, expectation: str) -> None:
    if not holds:
        raise UserError(f"{expectation}; the file is damaged or of another format, write it again", field=name)
