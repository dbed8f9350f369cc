"""What is stored of a quantized weight: its bytes, offsets that take updates in, its error, other dtypes."""

import math
from dataclasses import replace

import pytest
import torch
from covering_pairs import covering_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_strategies import TYPES, formats_and_weights
from safetensors.torch import load, save
from torch import Tensor

from peft_vit.core.quantization import QuantizationFormat, QuantizedTensor, quantize, relative_error
from peft_vit.core.quantization.formats import SCALE_DTYPES

pytestmark = [
    pytest.mark.part("quantization"),
    pytest.mark.filterwarnings("ignore::peft_vit.base.errors.UnderflowWarning"),  # tiny weights are drawn
]

FormatAndWeights = tuple[QuantizationFormat, Tensor]


def random_weight(rows: int = 6, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("type", "columns", "dtype"),
    covering_pairs(TYPES, [12, 9], [torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_dequantize_rounds_once_to_any_dtype(type: str, columns: int, dtype: torch.dtype) -> None:
    quantized = quantize(random_weight(5, columns), QuantizationFormat(type, 3, offset=True))  # type: ignore[arg-type]
    weight = quantized.dequantize(dtype)
    assert torch.equal(weight, quantized.dequantize().to(dtype))
    assert weight.is_contiguous()


@given(formats_and_weights())
def test_bytes_from_the_shape_are_those_of_the_live_storages(case: FormatAndWeights) -> None:
    format, weight = case
    quantized = quantize(weight, format)
    storages = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in quantized.tensors().values()}
    assert len(storages) == len(quantized.tensors())
    assert quantized.nbytes == sum(storages.values()) == format.stored_bytes(*weight.shape)
    assert quantized.bits_per_weight == 8 * quantized.nbytes / weight.numel()


@settings(max_examples=150)
@given(formats_and_weights(), st.floats(-8, 8), st.integers(0, 99), st.sampled_from([None, *SCALE_DTYPES]))
def test_merging_into_the_offset_adds_the_update(
    case: FormatAndWeights, size: float, seed: int, dtype: torch.dtype | None
) -> None:
    format, weight = case
    quantized = quantize(weight.clamp(-200, 200), format)
    before = quantized.dequantize().double()
    shape = quantized.scales.shape
    delta = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    merged = quantized.with_offset_added(delta, dtype)
    assert merged.offsets is not None
    assert merged.offsets.dtype is (dtype or format.scale_dtype)
    assert merged.format == replace(format, offset=True)
    columns_per_group = weight.shape[1] // shape[1]
    expected = before + delta.double().repeat_interleave(columns_per_group, 1)
    # Each sum rounds once: the offset's in its stored dtype, the weight's in float32.
    constant = quantized.scales.float() * 2 ** (format.bits - 1) if quantized.offsets is None else quantized.offsets
    largest = before.abs().max() + delta.abs().max() + 2 * constant.abs().max()
    unit = torch.finfo(merged.offsets.dtype).eps
    assert ((merged.dequantize() - expected).abs() <= unit * largest + 6e-8).all()
    assert merged.codes is quantized.codes
    assert merged.scales is quantized.scales
    assert torch.equal(quantized.dequantize().double(), before), "the original stays as it was"
    again = QuantizedTensor.from_tensors(load(save(merged.tensors())), merged.shape, merged.format)
    assert torch.equal(again.dequantize(), merged.dequantize())


def test_relative_error() -> None:
    levels = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    exact = quantize(levels, QuantizationFormat("int2", None, offset=True))
    other = torch.tensor([[0.0, 1.0, 2.0, 6.0]])  # error (0, 0, 0, 3), norm sqrt(41)
    assert relative_error(other, exact) == pytest.approx(3 / math.sqrt(41))
    assert relative_error(levels, exact) == 0
    assert relative_error(torch.zeros(1, 4), exact) == math.inf
    format, weight = QuantizationFormat("int4", 32, offset=True), random_weight()
    expected = relative_error(weight, quantize(weight, format))
    for factor in (2.0**120, 2.0**-120):
        assert relative_error(weight * factor, quantize(weight * factor, format)) == pytest.approx(expected)


def test_stored_tensors_give_the_same_weights_and_parts_of_them() -> None:
    format = QuantizationFormat("nf4", 16, True, torch.float16)
    quantized = quantize(random_weight(90, 128), format)
    again = QuantizedTensor.from_tensors(load(save(quantized.tensors())), (90, 128), format)
    assert torch.equal(again.dequantize(), quantized.dequantize())
    assert torch.equal(quantized.rows(slice(70, 80)).dequantize(), quantized.dequantize()[70:80])
    assert torch.equal(quantized.columns(slice(32, 96)).dequantize(), quantized.dequantize()[:, 32:96])
    by_row = quantize(random_weight(90, 128), QuantizationFormat("int4", None, False))
    assert torch.equal(by_row.columns(slice(32, 96)).dequantize(), by_row.dequantize()[:, 32:96])
    moved = quantized.to("meta").tensors()
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}
    assert all(moved[name].shape == tensor.shape for name, tensor in quantized.tensors().items())
