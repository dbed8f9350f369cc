import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from covering_pairs import covering_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_strategies import TYPES, formats_and_weights
from safetensors.torch import load, save
from torch import Tensor

from peft_vit.errors import UserError
from peft_vit.quantization import (
    QuantizationFormat,
    QuantizedTensor,
    code_values,
    pack_codes,
    quantize,
    relative_error,
    unpack_codes,
)
from peft_vit.quantization.formats import SCALE_DTYPES

pytestmark = pytest.mark.filterwarnings("ignore::peft_vit.errors.UnderflowWarning")  # tiny weights are drawn

FormatAndWeights = tuple[QuantizationFormat, Tensor]


def random_weight(rows: int = 6, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@settings(max_examples=150)
@given(formats_and_weights(double_quant=None))
def test_dequantize_follows_the_formula(case: FormatAndWeights) -> None:
    format, weight = case
    quantized = quantize(weight, format)
    codes = unpack_codes(quantized.codes, format.bits, weight.shape[1]).long()
    if format.has_codebook:
        values = code_values(format.type)[codes].double()  # type: ignore[arg-type]
    else:
        values = codes.double() - (0 if format.offset else 2 ** (format.bits - 1))
    size = weight.shape[1] // quantized.scales.shape[1]
    expected = values * quantized.scales.double().repeat_interleave(size, 1)
    scale_of_rounding = expected.abs()
    if quantized.offsets is not None:
        offsets = quantized.offsets.double().repeat_interleave(size, 1)
        scale_of_rounding = scale_of_rounding + offsets.abs()
        expected = expected + offsets
    assert ((quantized.dequantize() - expected).abs() <= 2.0**-22 * scale_of_rounding + 1e-44).all()


@pytest.mark.parametrize(
    ("type", "columns", "dtype"),
    covering_pairs(TYPES, [12, 9], [torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_dequantize_rounds_once_to_any_dtype(type: str, columns: int, dtype: torch.dtype) -> None:
    quantized = quantize(random_weight(5, columns), QuantizationFormat(type, 3, offset=True))  # type: ignore[arg-type]
    found = quantized.dequantize(dtype)
    assert torch.equal(found, quantized.dequantize().to(dtype))
    assert found.is_contiguous()


def test_dequantize_does_not_depend_on_the_default_dtype() -> None:
    quantized = quantize(random_weight(5, 9), QuantizationFormat("nf4", 3, offset=True))
    expected = quantized.dequantize()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(quantized.dequantize(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("type", "group", "offset", "dtype", "bits"),
    [
        ("int4", 32, True, torch.float16, 5.0),
        ("nf4", 32, True, torch.float16, 5.0),
        ("nf4", 64, False, torch.float32, 4.5),
        ("fp4", 64, False, torch.float16, 4.25),
        ("int2", 32, True, torch.float16, 3.0),
        ("nf3", 32, False, torch.float16, 3.5),
        ("int3", 32, True, torch.float16, 4.0),
        ("int8", 128, True, torch.float32, 8.5),
        ("int4", None, False, torch.float32, 4 + 32 / 384),
    ],
)
def test_bits_per_weight_count_scales_and_offsets(
    type: str, group: int | None, offset: bool, dtype: torch.dtype, bits: float
) -> None:
    quantized = quantize(random_weight(4, 384), QuantizationFormat(type, group, offset, dtype))  # type: ignore[arg-type]
    assert quantized.bits_per_weight == bits


@settings(max_examples=100)
@given(formats_and_weights(double_quant=None))
def test_nbytes_is_what_the_live_storages_take(case: FormatAndWeights) -> None:
    format, weight = case
    quantized = quantize(weight, format)
    storages = [tensor.untyped_storage() for tensor in quantized.tensors().values()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert quantized.nbytes == sum(storage.nbytes() for storage in storages)


@settings(max_examples=300)
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


def test_offsets_of_another_dtype_are_refused() -> None:
    quantized = quantize(random_weight(), QuantizationFormat("nf4", 32, offset=False))
    with pytest.raises(
        UserError, match=r"^offset_dtype: expected torch\.float32 or torch\.float16, got torch\.bfloat16"
    ):
        quantized.with_offset_added(torch.zeros(6, 2), torch.bfloat16)


def test_an_update_of_other_groups_is_refused() -> None:
    quantized = quantize(random_weight(), QuantizationFormat("int4", 32, offset=True))
    with pytest.raises(ValueError, match=r"expected an update of shape \(6, 2\), got \(6, 4\)"):
        quantized.with_offset_added(torch.zeros(6, 4))


def test_a_merge_that_overflows_is_refused() -> None:
    quantized = quantize(random_weight(), QuantizationFormat("int4", 32, True, torch.float16))
    with pytest.raises(UserError, match=r"^offset_dtype: offset plus update is not finite"):
        quantized.with_offset_added(torch.full((6, 2), 7e4))


def test_moving_keeps_everything() -> None:
    quantized = quantize(random_weight(), QuantizationFormat("fp4", 32, offset=True))
    moved = quantized.to("meta")
    assert moved.codes.device.type == "meta"
    assert {name: tensor.shape for name, tensor in moved.tensors().items()} == {
        name: tensor.shape for name, tensor in quantized.tensors().items()
    }
    assert torch.equal(quantized.to("cpu").dequantize(), quantized.dequantize())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: {"codes": t["codes"].int()}, r"^codes: expected torch\.uint8 of shape \(4, 5\), got torch\.int32"),
        (lambda t: {"codes": t["codes"][:, :-1]}, r"^codes: expected .* \(4, 5\), got torch\.uint8 of shape \(4, 4\)"),
        (lambda t: {"scales": t["scales"].half()}, r"^scales: expected torch\.float32"),
        (lambda t: {"offsets": t["offsets"][:, :-1]}, r"^offsets: expected .* of shape \(4, 2\)"),
        (lambda t: {"scales": t["scales"] * torch.nan}, "^scales: expected finite numbers"),
        (lambda t: {"offsets": t["offsets"] * torch.nan}, "^offsets: expected finite numbers"),
        (lambda t: {"scales": -t["scales"]}, "^scales: expected no negative scale"),
        (lambda t: {"zero_points": t["codes"]}, "^expected the tensors codes, scales, offsets, got .*zero_points"),
    ],
)
def test_damaged_tensors_are_refused(damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str) -> None:
    format = QuantizationFormat("int4", 5, offset=True)
    tensors = quantize(random_weight(4, 10), format).tensors()
    with pytest.raises(UserError, match=message):
        QuantizedTensor.from_tensors(tensors | damage(tensors), (4, 10), format)
    del tensors["offsets"]
    with pytest.raises(UserError, match=r"^expected the tensors codes, scales, offsets, got codes, scales"):
        QuantizedTensor.from_tensors(tensors, (4, 10), format)


def test_codes_out_of_range_are_refused() -> None:
    symmetric = QuantizationFormat("int4", None, offset=False)
    scales = torch.ones(1, 1)
    unused = {"codes": pack_codes(torch.tensor([[8, 0, 9]], dtype=torch.uint8), 4), "scales": scales}
    with pytest.raises(UserError, match=r"^codes: expected no code 0"):
        QuantizedTensor.from_tensors(unused, (1, 3), symmetric)
    beyond = {"codes": pack_codes(torch.tensor([[8, 8, 9, 1]], dtype=torch.uint8), 4), "scales": scales}
    with pytest.raises(UserError, match=r"^codes: expected zero bits after the last code"):
        QuantizedTensor.from_tensors(beyond, (1, 3), symmetric)


def four_levels() -> QuantizedTensor:
    """Return the weights 0, 1, 2, 3 in one group."""
    format = QuantizationFormat("int2", None, offset=True)
    return quantize(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), format)


def test_relative_error_by_hand() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 6.0]])  # error (0, 0, 0, 3), norm sqrt(41)
    assert relative_error(weight, four_levels()) == pytest.approx(3 / math.sqrt(41))


def test_no_error_and_no_signal() -> None:
    same = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert relative_error(same, four_levels()) == 0
    assert relative_error(torch.zeros(1, 4), four_levels()) == math.inf


def test_relative_error_survives_the_largest_and_smallest_weights() -> None:
    format = QuantizationFormat("int4", 32, offset=True)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    expected = relative_error(weight, quantize(weight, format))
    for factor in (2.0**120, 2.0**-120):
        assert relative_error(weight * factor, quantize(weight * factor, format)) == pytest.approx(expected)


def test_more_bits_and_smaller_groups_lose_less() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))

    def error(type: str, group: int | None) -> float:
        return relative_error(weight, quantize(weight, QuantizationFormat(type, group, offset=True)))  # type: ignore[arg-type]

    assert error("int8", 32) < error("int4", 32) < error("int3", 32) < error("int2", 32)
    assert error("nf4", 32) < error("nf3", 32) < error("int2", 32)
    assert error("int4", 16) < error("int4", 64) < error("int4", None)
    assert error("nf4", 64) < error("fp4", 64)
