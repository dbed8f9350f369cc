"""What is stored of a quantized weight: its bytes, offsets that take updates in, its error, other dtypes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from covering_pairs import covering_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_strategies import TYPES, formats_and_weights
from safetensors.torch import load, save
from torch import Tensor

from peft_vit.quantization import QuantizationFormat, QuantizedTensor, quantize, relative_error
from peft_vit.quantization.formats import SCALE_DTYPES, dynamic_values, quantize_scales

pytestmark = [
    pytest.mark.part("quantization"),
    pytest.mark.filterwarnings("ignore::peft_vit.errors.UnderflowWarning"),  # tiny weights are drawn
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


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        (QuantizationFormat("nf4", 32, True, torch.float16), 5.0),
        (QuantizationFormat("nf4", 64, False, torch.float32), 4.5),
        (QuantizationFormat("nf3", 32, False, torch.float16), 3.5),
        (QuantizationFormat("int8", 128, True, torch.float32), 8.5),
        (QuantizationFormat("int4", None, False, torch.float32), 4 + 32 / 384),
        # A byte a group, a float each 256 groups, and their mean: a quarter of a bit, and little more.
        (QuantizationFormat("int3", 32, False, torch.float16, double_quant=True), 3 + 8 / 32 + (18 + 1) * 32 / 384**2),
    ],
)
def test_bits_per_weight_count_scales_and_offsets(format: QuantizationFormat, bits: float) -> None:
    assert quantize(random_weight(384, 384), format).bits_per_weight == pytest.approx(bits, rel=1e-12)


@given(formats_and_weights(double_quant=None))
def test_bytes_from_the_shape_are_those_of_the_live_storages(case: FormatAndWeights) -> None:
    format, weight = case
    quantized = quantize(weight, format)
    storages = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in quantized.tensors().values()}
    assert len(storages) == len(quantized.tensors())
    assert quantized.nbytes == sum(storages.values()) == format.stored_bytes(*weight.shape)


@settings(max_examples=150)
@given(
    formats_and_weights(double_quant=None), st.floats(-8, 8), st.integers(0, 99), st.sampled_from([None, *SCALE_DTYPES])
)
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
    assert merged.stored_scales is quantized.stored_scales
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


def spread_weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(90, 1, generator=generator) + 0.2  # so that scales differ by more than chance
    return 0.02 * spread * torch.randn(90, 128, generator=generator)


@pytest.mark.parametrize("shape", [(90, 4), (1, 1), (3, 100), (16, 16)])
def test_scales_follow_the_formula(shape) -> None:
    exact = 0.2 + torch.rand(shape, generator=torch.Generator().manual_seed(1)) ** 2
    scales = quantize_scales(exact)
    flat = exact.double().numpy().ravel()
    rest = flat - flat.mean()
    largest = [np.abs(rest[start : start + 256]).max() for start in range(0, len(rest), 256)]
    np.testing.assert_allclose(scales.mean.numpy(), [flat.mean()], rtol=1e-6)
    np.testing.assert_allclose(scales.blocks.numpy(), largest, rtol=1e-5, atol=1e-7)
    largest = np.repeat(largest, 256)[: len(rest)]
    values = dynamic_values().double().numpy()  # as bitsandbytes: see the oracle
    nearest = np.abs(values[:, None] * largest - rest).min(0)
    stored = scales.dequantize().double().numpy().ravel()
    np.testing.assert_allclose(np.abs(stored - flat), nearest, atol=1e-6)
    np.testing.assert_allclose(stored, flat.mean() + largest * values[scales.codes.numpy().ravel()], atol=1e-6)
    assert nearest.max() <= 0.0071 * largest.max()


def test_no_scale_is_negative_or_infinite_and_equal_ones_are_exact() -> None:
    one_large = torch.zeros(4, 64)
    one_large[0, 0] = 65504.0
    scales = quantize_scales(one_large.half()).dequantize()
    assert scales.dtype is torch.float16
    assert ((scales >= 0) & scales.isfinite()).all()
    assert torch.equal(quantize_scales(torch.full((4, 64), 0.37)).dequantize(), torch.full((4, 64), 0.37))


def test_stored_tensors_give_the_same_weights_and_parts_of_them() -> None:
    format = QuantizationFormat("nf3", 16, True, torch.float16, double_quant=True)
    quantized = quantize(spread_weights(), format)
    again = QuantizedTensor.from_tensors(load(save(quantized.tensors())), (90, 128), format)
    assert torch.equal(again.dequantize(), quantized.dequantize())
    assert torch.equal(quantized.rows(slice(70, 80)).dequantize(), quantized.dequantize()[70:80])
    assert torch.equal(quantized.columns(slice(32, 96)).dequantize(), quantized.dequantize()[:, 32:96])
    moved = quantized.to("meta").tensors()
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}
    assert all(moved[name].shape == tensor.shape for name, tensor in quantized.tensors().items())
