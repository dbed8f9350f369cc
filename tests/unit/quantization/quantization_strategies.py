"""Formats and weights to draw from (every type, odd shapes, what breaks careless quantizers), and what codes mean."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from peft_vit.core.config import NUMBER_FORMATS
from peft_vit.core.quantization import QuantizationFormat, QuantizedTensor, code_values, unpack_codes

TYPES = tuple(NUMBER_FORMATS)
INTEGERS = tuple(name for name, format in NUMBER_FORMATS.items() if format.values is None)
MAGNITUDE = {torch.float32: 2.0**125, torch.float16: 65504.0}


@st.composite
def formats(draw: st.DrawFn, types: tuple[str, ...] = TYPES, offset: bool | None = None) -> QuantizationFormat:
    return QuantizationFormat(
        type=draw(st.sampled_from(types)),
        group_size=draw(st.sampled_from([None, 1, 2, 3, 5, 16, 32, 64, 128])),
        offset=draw(st.booleans()) if offset is None else offset,
        scale_dtype=draw(st.sampled_from([torch.float32, torch.float16])),
    )


@st.composite
def weights(draw: st.DrawFn, format: QuantizationFormat) -> Tensor:
    """Draw (out, in) float32 weights that the format can hold; rows may be constant, tiny, or hold one outlier."""
    limit = MAGNITUDE[format.scale_dtype]
    rows, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    columns = groups * (format.group_size or draw(st.sampled_from([1, 2, 7, 12])))
    span = float(np.float32(draw(st.sampled_from([1e-44, 1e-38, 1e-6, 0.02, 1.0, limit]))))
    elements = st.floats(-span, span, width=32) | st.just(0.0)
    array = draw(hnp.arrays(np.float32, (rows, columns), elements=elements))
    kind = draw(st.sampled_from(["as drawn", "constant row", "outlier", "far from zero"]))
    if kind == "constant row":
        array[0] = array[0, 0]
    elif kind == "outlier":
        array[0, -1] = draw(st.sampled_from([limit, -limit, 1e3]))
    elif kind == "far from zero":
        array = (array + np.float32(1000)).clip(-limit, limit).astype(np.float32)
    return torch.from_numpy(array)


@st.composite
def formats_and_weights(
    draw: st.DrawFn, types: tuple[str, ...] = TYPES, offset: bool | None = None
) -> tuple[QuantizationFormat, Tensor]:
    format = draw(formats(types, offset))
    return format, draw(weights(format))


def levels_of(quantized: QuantizedTensor) -> np.ndarray:
    """Return the weight of each code in each group, float64 (out, groups, codes); infinity: the code is never used."""
    format = quantized.format
    codes = np.arange(2.0**format.bits)
    if format.has_codebook:
        values, used = code_values(format.type).double().numpy(), codes >= 0
    else:
        values, used = codes - (0 if format.offset else 2 ** (format.bits - 1)), codes >= (0 if format.offset else 1)
    levels = quantized.scales.double().numpy()[..., None] * values
    if quantized.offsets is not None:
        levels = levels + quantized.offsets.double().numpy()[..., None]
    return np.where(used, levels, np.inf)


def codes_of(quantized: QuantizedTensor) -> np.ndarray:
    """Return the codes as (out, groups, group size) integers."""
    codes = unpack_codes(quantized.codes, quantized.format.bits, quantized.shape[1])
    return codes.numpy().astype(np.int64).reshape(*quantized.scales.shape, -1)


def in_groups(weight: Tensor, quantized: QuantizedTensor) -> np.ndarray:
    """Return weights as float64 (out, groups, group size)."""
    return weight.double().numpy().reshape(*quantized.scales.shape, -1)
